"""Training that does not run out of memory: planned before it starts, cut into micro-batches, and redone in pieces where it
does."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from ptv2_engine.errors import OutOfMemory
from ptv2_engine.memory import Planner, Setup, options_of, ways_out
from ptv2_engine.memory.report import size
from ptv2_engine.model import PromptedModel
from ptv2_engine.packing import IGNORE

_log = logging.getLogger("ptv2_engine")


def setup_of(model: PromptedModel, lengths: Sequence[int], device: torch.device) -> Setup:
    """The planner's view of a training step of this model on sequences of these lengths."""
    stream = model.encoder.stream
    return Setup(
        model.origin.config, prompt=model.prompt_config, task=model.task, num_labels=model.num_labels,
        memory=model.encoder.memory, dtype=str(model.dtype).removeprefix("torch."), frozen_dtype=model.encoder.frozen_dtype,
        stream_weights=None if stream is None else "file" if stream.from_file else "host",
        device="cuda" if device.type == "cuda" else "cpu", lengths=tuple(lengths),
        pooler="trained" if model.pooler_kind == "trained" else "auto", shift_positions=model.shift_positions)


def available(model: PromptedModel, device: torch.device) -> int:
    """Bytes that a training step of this model may take on the device: what is free, and what this process holds there
    already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = free_host_bytes(Path("/"))
    held = (t.numel() * t.element_size() for t in (*model.encoder.tensors_held(), *model.encoder.tensors_on_host()))
    return 2**62 if free is None else free + sum(held)


def free_host_bytes(root: Path) -> int | None:
    """What Linux could hand out without swapping, and a container's limit (cgroup v2) lets it; None elsewhere."""
    def fields(file: Path) -> dict[str, int]:
        lines = file.read_text().splitlines() if file.is_file() else []
        return {words[0].rstrip(":"): int(words[1]) for words in map(str.split, lines) if len(words) > 1 and words[1].isdigit()}

    free = fields(root / "proc/meminfo").get("MemAvailable")
    if free is None:
        return None
    group = root / "sys/fs/cgroup"
    limit, used = (f.read_text().strip() if f.is_file() else "" for f in (group / "memory.max", group / "memory.current"))
    if not (limit.isdigit() and used.isdigit()):
        return free * 1024
    cached = fields(group / "memory.stat").get("inactive_file", 0)           # given back when memory is asked for
    return min(free * 1024, max(int(limit) - int(used) + cached, 0))


class Budget:
    """What a model may take on a device, and the plans that are compared with it. They share one planner."""

    def __init__(self, model: PromptedModel, device: torch.device) -> None:
        self.model, self.device = model, device
        self.limit, self.planner = available(model, device), Planner()

    def peak(self, lengths: Sequence[int]) -> int | None:
        """The planned peak, or None (and a warning) where planning fails: a plan that cannot be made must not stop a run that
        could."""
        try:
            return self.planner.plan(setup_of(self.model, lengths, self.device)).peak
        except Exception as error:
            _log.warning("memory was not planned: %s", error)
            return None

    def fits(self, lengths: Sequence[int]) -> bool:
        peak = self.peak(lengths)
        return peak is None or peak <= self.limit

    def largest_piece(self, lengths: Sequence[int]) -> int:
        """The largest divisor of the batch size whose longest sequences fit together; 0 where not even one does."""
        longest = sorted(lengths, reverse=True)
        divisors = (n for n in range(len(longest), 0, -1) if len(longest) % n == 0)
        return next((n for n in divisors if self.fits(longest[:n])), 0)


def check_fits(model: PromptedModel, lengths: Sequence[int], device: torch.device) -> None:
    """Raises OutOfMemory, saying what would fit, when the largest batch of a run does not fit where the model is."""
    budget = Budget(model, device)
    peak = budget.peak(lengths)
    if peak is None or peak <= budget.limit:
        return
    setup, pieces = setup_of(model, lengths, device), budget.largest_piece(lengths)
    ways = [options_of(changed, setup) for changed, other in ways_out(setup, budget.planner) if other.peak <= budget.limit][:1]
    ways.append(f"--auto_batch (micro-batches of {pieces})" if pieces else "a smaller model, a shorter prompt, or another device")
    raise OutOfMemory(f"a step of {len(lengths)} sequences ({sum(lengths):,} tokens) takes {size(peak)} by plan, but "
                      f"{size(budget.limit)} are free for it on {device}; use {', or '.join(ways)}.")


def choose_micro_batch(model: PromptedModel, args: TrainingArguments, lengths: Sequence[int]) -> None:
    """Lower args.per_device_train_batch_size to what fits, and raise gradient_accumulation_steps by the same factor: the batch
    that an optimizer step sees keeps its size. Raises OutOfMemory."""
    batch, budget = args.per_device_train_batch_size, Budget(model, args.device)
    worst = sorted(lengths, reverse=True)[:batch]
    worst += worst[-1:] * (batch - len(worst))                     # a data set smaller than the batch
    fits = budget.largest_piece(worst)
    if not fits:
        raise OutOfMemory(f"not even one sequence of {worst[0]} tokens fits into the {size(budget.limit)} that are free on "
                          f"{args.device}; use --memory minimal, --frozen_dtype int8, --stream_weights host, or shorter sequences.")
    if fits < batch:
        _log.warning("auto_batch: micro-batches of %d, accumulated %d times, make the batch of %d", fits, batch // fits, batch)
        args.gradient_accumulation_steps *= batch // fits
        args.per_device_train_batch_size = fits


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocator had nothing left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def remember_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """What has been accumulated so far: kilobytes to megabytes, prompt and head only."""
    return [None if p.grad is None else p.grad.clone() for p in parameters]


def forget_step(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Undo what a failed step added to the gradients, and give its memory back."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def count_labels(inputs: dict[str, Any]) -> int:
    """Labels that take part in a batch's loss."""
    labels = inputs["labels"]
    return labels.numel() if labels.is_floating_point() else int((labels != IGNORE).sum())

