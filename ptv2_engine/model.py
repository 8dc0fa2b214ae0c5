"""PromptedModel: a frozen encoder, a trainable prompt and a small head, with the signature and outputs of transformers.

The only place where encoder, prompt and head meet. Exactly the prompt's and the head's parameters require grad, and those that
trained_backbone names.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptv2_engine.cloze import ClozeHead
from ptv2_engine.encoder import Encoder, Origin, check_trained, load_encoder
from ptv2_engine.errors import ConfigError, InputError, OutOfMemory
from ptv2_engine.heads import SequenceClassificationHead, TokenClassificationHead, make_head
from ptv2_engine.hf_config import head_dropout_of, label_names, transformers_config
from ptv2_engine.masked_lm import CLOZE_FAMILIES, masked_lm_for
from ptv2_engine.ops import readable
from ptv2_engine.outputs import Scored, Targets, as_output, score
from ptv2_engine.packing import PackedBatch, flat_choices, from_packed, pack, with_parts
from ptv2_engine.prompt import PromptBank, PromptConfig

TASKS = ("sequence-classification", "token-classification", "question-answering", "multiple-choice", "cloze")
OF_TOKENS = ("token-classification", "question-answering")        # tasks whose head reads every token, and no pooler
OUTPUTS = {"question-answering": 2, "multiple-choice": 1}         # heads whose size is not the number of classes


class PromptedModel(nn.Module):
    """Made by from_pretrained, from_adapter, from_peft or from_thudm."""

    main_input_name = "input_ids"
    accepts_loss_kwargs = True           # transformers.Trainer then passes num_items_in_batch

    def __init__(self, encoder: Encoder, origin: Origin, prompt: PromptConfig, *, task: str = "sequence-classification",
                 num_labels: int | None = None, id2label: dict[int, str] | None = None, label2id: dict[str, int] | None = None,
                 pooler: str = "auto", problem_type: str | None = None, shift_positions: bool = True,
                 head_dropout: float | None = None, verbalizer_ids: list[int] | None = None,
                 length_penalty: float = 0.0, mix_loss: bool = False, masked_lm: nn.Module | None = None,
                 trained_backbone: str | None = None) -> None:
        super().__init__()
        if task not in TASKS:
            raise ConfigError(f"task {task!r} does not exist; choose one of {', '.join(TASKS)}.")
        if task in OUTPUTS:
            if num_labels not in (None, OUTPUTS[task]):
                raise ConfigError(f"num_labels {num_labels} does not fit task {task!r}, whose head has {OUTPUTS[task]} outputs; "
                                  "leave it out.")
            num_labels, id2label, label2id = OUTPUTS[task], {i: f"LABEL_{i}" for i in range(OUTPUTS[task])}, None
        if task == "cloze":
            _check_cloze(encoder, prompt, verbalizer_ids, num_labels, id2label, trained_backbone, masked_lm)
            num_labels = len(verbalizer_ids) if verbalizer_ids and id2label is None and label2id is None else num_labels
        self.id2label = label_names(origin.config, num_labels, id2label, label2id)
        num_labels = len(self.id2label)
        prompt = replace(prompt)      # a copy: the caller may build several models from one PromptConfig
        self.encoder, self.origin, self.prompt_config = encoder, origin, prompt
        self.task, self.num_labels, self.problem_type, self.shift_positions = task, num_labels, problem_type, shift_positions
        encoder.train_backbone(trained_backbone)
        self.prompt = None if prompt.method == "none" else PromptBank(prompt, encoder.config)
        self.pooler_kind = self._pooler_kind(pooler)
        if encoder.pooler is not None and (self.pooler_kind != "frozen" or task == "cloze" or task in OF_TOKENS):
            encoder.pooler.requires_grad_(False)           # not read
        dropout = head_dropout_of(origin.config, encoder.config.hidden_dropout) if head_dropout is None else head_dropout
        self.head = ClozeHead(encoder.config.vocab_size, verbalizer_ids, length_penalty, mix_loss, masked_lm) if (
            task == "cloze") else make_head(task, encoder.config, num_labels, dropout, self.pooler_kind == "trained")
        self.config = transformers_config(origin.config, self.id2label, problem_type)
        if self.prompt is not None:
            self._initialise(prompt)
        for part in (self.prompt, self.head):       # not the encoder: it is in its place, or streams from the host
            if part is not None and any(t.device != encoder.device for t in (*part.parameters(), *part.buffers())):
                part.to(encoder.device)

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
            task: one of TASKS: "sequence-classification", "token-classification", "question-answering", "multiple-choice" or
                "cloze" (the frozen language model fills a blank).
            num_labels, id2label, or label2id (an option): the classes; default those of the checkpoint's config, as in
                transformers.
            prompt: PromptConfig; default 20 rows in every layer. dtype: of the backbone, default the checkpoint's.
            memory: what layers keep for backward, "exact", "lean" or "minimal" (encoder/layer.py). frozen_dtype: "bf16", "int8",
                "fp8" or "nf4" for the layers' matrices. stream_weights: "host" or "file", where those stay (load_encoder).
            options: label2id, pooler ("auto", "frozen", "trained"), problem_type, shift_positions, head_dropout; for cloze
                verbalizer_ids (a token for each class), length_penalty, mix_loss. trained_backbone: "all" (fine-tuning) or "bias"
                (BitFit) trains the backbone too, in plain PyTorch and fp32 (encoder/stack.py).
        Returns:
            The model in evaluation mode, as in transformers: call train() before a loop of your own.
        Raises:
            ConfigError, WeightError, CheckpointError, OutOfMemory.
        """
        try:
            encoder, origin = load_encoder(source, dtype=dtype, device=device, frozen_dtype=frozen_dtype,
                                           stream_weights=stream_weights, trained_backbone=options.get("trained_backbone"))
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"the frozen weights do not fit into {device} ({str(error).split('. ')[0]}); use "
                              "dtype=torch.bfloat16, frozen_dtype='int8' or 'nf4', or stream_weights='host' (ptv2 memory plans "
                              "it).") from error
        encoder.set_memory(memory)
        if task == "cloze" and "masked_lm" not in options:
            options["masked_lm"] = masked_lm_for(encoder, source)
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
        check_trained(self.encoder.trained_backbone, dtype=dtype)
        stream = self.encoder.stream
        if stream is not None and stream.plain_dtype not in (None, dtype):
            raise ConfigError(f"streamed weights lie in host memory or in their file as {_name(stream.plain_dtype)} and cannot "
                              f"be cast now; load the model with dtype={dtype} (--dtype {_name(dtype)}).")
        self.encoder.to(dtype)

    def set_hidden_dropout(self, p: float) -> None:
        """Backbone's hidden dropout, prompt dropout and head dropout at once: the published --hidden_dropout_prob."""
        self.encoder.hidden_dropout = self.prompt_config.prompt_dropout = p
        if isinstance(self.head, (SequenceClassificationHead, TokenClassificationHead)):
            self.head.dropout_p = p

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of what trains: looking for gradients in the frozen layers would take longer than some steps do on a GPU's host."""
        frozen = self.encoder.trained_backbone is None
        for part in (self.prompt, self.head) if frozen else (self.prompt, self.head, self.encoder):
            if part is not None:
                part.zero_grad(set_to_none)

    def print_trainable_parameters(self) -> str:
        """One line: trained parameters, backbone parameters, their ratio. Returns it too."""
        trained = sum(p.numel() for p in self.trained_parameters().values())
        backbone = self.encoder.num_parameters()
        line = f"trained parameters: {trained:,} ({100 * trained / backbone:.3f} % of the backbone's {backbone:,})"
        print(line)
        return line

    def packed_batch(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
                     prompt_ids: Tensor | None = None, seq_lengths: Tensor | None = None,
                     max_seqlen: int | None = None, spare_tokens: bool = False) -> PackedBatch:
        """Pack padded ids [B, S], or wrap ids [T] that come packed with seq_lengths [B]. Raises InputError."""
        uncounted = self.encoder.config.uncounted_id
        if seq_lengths is not None:
            return from_packed(input_ids, seq_lengths, token_type_ids, prompt_ids, max_seqlen=max_seqlen,
                               uncounted_id=uncounted, spare_tokens=spare_tokens)
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
                start_positions: Tensor | None = None, end_positions: Tensor | None = None, choice_counts: Tensor | None = None,
                max_choices: int | None = None, mask_positions: Tensor | None = None,
                num_items_in_batch: int | Tensor | None = None, seed: Tensor | None = None, spare_tokens: bool = False,
                return_dict: bool = True) -> Any:
        """transformers' forward.

        Arguments:
            input_ids: [B, S] with attention_mask and token_type_ids [B, S], or packed [T] with seq_lengths [B] (and
                max_seqlen, an int that spares a read-back from the GPU; with spare_tokens more tokens than the sequences have
                may stand there, which are padding). Multiple choice: [B, C, S], or choice_counts [B] of the
                sequences that are choices of one example (and max_choices, the largest).
            labels: [B] classes or values, [B, C] multi-label; [B, S] for token classification with -100 ignored;
                [B] the right choice. start_positions, end_positions: [B] tokens of the answer, for question answering.
            prompt_ids: [B], each sequence's prompt in the bank. seed: int64 tensor [1] that fixes
                every dropout mask; None: drawn from torch's CPU generator where the model trains.
            causal_from [B], position_ids [B, 2, S] or [2, T]: GLM's part B (see packing.with_parts). Cloze over candidates:
                candidate_ids and target_ids, [B, S] or [T]; tasks.cloze makes all four. mask_positions [B]: the blank of a masked
                language model, an index in its sequence.
        Returns:
            SequenceClassifierOutput (logits [B, C]; cloze: over verbalizers or candidates), TokenClassifierOutput (logits
            [B, S, C], zero where padded), QuestionAnsweringModelOutput (start_logits, end_logits [B, S], -10000 where padded) or
            MultipleChoiceModelOutput (logits [B, C]); a tuple (loss, logits) with return_dict=False.
        """
        if input_ids is None:
            raise InputError("input_ids is missing; pass the tokenizer's output (inputs_embeds is not taken).")
        if self.task == "multiple-choice" and input_ids.dim() == 3:            # transformers' layout: [B, C, S]
            prompt_ids = None if prompt_ids is None else prompt_ids.repeat_interleave(input_ids.shape[1])
            choice_counts, input_ids, attention_mask, token_type_ids = flat_choices(input_ids, attention_mask, token_type_ids)
        batch = self.packed_batch(input_ids, attention_mask, token_type_ids, prompt_ids, seq_lengths, max_seqlen, spare_tokens)
        if causal_from is not None or position_ids is not None:
            if self.encoder.config.family not in CLOZE_FAMILIES:
                raise InputError(f"causal_from and position_ids are GLM's, but this backbone is {self.encoder.config.family}; "
                                 "leave them out.")
            batch = with_parts(batch, causal_from, position_ids, candidate_ids)
        if seed is None and self.training:
            seed = self.encoder.drawn_seed()                   # one for the whole step
        if isinstance(self.head, ClozeHead):
            scores = self._cloze_scores(self.head, batch, target_ids, candidate_ids, mask_positions, seed)
        else:
            x = self.hidden_states(batch, seed, first_tokens_only=self.task not in OF_TOKENS)
            scores = self._head_scores(x, seed)
        scored = score(self.task, scores, batch, Targets(labels, start_positions, end_positions), problem_type=self.problem_type,
                       num_items=num_items_in_batch, choice_counts=choice_counts, max_choices=max_choices,
                       mix_loss=isinstance(self.head, ClozeHead) and self.head.mix_loss)
        return as_output(self.task, scored, return_dict)

    def _head_scores(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        """The head's scores of tokens [T, H] or first tokens [B, H]."""
        pooled = self.encoder.pool(x) if self.task not in OF_TOKENS and self.pooler_kind == "frozen" else x
        return self.head(pooled, seed, self.encoder.num_sites())

    def score_hidden(self, x_TH: Tensor, batch: PackedBatch, targets: Targets, **choices: Any) -> Scored:
        """Logits and loss of hidden states that are computed already, of all tokens. choices: outputs.score's."""
        x = x_TH if self.task in OF_TOKENS else x_TH[batch.rows_at(0)]
        return score(self.task, self._head_scores(x), batch, targets, problem_type=self.problem_type, **choices)

    def _cloze_scores(self, head: ClozeHead, batch: PackedBatch, target_ids: Tensor | None, candidate_ids: Tensor | None,
                      mask_positions: Tensor | None, seed: Tensor | None) -> Tensor:
        """fp32 [B, C]; the last layer and the vocabulary are computed for the rows that predict something only."""
        word_VH = self.encoder.embeddings.word
        if target_ids is None:
            return head.verbalize(self.hidden_states(batch, seed, output_rows_R=head.blank_rows(batch, mask_positions)), word_VH)
        rows_R, targets_R = head.target_rows(target_ids, batch)
        h_RH = self.hidden_states(batch, seed, output_rows_R=rows_R)
        return head.score(h_RH, word_VH, rows_R, targets_R, candidate_ids, batch)

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
                 id2label: dict[int, str] | None, trained_backbone: str | None, masked_lm: nn.Module | None) -> None:
    """Raises ConfigError for a cloze model that cannot be or has nothing to train."""
    family = encoder.config.family
    if family not in CLOZE_FAMILIES and masked_lm is None:
        raise ConfigError(f"task 'cloze' on a {family} backbone needs its masked-language-model head; pass masked_lm "
                          "(load_masked_lm_head), or use task='sequence-classification'.")
    if prompt.method == "none" and trained_backbone is None:
        raise ConfigError("task 'cloze' with method='none' has nothing to train: its head is the frozen language model; use "
                          "method='deep' or 'shallow'.")
    classes = num_labels if num_labels is not None else None if id2label is None else len(id2label)
    if verbalizer_ids is not None and classes is not None and classes != len(verbalizer_ids):
        raise ConfigError(f"{len(verbalizer_ids)} verbalizer_ids do not fit {classes} labels; pass one token for each label.")
