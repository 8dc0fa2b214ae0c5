"""LoRA (arXiv 2106.09685) as an outside reference: transformers' model under PEFT, fed with the same packed batches.

Nothing of the engine computes here: a batch is padded again, transformers runs, and its scores take the engine's layout and loss,
so that the same loop, Trainer and metrics compare LoRA with prompts. What lies around the backbone (pooler of DeBERTa, head of
ModernBERT, classifier) trains in full, as transformers made it.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptv2_engine.adapter import CONFIG, TENSORS, read_config, read_tensors, replace_file
from ptv2_engine.encoder import EncoderConfig
from ptv2_engine.encoder.weights import family_of
from ptv2_engine.errors import AdapterError, ConfigError, InputError, OutputError
from ptv2_engine.hf_config import label_names
from ptv2_engine.model import OUTPUTS
from ptv2_engine.outputs import Targets, as_output, score
from ptv2_engine.packing import flat_choices, from_packed, pack, unpack

# task -> (transformers' class, PEFT's task type)
TASKS = {"sequence-classification": ("AutoModelForSequenceClassification", "SEQ_CLS"),
         "token-classification": ("AutoModelForTokenClassification", "TOKEN_CLS"),
         "question-answering": ("AutoModelForQuestionAnswering", "QUESTION_ANS"),
         "multiple-choice": ("AutoModelForMultipleChoice", None)}
# Queries and values, as LoRA's paper chose; where they are one matrix with the keys, that matrix.
TARGETS = {**dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), ("query", "value")),
           "deberta": ("in_proj",), "deberta-v2": ("query_proj", "value_proj"), "modernbert": ("Wqkv",)}
_OWN = "ptv2_lora"         # the section of adapter_config.json that PEFT does not read


@contextlib.contextmanager
def _held_report() -> Iterator[list[logging.LogRecord]]:
    """transformers' report on loading is kept in a list; what is left of that when the block ends is logged."""
    logger, held = logging.getLogger("transformers.modeling_utils"), list[logging.LogRecord]()

    def passes(record: logging.LogRecord) -> bool:
        if is_report := "LOAD REPORT" in record.getMessage():
            held.append(record)
        return not is_report

    logger.addFilter(passes)
    try:
        yield held
    finally:
        logger.removeFilter(passes)
        for record in held:
            logger.handle(record)


class _Backbone(NamedTuple):
    """What Trainer asks of a model's encoder."""

    config: EncoderConfig
    stream: None = None


class LoraModel(nn.Module):
    """Made by make_lora_model and load_lora_model. Its forward takes PackedCollator's batches, or padded ones."""

    main_input_name = "input_ids"
    accepts_loss_kwargs = True           # transformers.Trainer then passes num_items_in_batch
    is_outside = True                    # no PromptedModel, but Trainer trains it as it is

    def __init__(self, peft: Any, task: str, id2label: dict[int, str], problem_type: str | None) -> None:
        super().__init__()
        self.peft, self.task, self.id2label, self.problem_type = peft, task, id2label, problem_type
        self.num_labels = len(id2label)
        base = peft.get_base_model()
        self.config = base.config
        config = base.config.to_dict()
        self.encoder = _Backbone(family_of(config).read_config(config))
        self._takes_types = "token_type_ids" in inspect.signature(base.forward).parameters

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def max_length(self) -> int:
        """The longest sequence the position table holds."""
        return self.encoder.config.max_length()

    def set_backbone_dtype(self, dtype: torch.dtype) -> None:
        """Raises ConfigError for anything but float32, in which this reference trains."""
        if dtype != torch.float32:
            raise ConfigError(f"LoRA through PEFT trains in float32 here, not in {dtype}; leave --bf16 and --dtype out.")

    def set_hidden_dropout(self, p: float) -> None:
        """Backbone's hidden dropout and head dropout at once; attention's and LoRA's stay."""
        for name, part in self.peft.named_modules():
            if isinstance(part, nn.Dropout) and ".self." not in name and "lora_" not in name:
                part.p = p

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Compute layers again in backward."""
        self.peft.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def print_trainable_parameters(self) -> str:
        """One line: trained parameters, all parameters, their ratio. Returns it too."""
        trained, every = (sum(p.numel() for p in some) for some in (self.trained_parameters().values(), self.parameters()))
        line = f"trained parameters: {trained:,} ({100 * trained / every:.3f} % of {every:,})"
        print(line)
        return line

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
                labels: Tensor | None = None, *, seq_lengths: Tensor | None = None, max_seqlen: int | None = None,
                start_positions: Tensor | None = None, end_positions: Tensor | None = None, choice_counts: Tensor | None = None,
                max_choices: int | None = None, num_items_in_batch: int | Tensor | None = None, return_dict: bool = True) -> Any:
        """PromptedModel.forward without prompts: the same arguments, shapes, outputs and loss."""
        if input_ids is None:
            raise InputError("input_ids is missing; pass the tokenizer's output (inputs_embeds is not taken).")
        ids: Tensor = input_ids
        if self.task == "multiple-choice" and ids.dim() == 3:                  # transformers' layout: [B, C, S]
            choice_counts, ids, attention_mask, token_type_ids = flat_choices(ids, attention_mask, token_type_ids)
        if seq_lengths is not None:
            batch = from_packed(ids, seq_lengths, token_type_ids, max_seqlen=max_seqlen)
        else:
            batch = pack(ids, attention_mask, token_type_ids)
        padded = {"input_ids": unpack(batch.input_ids_T, batch, fill=self.encoder.config.pad_token_id),
                  "attention_mask": unpack(torch.ones_like(batch.input_ids_T), batch)}
        if batch.token_type_ids_T is not None and self._takes_types:
            padded["token_type_ids"] = unpack(batch.token_type_ids_T, batch)
        if self.task == "multiple-choice":                     # all choices as one example's: their scores do not depend on it
            padded = {name: t[None] for name, t in padded.items()}
        out = self.peft(**padded)
        if self.task == "question-answering":
            scores = torch.stack((out.start_logits, out.end_logits), -1).flatten(0, 1)[batch.grid_T]
        elif self.task == "token-classification":
            scores = out.logits.flatten(0, 1)[batch.grid_T]
        else:
            scores = out.logits.view(-1, 1) if self.task == "multiple-choice" else out.logits
        scored = score(self.task, scores.float(), batch, Targets(labels, start_positions, end_positions),
                       problem_type=self.problem_type, num_items=num_items_in_batch, choice_counts=choice_counts,
                       max_choices=max_choices)
        return as_output(self.task, scored, return_dict)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write PEFT's adapter, which PeftModel.from_pretrained loads too, and beside its settings ours. Raises OutputError."""
        folder = Path(folder)
        try:
            self.peft.save_pretrained(str(folder), save_embedding_layers=False)
            config = json.loads((folder / CONFIG).read_text())
            config[_OWN] = {"task": self.task, "id2label": self.id2label, "problem_type": self.problem_type}
            replace_file(folder / CONFIG, json.dumps(config, indent=2).encode())
        except OSError as error:
            raise OutputError(f"cannot write the adapter to {folder} ({error.strerror or error}); "
                              "choose a folder you may write to, with free space.") from error

    def load_adapter(self, folder: str | Path) -> None:
        """Copy a saved adapter's tensors into this model. Raises AdapterError where they are another model's."""
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        tensors, _ = read_tensors(Path(folder) / TENSORS)
        own = get_peft_model_state_dict(self.peft, save_embedding_layers=False)
        wrong = sorted(n for n in set(own) | set(tensors) if n not in own or n not in tensors or own[n].shape != tensors[n].shape)
        if wrong:
            raise AdapterError(f"{folder} does not fit this LoRA model: {wrong[0]} is missing, unknown or of another shape; use "
                               "the backbone, task, labels, rank and target modules it was trained with.")
        set_peft_model_state_dict(self.peft, tensors)


def make_lora_model(source: str | Path, task: str = "sequence-classification", num_labels: int | None = None,
                    id2label: dict[int, str] | None = None, *, rank: int = 8, alpha: int = 16, dropout: float = 0.1,
                    target_modules: list[str] | None = None, problem_type: str | None = None,
                    device: str | torch.device = "cpu") -> LoraModel:
    """transformers' model for a task, in fp32, under PEFT's LoRA.

    Arguments:
        source: hub id or local folder. task: one of TASKS. num_labels, id2label: the classes, as PromptedModel's.
        rank, alpha, dropout: LoRA's; the update is alpha / rank * B A. target_modules: names of linear layers, default TARGETS.
    Returns:
        The model in evaluation mode; LoRA's matrices and the head require grad.
    Raises:
        ConfigError: a task or family without such a model, a missing checkpoint.
    """
    import peft
    import transformers

    if rank < 1:
        raise ConfigError(f"lora_rank {rank} is below 1; use 1 or more.")
    if task not in TASKS:
        raise ConfigError(f"method 'lora' has no task {task!r}; choose one of {', '.join(TASKS)}.")
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} has no config that transformers reads; pass a hub id or the folder of a checkpoint "
                          f"({str(error).splitlines()[0]}).") from error
    if config.model_type not in TARGETS:
        raise ConfigError(f"method 'lora' has no {config.model_type} backbone; choose one of {', '.join(TARGETS)}.")
    class_name, task_type = TASKS[task]
    if task in OUTPUTS:
        num_labels, id2label = OUTPUTS[task], {i: f"LABEL_{i}" for i in range(OUTPUTS[task])}
    labels = label_names(config.to_dict(), num_labels, id2label, None)
    try:
        with _held_report() as reports:
            model, found = getattr(transformers, class_name).from_pretrained(
                source, id2label=labels, label2id={name: i for i, name in labels.items()}, problem_type=problem_type,
                dtype=torch.float32, output_loading_info=True)
            if not any(name.startswith(f"{model.base_model_prefix}.") for name in found["missing_keys"]):
                reports.clear()                    # only the head is new, as it is to be
    except (OSError, ValueError) as error:
        raise ConfigError(f"transformers makes no {task} model of {source} ({config.model_type}); choose another task or "
                          f"backbone ({str(error).splitlines()[0]}).") from error
    heads = [name for name, part in model.named_children() if name != model.base_model_prefix and [*part.parameters()]]
    targets = list(target_modules or TARGETS[config.model_type])
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, modules_to_save=heads, task_type=task_type,
                               target_modules=targets)
    try:
        return LoraModel(peft.get_peft_model(model, settings), task, labels, problem_type).to(device).eval()
    except ValueError as error:
        raise ConfigError(f"PEFT cannot put LoRA of rank {rank} on {', '.join(targets)}; choose linear "
                          f"layers of the backbone ({str(error).splitlines()[0]}).") from error


def is_lora(folder: str | Path) -> bool:
    """Whether a folder is an adapter that LoraModel.save_pretrained wrote."""
    file = Path(folder) / CONFIG
    return file.is_file() and _OWN in read_config(Path(folder), {})


def load_lora_model(folder: str | Path, *, source: str | Path | None = None, device: str | torch.device = "cpu") -> LoraModel:
    """The model a folder describes, in evaluation mode; source: the backbone, where it is not where the folder says. Raises
    AdapterError, CheckpointError, ConfigError."""
    folder = Path(folder)
    config = read_config(folder, {})
    if _OWN not in config:
        raise AdapterError(f"{folder} is no LoRA adapter that this package wrote; use peft.PeftModel.from_pretrained.")
    own, plain = config[_OWN], config
    labels = {int(i): name for i, name in own["id2label"].items()}
    model = make_lora_model(source or plain["base_model_name_or_path"], own["task"], id2label=labels, rank=plain["r"],
                            alpha=plain["lora_alpha"], dropout=plain["lora_dropout"], target_modules=plain["target_modules"],
                            problem_type=own["problem_type"], device=device)
    model.load_adapter(folder)
    return model
