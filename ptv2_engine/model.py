"""PromptedModel: a frozen encoder, a trainable prompt and a small head, with the signature and outputs of transformers.

The only place where encoder, prompt and head meet. Exactly the prompt's and the head's parameters require grad.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptv2_engine.cloze import ClozeHead
from ptv2_engine.encoder import Encoder, Origin, load_encoder
from ptv2_engine.errors import ConfigError, InputError, OutOfMemory
from ptv2_engine.heads import SequenceClassificationHead, TokenClassificationHead, classification_loss
from ptv2_engine.hf_config import head_dropout_of, label_names, transformers_config
from ptv2_engine.ops import readable
from ptv2_engine.packing import PackedBatch, from_packed, pack, unpack, with_parts
from ptv2_engine.prompt import PromptBank, PromptConfig

TASKS = ("sequence-classification", "token-classification", "cloze")
LATER = ("question-answering", "multiple-choice")
CLOZE_FAMILIES = ("glm",)            # whose checkpoints bring a language-model head that this stack loads: GLM's is tied


class PromptedModel(nn.Module):
    """Made by from_pretrained, from_adapter, from_peft or from_thudm."""

    main_input_name = "input_ids"
    accepts_loss_kwargs = True           # transformers.Trainer then passes num_items_in_batch

    def __init__(self, encoder: Encoder, origin: Origin, prompt: PromptConfig, *, task: str = "sequence-classification",
                 num_labels: int | None = None, id2label: dict[int, str] | None = None, label2id: dict[str, int] | None = None,
                 pooler: str = "auto", problem_type: str | None = None, shift_positions: bool = True,
                 head_dropout: float | None = None, verbalizer_ids: list[int] | None = None,
                 length_penalty: float = 0.0) -> None:
        super().__init__()
        if task not in TASKS:
            known = "is planned but not there yet" if task in LATER else "does not exist"
            raise ConfigError(f"task {task!r} {known}; choose one of {', '.join(TASKS)}.")
        if task == "cloze":
            _check_cloze(encoder, prompt, verbalizer_ids, num_labels, id2label)
            num_labels = len(verbalizer_ids) if verbalizer_ids and id2label is None and label2id is None else num_labels
        self.id2label = label_names(origin.config, num_labels, id2label, label2id)
        num_labels = len(self.id2label)
        prompt = replace(prompt)      # a copy: the caller may build several models from one PromptConfig
        self.encoder, self.origin, self.prompt_config = encoder, origin, prompt
        self.task, self.num_labels, self.problem_type, self.shift_positions = task, num_labels, problem_type, shift_positions
        for parameter in encoder.parameters():
            parameter.requires_grad_(False)
        self.prompt = None if prompt.method == "none" else PromptBank(prompt, encoder.config)
        self.pooler_kind = self._pooler_kind(pooler)
        self.head = self._make_head(head_dropout, verbalizer_ids, length_penalty)
        self.config = transformers_config(origin.config, self.id2label, problem_type)
        if self.prompt is not None:
            self._initialise(prompt)
        for part in (self.prompt, self.head):       # not the encoder: it is in its place, or streams from the host
            if part is not None and any(t.device != encoder.device for t in (*part.parameters(), *part.buffers())):
                part.to(encoder.device)

    def _make_head(self, head_dropout: float | None, verbalizer_ids: list[int] | None,
                   length_penalty: float) -> SequenceClassificationHead | TokenClassificationHead | ClozeHead:
        config = self.encoder.config
        if self.task == "cloze":
            return ClozeHead(config.vocab_size, verbalizer_ids, length_penalty)
        dropout = head_dropout_of(self.origin.config, config.hidden_dropout) if head_dropout is None else head_dropout
        size, std = config.hidden_size, config.initializer_range
        if self.task == "token-classification":
            return TokenClassificationHead(size, self.num_labels, dropout, std)
        activation = config.pooler_activation if self.pooler_kind == "trained" else None
        return SequenceClassificationHead(size, self.num_labels, dropout, std, activation, config.pooler_dropout)

    def _pooler_kind(self, wanted: str) -> str:
        if wanted not in ("auto", "frozen", "trained"):
            raise ConfigError(f"pooler {wanted!r} does not exist; choose 'auto', 'frozen' or 'trained'.")
        if wanted == "frozen" and self.encoder.pooler is None:
            raise ConfigError(f"pooler='frozen' needs a pretrained pooler, but {self.origin.location} has none; "
                              "use pooler='trained'.")
        if wanted == "auto":
            return "trained" if self.encoder.pooler is None else "frozen"
        return wanted

    def _initialise(self, prompt: PromptConfig) -> None:
        assert self.prompt is not None
        if prompt.init == "tokens":
            self.prompt.init_from_tokens(self.encoder)
        elif prompt.init not in ("normal", "zero"):
            from ptv2_engine.adapter import load_prompt_into

            load_prompt_into(self.prompt, prompt.init)

    @classmethod
    def from_pretrained(cls, source: str | Path | nn.Module, *, task: str = "sequence-classification",
                        num_labels: int | None = None, prompt: PromptConfig | None = None,
                        id2label: dict[int, str] | None = None, dtype: torch.dtype | str | None = None,
                        device: str | torch.device = "cpu", memory: str = "exact", frozen_dtype: str | None = None,
                        stream_weights: str | None = None, **options: Any) -> PromptedModel:
        """A frozen backbone with a fresh prompt and head.

        Arguments:
            source: hub id, local folder, or a transformers model that is already in memory.
            task: "sequence-classification", "token-classification" or "cloze" (GLM).
            num_labels, id2label, or label2id (an option): the classes; default those of the checkpoint's config, as in
                transformers.
            prompt: PromptConfig; default 20 rows in every layer. dtype: of the backbone, default the checkpoint's.
            memory: what layers keep for backward, "exact", "lean" or "minimal" (encoder/layer.py). frozen_dtype: "bf16", "int8",
                "fp8" or "nf4" for the layers' matrices. stream_weights: "host" or "file", where those stay (load_encoder).
            options: label2id, pooler ("auto", "frozen", "trained"), problem_type, shift_positions, head_dropout; for cloze
                verbalizer_ids (a token for each class) and length_penalty.
        Returns:
            The model in evaluation mode, as in transformers: call train() before a loop of your own.
        Raises:
            ConfigError, WeightError, CheckpointError, OutOfMemory.
        """
        try:
            encoder, origin = load_encoder(source, dtype=dtype, device=device, frozen_dtype=frozen_dtype,
                                           stream_weights=stream_weights)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"the frozen weights do not fit into {device} ({str(error).split('. ')[0]}); use "
                              "dtype=torch.bfloat16, frozen_dtype='int8' or 'nf4', or stream_weights='host' (ptv2 memory plans "
                              "it).") from error
        encoder.set_memory(memory)
        model = cls(encoder, origin, prompt or PromptConfig(), task=task, num_labels=num_labels, id2label=id2label, **options)
        return model.eval()

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype

    @property
    def label2id(self) -> dict[str, int]:
        return {name: i for i, name in self.id2label.items()}

    def max_length(self) -> int:
        """The longest sequence the position table holds beside the prompt."""
        prompt_length = 0 if self.prompt is None else self.prompt_config.prompt_length
        config, shallow = self.encoder.config, self.prompt_config.method == "shallow"
        return config.max_length(prompt_length, self.shift_positions and config.shifts_positions or shallow)

    def set_backbone_dtype(self, dtype: torch.dtype) -> None:
        """Cast the frozen weights once (bf16 training); prompt and head stay fp32. Codes stay as they are. Raises ConfigError for
        streamed weights of another dtype."""
        stream = self.encoder.stream
        if stream is not None and stream.plain_dtype not in (None, dtype):
            raise ConfigError(f"streamed weights lie in host memory or in their file as {_name(stream.plain_dtype)} and cannot "
                              f"be cast now; load the model with dtype={dtype} (--dtype {_name(dtype)}).")
        self.encoder.to(dtype)

    def set_hidden_dropout(self, p: float) -> None:
        """Backbone's hidden dropout, prompt dropout and head dropout at once: the published --hidden_dropout_prob."""
        self.encoder.hidden_dropout = self.prompt_config.prompt_dropout = p
        if not isinstance(self.head, ClozeHead):
            self.head.dropout.p = p

    def set_memory(self, policy: str) -> None:
        """What layers keep for backward: "exact", "lean" or "minimal" (encoder/layer.py). Raises ConfigError."""
        self.encoder.set_memory(policy)

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """transformers' name for memory policy "minimal": layers are computed again in backward. The prefix keeps its
        gradient."""
        if self.encoder.memory != "minimal":
            self._memory_before = self.encoder.memory
            self.set_memory("minimal")

    def gradient_checkpointing_disable(self) -> None:
        self.set_memory(getattr(self, "_memory_before", "exact"))

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def print_trainable_parameters(self) -> str:
        """One line: trained parameters, backbone parameters, their ratio. Returns it too."""
        trained = sum(p.numel() for p in self.trained_parameters().values())
        backbone = self.encoder.num_parameters()
        line = f"trained parameters: {trained:,} ({100 * trained / backbone:.3f} % of the backbone's {backbone:,})"
        print(line)
        return line

    def packed_batch(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
                     prompt_ids: Tensor | None = None, seq_lengths: Tensor | None = None,
                     max_seqlen: int | None = None) -> PackedBatch:
        """Pack padded ids [B, S], or wrap ids [T] that come packed with seq_lengths [B]. Raises InputError."""
        uncounted = self.encoder.config.uncounted_id
        if seq_lengths is not None:
            return from_packed(input_ids, seq_lengths, token_type_ids, prompt_ids, max_seqlen=max_seqlen, uncounted_id=uncounted)
        return pack(input_ids, attention_mask, token_type_ids, prompt_ids, uncounted_id=uncounted)

    def hidden_states(self, batch: PackedBatch, seed: Tensor | None = None, first_tokens_only: bool = False,
                      output_rows_R: Tensor | None = None) -> Tensor:
        """x_TH [T, H] of the prompted encoder, [B, H] of the first tokens, or [R, H] of some."""
        rows: dict[str, Any] = {"seed": seed, "first_tokens_only": first_tokens_only, "output_rows_R": output_rows_R}
        if batch.prompt_ids is not None and readable(batch.prompt_ids) and batch.prompt_ids.numel():
            low, high = int(batch.prompt_ids.min()), int(batch.prompt_ids.max())
            if low < 0 or high >= self.prompt_config.num_prompts:
                raise InputError(f"prompt id {low if low < 0 else high} is outside the bank of {self.prompt_config.num_prompts} "
                                 "prompts; set num_prompts in PromptConfig.")
        if self.prompt is None:
            return self.encoder(batch, **rows)
        if self.prompt_config.method == "shallow":
            return self.encoder(batch, input_prompt_KPE=self.prompt.rows(), prompt_lengths=self.prompt.prompt_lengths,
                                **rows)
        return self.encoder(batch, self.prompt.materialise(self.dtype), shift_positions=self.shift_positions, **rows)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                token_type_ids: Tensor | None = None, labels: Tensor | None = None, *, prompt_ids: Tensor | None = None,
                seq_lengths: Tensor | None = None, max_seqlen: int | None = None, causal_from: Tensor | None = None,
                position_ids: Tensor | None = None, candidate_ids: Tensor | None = None, target_ids: Tensor | None = None,
                num_items_in_batch: int | Tensor | None = None, seed: Tensor | None = None, return_dict: bool = True) -> Any:
        """transformers' forward.

        Arguments:
            input_ids: [B, S] with attention_mask and token_type_ids [B, S], or packed [T] with seq_lengths [B] (and
                max_seqlen, an int that spares a read-back from the GPU).
            labels: [B] classes or values, [B, C] multi-label; [B, S] for token classification with -100 ignored.
            prompt_ids: [B], each sequence's prompt in the bank. seed: int64 tensor [1] that fixes
                the deep prompt's and the backbone's dropout masks.
            causal_from [B], position_ids [B, 2, S] or [2, T]: GLM's part B (see packing.with_parts). Cloze over candidates:
                candidate_ids and target_ids, [B, S] or [T]; tasks.cloze makes all four.
        Returns:
            SequenceClassifierOutput (logits [B, C]; cloze: over verbalizers or candidates) or TokenClassifierOutput (logits
            [B, S, C], zero where padded); a tuple (loss, logits) with return_dict=False.
        """
        if input_ids is None:
            raise InputError("input_ids is missing; pass the tokenizer's output (inputs_embeds is not taken).")
        batch = self.packed_batch(input_ids, attention_mask, token_type_ids, prompt_ids, seq_lengths, max_seqlen)
        if causal_from is not None or position_ids is not None:
            if self.encoder.config.family not in CLOZE_FAMILIES:
                raise InputError(f"causal_from and position_ids are GLM's, but this backbone is {self.encoder.config.family}; "
                                 "leave them out.")
            batch = with_parts(batch, causal_from, position_ids, candidate_ids)
        if isinstance(self.head, ClozeHead):
            scores = logits = self._cloze_scores(self.head, batch, target_ids, candidate_ids, seed)
        elif self.task == "token-classification":
            scores = self.head(self.hidden_states(batch, seed))
            logits, labels = unpack(scores, batch), self._packed_labels(labels, batch)
        else:
            first_BH = self.hidden_states(batch, seed, first_tokens_only=True)
            scores = logits = self.head(self.encoder.pool(first_BH) if self.pooler_kind == "frozen" else first_BH)
        # A batch of rows with one candidate each is a choice too, and no regression
        problem_type = "single_label_classification" if self.task == "cloze" else self.problem_type
        loss = None if labels is None else classification_loss(scores, labels, problem_type, num_items_in_batch)
        if not return_dict:
            return (logits,) if loss is None else (loss, logits)
        from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

        output = TokenClassifierOutput if self.task == "token-classification" else SequenceClassifierOutput
        return output(loss=loss, logits=logits)

    def _cloze_scores(self, head: ClozeHead, batch: PackedBatch, target_ids: Tensor | None, candidate_ids: Tensor | None,
                      seed: Tensor | None) -> Tensor:
        """fp32 [B, C]; the last layer and the vocabulary are computed for the rows that predict something only."""
        word_VH = self.encoder.embeddings.word
        if target_ids is None:
            return head.verbalize(self.hidden_states(batch, seed, output_rows_R=head.sop_rows(batch)), word_VH)
        rows_R, targets_R = head.target_rows(target_ids, batch)
        h_RH = self.hidden_states(batch, seed, output_rows_R=rows_R)
        return head.score(h_RH, word_VH, rows_R, targets_R, candidate_ids, batch)

    def _packed_labels(self, labels: Tensor | None, batch: PackedBatch) -> Tensor | None:
        if labels is None or labels.dim() == 1:
            return labels
        if labels.shape != batch.shape:
            raise InputError(f"labels are {tuple(labels.shape)}, but the batch is {batch.shape}; "
                             "pad them with -100 to one label a token.")
        return labels.flatten()[batch.grid_T]

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write the adapter (prompt, head, what they belong to), kilobytes, atomically. Raises OutputError."""
        from ptv2_engine.adapter import save

        save(self, folder)

    def save_peft(self, folder: str | Path) -> None:
        """Write a plain PEFT PREFIX_TUNING adapter. Raises AdapterError when PEFT cannot express this prompt."""
        from ptv2_engine.adapter import save

        save(self, folder, peft_only=True)

    @classmethod
    def from_adapter(cls, folder: str | Path, *, backbone: str | Path | nn.Module | None = None,
                     **placement: Any) -> PromptedModel:
        """Load an adapter and the backbone it names, or `backbone`. placement: dtype, device, memory, stream_weights, and
        frozen_dtype, which the adapter remembers (None: the checkpoint's own weights). Raises AdapterError, AdapterMismatch,
        CheckpointError, ConfigError."""
        from ptv2_engine.adapter import load

        memory = placement.pop("memory", "exact")
        model = load(cls, folder, backbone, placement)
        model.set_memory(memory)
        return model

    @classmethod
    def from_peft(cls, folder: str | Path, base: str | Path | nn.Module | None = None, **options: Any) -> PromptedModel:
        """Load a PEFT PREFIX_TUNING adapter for sequence or token classification on `base`."""
        from ptv2_engine.adapter_import import from_peft

        return from_peft(cls, folder, base, **options)

    @classmethod
    def from_thudm(cls, file: str | Path, base: str | Path | nn.Module, **options: Any) -> PromptedModel:
        """Load a checkpoint of the published P-Tuning v2 code (pytorch_model.bin, read with weights_only) on `base`."""
        from ptv2_engine.adapter_import import from_thudm

        return from_thudm(cls, file, base, **options)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_cloze(encoder: Encoder, prompt: PromptConfig, verbalizer_ids: list[int] | None, num_labels: int | None,
                 id2label: dict[int, str] | None) -> None:
    """Raises ConfigError for a cloze model that cannot be or has nothing to train."""
    family = encoder.config.family
    if family not in CLOZE_FAMILIES:
        raise ConfigError(f"task 'cloze' needs a backbone with a language-model head that this stack loads "
                          f"({', '.join(CLOZE_FAMILIES)}), but this one is {family}; use task='sequence-classification'.")
    if prompt.method == "none":
        raise ConfigError("task 'cloze' with method='none' has nothing to train: its head is the frozen language model; use "
                          "method='deep' or 'shallow'.")
    classes = num_labels if num_labels is not None else None if id2label is None else len(id2label)
    if verbalizer_ids is not None and classes is not None and classes != len(verbalizer_ids):
        raise ConfigError(f"{len(verbalizer_ids)} verbalizer_ids do not fit {classes} labels; pass one token for each label.")
