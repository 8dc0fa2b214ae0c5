"""Trainer: transformers.Trainer for a PromptedModel. Same arguments, callbacks, logging, early stopping and resume.

What differs: batches are packed and token-balanced, the optimizer holds prompt and head only, checkpoints are adapters,
`bf16` casts the frozen backbone once instead of running under autocast, and a loss that is not finite stops the run before
it can reach the weights.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from ptv2_engine.adapter import refill, replace_file
from ptv2_engine.batches import PackedCollator, TokenBalancedBatchSampler, sequences_of, split_inputs, without_padding
from ptv2_engine.errors import ConfigError, DataError, NonFiniteLoss, OutOfMemory, OutputError
from ptv2_engine.model import PromptedModel
from ptv2_engine.optim import add_back, parameter_groups, set_aside
from ptv2_engine.prompt import PromptConfig
from ptv2_engine.throughput import Throughput, num_tokens
from ptv2_engine.trainer_graphs import GraphedTrainer
from ptv2_engine.trainer_memory import (
    RandomState,
    check_fits,
    choose_micro_batch,
    count_labels,
    free_memory,
    is_out_of_memory,
)

_log = logging.getLogger("ptv2_engine")
_PIECES = "ptv2_pieces.json"


class Trainer(GraphedTrainer):
    """transformers.Trainer that knows what is frozen.

    Arguments beyond transformers.Trainer's:
        model: a PromptedModel, or a transformers model (bare or with a classification head) that is wrapped with `prompt`.
        prompt: PromptConfig for wrapping. task: for wrapping, default from the model's class.
        head_learning_rate: of the head, default the prompt's.
        epoch_decay: multiply the learning rate by this after every epoch, behind a warm-up if args ask for one, instead of the
            linear decay (0.95 is the published setting for tagging and question answering).
        plan_memory: plan the largest batch before training, and refuse one that does not fit.
        cuda_graphs: on a GPU replay each step as CUDA graphs (graphed.py); where that cannot be, one line of the log says why.
        auto_batch: lower per_device_train_batch_size to what fits and accumulate gradients over as many more micro-batches.
    A step that runs out of memory all the same is redone in two halves, and so are the steps after it.
    Raises:
        ConfigError, DataError (an empty data set), OutputError (an output folder that cannot be written), OutOfMemory, before
        training.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments | None = None, *, prompt: PromptConfig | None = None,
                 task: str | None = None, head_learning_rate: float | None = None, epoch_decay: float | None = None,
                 plan_memory: bool = True, auto_batch: bool = False, cuda_graphs: bool = True,
                 data_collator: Any = None, train_dataset: Any = None, eval_dataset: Any = None, **kwargs: Any) -> None:
        model = _wrapped(model, prompt, task)
        args = copy.copy(args or TrainingArguments("runs/ptv2"))
        if args.fp16:
            raise ConfigError("fp16=True asks for autocast and loss scaling, which this Trainer does not have; use bf16=True "
                              "(--bf16), or a model loaded with dtype=torch.float16.")
        if args.bf16:
            args.mixed_precision = "no"      # the frozen weights are bf16 themselves; autocast would cast the fp32 head too
            model.set_backbone_dtype(torch.bfloat16)
        self.head_learning_rate, self.epoch_decay = head_learning_rate, epoch_decay
        for name, dataset in (("training", train_dataset), ("evaluation", eval_dataset)):
            if dataset is not None and hasattr(dataset, "__len__") and len(dataset) == 0:
                raise DataError(f"the {name} data set has 0 examples; check the file and its filters.")
        check_writable(args.output_dir or ".")
        self.packs = data_collator is None
        if data_collator is None:
            data_collator = PackedCollator(vocab_size=model.encoder.config.vocab_size, max_length=model.max_length())
        stream = model.encoder.stream
        if stream is not None and stream.device.type != args.device.type:
            raise ConfigError(f"the model's weights are streamed to {stream.device}, but training runs on {args.device}; load "
                              f"the model with device={str(args.device)!r}.")
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.micro_batches = self.pieces = 1
        self._plan(model, args, train_dataset, plan_memory, auto_batch)
        args.dataloader_pin_memory = args.dataloader_pin_memory and torch.cuda.is_available()
        if args.label_names is None:
            args.label_names = label_names_of(model.task)
        super().__init__(model=model, args=args, data_collator=data_collator, train_dataset=train_dataset,
                         eval_dataset=eval_dataset, **kwargs)
        self.settle_graphs(cuda_graphs)
        if self.graphs_refused is None:
            self.args.dataloader_pin_memory = False           # batches reach the device through pinned memory of the graphs' own
        # Off, so that a loss that is not finite is seen when it is logged; on, it would also stall every step to look
        self.args.logging_nan_inf_filter = False
        self.tokens_seen = 0
        self.add_callback(Throughput(self))

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, sampler_fn: Any = None,
                        is_training: bool = False, dataloader_key: str | None = None) -> DataLoader:
        """Token-balanced batches for training on a data set whose lengths are known; transformers' loader otherwise."""
        if not (is_training and self.knows_lengths(dataset)):
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        sampler = self._sampler([sum(example) for example in _sequences(dataset)], self.args, batch_size)
        workers = self.args.dataloader_num_workers
        # A generator of its own: starting an epoch must not draw from the generator that seeds dropout
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=self._get_collator_with_removed_columns(
            self.data_collator, description), num_workers=workers, generator=torch.Generator().manual_seed(self.args.seed),
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0)
        if self.graphs_refused is None:                         # batches reach a graph's inputs from the host
            return self.accelerator.prepare_data_loader(loader, device_placement=False)
        return self.accelerator.prepare(loader)

    def _sampler(self, lengths: list[int], args: TrainingArguments, batch_size: int) -> TokenBalancedBatchSampler:
        return TokenBalancedBatchSampler(lengths, batch_size * self.micro_batches, seed=args.data_seed or args.seed,
                                         drop_last=args.dataloader_drop_last, pieces=self.micro_batches)

    def _plan(self, model: PromptedModel, args: TrainingArguments, dataset: Any, check: bool, auto_batch: bool) -> None:
        """Before the model is moved: choose the micro-batch, or refuse what does not fit. Only where lengths are known."""
        known = self.knows_lengths(dataset)
        if auto_batch and not known and dataset is not None:
            raise ConfigError("auto_batch needs to know the examples' lengths, but the data set has no length or the collator is "
                              "your own; choose per_device_train_batch_size and gradient_accumulation_steps yourself.")
        if not known or not (check or auto_batch):
            return
        examples = _sequences(dataset)
        lengths = [sum(example) for example in examples]
        if args.per_device_train_batch_size < 1:
            raise ConfigError(f"per_device_train_batch_size {args.per_device_train_batch_size} is below 1; use 1 or more.")
        if auto_batch:
            self.micro_batches = choose_micro_batch(model, args, examples)
        sampler, worst = self._sampler(lengths, args, args.per_device_train_batch_size), list[int]()
        epochs = min(3, math.ceil(args.num_train_epochs)) if len(lengths) < 50_000 else 1     # their orders differ a little
        for epoch in range(max(epochs, 1)):
            sampler.set_epoch(epoch)
            worst = max([worst, *([n for i in batch for n in examples[i]] for batch in sampler)], key=sum)
        if worst:
            self.budget = check_fits(model, worst, examples, args)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """transformers' step; where memory runs out, the same step in smaller pieces, and nothing of the failed one is kept."""
        if (loss := self.graphed_step(model, inputs, num_items_in_batch)) is not None:
            return loss
        if self.accelerator.num_processes > 1:                  # other processes would wait for the step that failed here
            return super().training_step(model, inputs, num_items_in_batch)
        parameters = [p for p in model.parameters() if p.requires_grad]
        before, tokens, random = set_aside(parameters), self.tokens_seen, RandomState(self.args.device)
        while True:
            try:
                loss = self._step_in_pieces(model, inputs, num_items_in_batch)
                add_back(parameters, before)
                return loss
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            free_memory(parameters)
            random.restore()
            self.tokens_seen = tokens
            if len(split_inputs(inputs, 2 * self.pieces)) <= self.pieces:
                raise OutOfMemory(f"not even one sequence fits into memory at step {self.state.global_step + 1} ({reason}); use "
                                  "--memory minimal, --frozen_dtype int8, --stream_weights host, or shorter sequences.")
            self.pieces *= 2
            _log.warning("step %d ran out of memory and is done again in %d pieces", self.state.global_step + 1, self.pieces)

    def _step_in_pieces(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        if self.pieces == 1:
            return super().training_step(model, dict(inputs), num_items)
        if num_items is None:             # then transformers divides each step's mean by the number of accumulated steps
            num_items = count_labels(inputs) * self.current_gradient_accumulation_steps
        parts = split_inputs(inputs, self.pieces)
        return torch.stack([super(Trainer, self).training_step(model, part, num_items) for part in parts]).sum()

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        """transformers' optimizer of args.optim (default: torch's fused AdamW) over prompt and head only."""
        if self.optimizer is None:
            model: Any = self.model
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(model, self.args.weight_decay, self.head_learning_rate)
            self.optimizer = self.graphed_optimizer(cls)(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """args.lr_scheduler_type, or with epoch_decay the published exponential decay stepped once an epoch, behind a linear
        warm-up if one is asked for."""
        if self.epoch_decay is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        steps, warmup = self._steps_an_epoch(num_training_steps), self.args.get_warmup_steps(num_training_steps)
        decay, over = self.epoch_decay, optimizer or self.optimizer
        assert over is not None
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            over, lambda step: (min(1.0, step / warmup) if warmup else 1.0) * decay ** (step // steps))
        return self.lr_scheduler

    def _steps_an_epoch(self, num_training_steps: int) -> int:
        if self.args.max_steps > 0 and hasattr(self.train_dataset, "__len__"):          # then num_train_epochs says nothing
            batches = len(self.get_train_dataloader())
            return max(-(-batches // self.args.gradient_accumulation_steps), 1)
        return max(math.ceil(num_training_steps / max(self.args.num_train_epochs, 1)), 1)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
                     num_items_in_batch: Tensor | int | None = None) -> Any:
        result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            self.tokens_seen += num_tokens(inputs)
            loss = result[0] if return_outputs else result
            # On the CPU looking at the loss is free; on a GPU it is looked at when it is logged, without stalling the step
            if loss.device.type == "cpu" and not math.isfinite(value := loss.item()):
                raise NonFiniteLoss(f"the loss is {value} at step {self.state.global_step + 1}; nothing was updated with it. "
                                    "Lower the learning rate, or look for bad labels or inputs.")
        return result

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise NonFiniteLoss(
                f"the loss became {loss} by step {self.state.global_step}; continue from the last checkpoint with a "
                "lower learning rate."
            )
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The adapter (and the tokenizer), not the model; and into how many pieces steps are cut, which a resumed run needs."""
        folder = Path(output_dir or self.args.output_dir or ".")
        self.accelerator.unwrap_model(self.model).save_pretrained(folder)
        if self.pieces > 1:
            replace_file(folder / _PIECES, json.dumps({"pieces": self.pieces}).encode())
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapter_into(self.accelerator.unwrap_model(model or self.model), resume_from_checkpoint)
        file = Path(resume_from_checkpoint) / _PIECES
        if file.is_file():
            self.pieces = int(json.loads(file.read_text())["pieces"])

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        load_adapter_into(self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint)


def label_names_of(task: str) -> list[str]:
    """A batch's keys that hold what the model is to say."""
    return ["start_positions", "end_positions"] if task == "question-answering" else ["labels"]


def load_adapter_into(model: Any, folder: str | Path) -> None:
    """Copy a saved adapter's prompt and head into a model of the same configuration. Raises AdapterError."""
    if not isinstance(model, PromptedModel):                # an outside reference
        model.load_adapter(folder)
        return
    refill(model, Path(folder))


def check_writable(folder: str | Path) -> None:
    """Create the folder and try to write into it. Raises OutputError."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".ptv2-write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"output folder {folder} cannot be written ({error.strerror}); choose another --output_dir.") from error


def _sequences(dataset: Any) -> list[list[int]]:
    """Tokens of each example's sequences (several for multiple choice), read column-wise where the data set allows it."""
    names = ("input_ids", "attention_mask")
    try:
        columns = {name: dataset[name] for name in names if name in dataset.column_names}
        rows: Iterable[dict[str, Any]] = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    except (AttributeError, TypeError, KeyError, IndexError):
        rows = ({name: row[name] for name in names if name in row} for row in (dataset[i] for i in range(len(dataset))))
    return [[len(ids) for ids in sequences_of(without_padding(row))] for row in rows]


_TASKS_BY_CLASS = {"ForSequenceClassification": "sequence-classification", "ForTokenClassification": "token-classification",
                   "ForQuestionAnswering": "question-answering", "ForMultipleChoice": "multiple-choice"}


def _wrapped(model: Any, prompt: PromptConfig | None, task: str | None) -> PromptedModel:
    if isinstance(model, PromptedModel):
        if prompt is not None or task is not None:
            raise ConfigError("prompt and task are for wrapping a transformers model, but this model is a PromptedModel already; "
                              "set them in PromptedModel.from_pretrained.")
        return model
    if getattr(model, "is_outside", False):
        return model
    name = type(model).__name__
    task = task or next((t for ending, t in _TASKS_BY_CLASS.items() if name.endswith(ending)), "sequence-classification")
    config = getattr(model, "config", None)
    return PromptedModel.from_pretrained(model, task=task, prompt=prompt, id2label=getattr(config, "id2label", None),
                                         problem_type=getattr(config, "problem_type", None),
                                         device=next(model.parameters()).device)
