"""Training that does not run out of memory: planned before it starts, cut into micro-batches, and redone in pieces where it
does."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from ptv2_engine.errors import OutOfMemory
from ptv2_engine.memory import Plan, Planner, Setup, options_of, ways_out
from ptv2_engine.memory.fit import RESERVE
from ptv2_engine.memory.report import size
from ptv2_engine.model import PromptedModel
from ptv2_engine.packing import IGNORE

_log = logging.getLogger("ptv2_engine")


def setup_of(model: PromptedModel, lengths: Sequence[int], device: torch.device, accumulates: bool = False) -> Setup:
    """The planner's view of a training step of this model on sequences of these lengths."""
    stream = model.encoder.stream
    return Setup(
        model.origin.config, prompt=model.prompt_config, task=model.task, num_labels=model.num_labels,
        memory=model.encoder.memory, dtype=str(model.dtype).removeprefix("torch."), frozen_dtype=model.encoder.frozen_dtype,
        stream_weights=None if stream is None else "file" if stream.from_file else "host",
        device="cuda" if device.type == "cuda" else "cpu", lengths=tuple(lengths),
        pooler="trained" if model.pooler_kind == "trained" else "auto", shift_positions=model.shift_positions,
        accumulates=accumulates)


def available(device: torch.device, model: PromptedModel | None = None) -> int:
    """Bytes that a training step may take on the device: what is free, and what this process (the model) holds there already.
    The same on all processes of a distributed run: the least of theirs."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        limit = free + torch.cuda.memory_reserved(device) - int(RESERVE * total)
    else:
        held = () if model is None else (*model.encoder.tensors_held(), *model.encoder.tensors_on_host())
        there = free_host_bytes(Path("/"))
        limit = 2**62 if there is None else there + sum(t.numel() * t.element_size() for t in held)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        least = torch.tensor(limit, device=device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        limit = int(least)
    return limit


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
    """What a step may take on a device, and the plans that are compared with it. They share one planner."""

    def __init__(self, setup: Setup, limit: int, device: torch.device) -> None:
        self.setup, self.limit, self.device, self.planner = setup, limit, device, Planner()

    def plan(self, setup: Setup) -> Plan | None:
        """The plan, or None (and a warning) where planning fails: a plan that cannot be made must not stop a run that could."""
        try:
            return self.planner.plan(setup)
        except Exception as error:
            _log.warning("memory was not planned: %s", error)
            return None

    def largest_piece(self, batch: int) -> int:
        """The largest divisor of the batch size whose longest sequences fit together; 0 where not even one does."""
        longest = tuple(sorted(self.setup.sequences(), reverse=True))
        for count in (n for n in range(batch, 0, -1) if batch % n == 0):
            plan = self.plan(replace(self.setup, lengths=longest[:count], accumulates=self.setup.accumulates or count < batch))
            if plan is None or plan.peak <= self.limit:
                return count
        return 0

    def refusal(self, what: str, batch: int = 0) -> str:
        """The sentence that says what would fit. batch: sequences that --auto_batch could divide, 0: it does not help."""
        ways = [options_of(changed, self.setup) for changed, other in ways_out(self.setup, self.planner)
                if other.peak <= self.limit][:1]
        pieces = self.largest_piece(batch)
        ways.append(f"--auto_batch (micro-batches of {pieces})" if pieces else
                    "a smaller model, a shorter prompt, or another device")
        return f"{what}, but {size(self.limit)} are free for it on {self.device}; use {', or '.join(ways)}."

    def check(self, what: str, batch: int = 0) -> None:
        """Raises OutOfMemory, saying what would fit, where the plan is over the limit."""
        plan = self.plan(self.setup)
        if plan is not None and plan.peak > self.limit:
            raise OutOfMemory(self.refusal(f"{what} takes {size(plan.peak)} by plan", batch))


def check_fits(model: PromptedModel, lengths: Sequence[int], device: torch.device, accumulates: bool) -> None:
    """Raises OutOfMemory, saying what would fit, when the largest batch of a run does not fit where the model is."""
    budget = Budget(setup_of(model, lengths, device, accumulates), available(device, model), device)
    budget.check(f"a step of {len(lengths)} sequences ({sum(lengths):,} tokens)", len(lengths))


def check_model_fits(setup: Setup, device: torch.device) -> None:
    """Raises OutOfMemory when a model does not fit with one short sequence, before any of its weights is read."""
    budget = Budget(replace(setup, lengths=(3,)), available(device), device)
    budget.check("a model with a batch of 3 tokens")
    plan, there = budget.plan(budget.setup), free_host_bytes(Path("/"))
    if plan is not None and there is not None and plan.host > there:
        raise OutOfMemory(f"{size(plan.host)} of streamed weights do not fit into the {size(there)} that host memory has free; "
                          "use --stream_weights file, or --frozen_dtype int8 beside host.")


def choose_micro_batch(model: PromptedModel, args: TrainingArguments, lengths: Sequence[int]) -> int:
    """Lower args.per_device_train_batch_size to what fits, and raise gradient_accumulation_steps by the same factor, which is
    returned: the batch that an optimizer step sees stays the same. Raises OutOfMemory."""
    batch = min(args.per_device_train_batch_size, len(lengths))
    worst = tuple(sorted(lengths, reverse=True)[:batch])
    setup = setup_of(model, worst, args.device, args.gradient_accumulation_steps > 1)
    budget = Budget(setup, available(args.device, model), args.device)
    fits = budget.largest_piece(batch)
    if not fits:
        alone = Budget(replace(setup, lengths=worst[:1], accumulates=batch > 1 or setup.accumulates), budget.limit, args.device)
        raise OutOfMemory(alone.refusal(f"not even one sequence of {worst[0]} tokens fits"))
    if fits < batch:
        _log.warning("auto_batch: micro-batches of %d, accumulated %d times, make the batch of %d", fits, batch // fits, batch)
        args.gradient_accumulation_steps *= batch // fits
        args.per_device_train_batch_size = fits
    return batch // fits


_WORDS = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory",
          "CUDA out of memory", "[CUDA]: out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocator had nothing left: torch's, cuBLAS's, or Triton's."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS))


class RandomState:
    """Where torch's generators are: a step that is done again draws the same dropout, so that a resumed run does too."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cpu = device, torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def free_memory(parameters: Sequence[nn.Parameter]) -> None:
    """Drop a failed step's gradients, and give its memory back."""
    for parameter in parameters:
        parameter.grad = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def count_labels(inputs: dict[str, Any]) -> int:
    """Labels that take part in a batch's loss."""
    labels = inputs["labels"]
    return labels.numel() if labels.is_floating_point() else int((labels != IGNORE).sum())
