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


def is_planned(model: nn.Module) -> bool:
    """Whether the planner knows this model's steps: a backbone that trains runs in plain PyTorch, an outside reference elsewhere.
    A step of theirs that runs out of memory is still redone in pieces."""
    known = isinstance(model, PromptedModel) and model.encoder.trained_backbone is None
    if not known:
        _log.debug("memory is not planned for a %s whose backbone trains, or that is no PromptedModel", type(model).__name__)
    return known


def available(device: torch.device, model: PromptedModel | None = None) -> int:
    """Bytes that a training step may take on the device: what is free, and what this process (the model) holds there already.
    The same on all processes of a distributed run: the least of theirs."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        limit = free + torch.cuda.memory_reserved(device) - int(RESERVE * total)
    else:
        tensors = () if model is None else (*model.encoder.tensors_held(), *model.encoder.tensors_on_host())
        there, held = free_host_bytes(Path("/")), sum(t.numel() * t.element_size() for t in tensors)
        # weights that are still pages of a file count as free already
        limit = 2**62 if there is None else there + min(held, _fields(Path("/proc/self/status")).get("RssAnon", 0) * 1024)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        least = torch.tensor(limit, device=device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        limit = int(least)
    return limit


def _fields(file: Path) -> dict[str, int]:
    """The numbers of a file of lines such as "MemFree: 12 kB"."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return {words[0].rstrip(":"): int(words[1]) for words in map(str.split, lines) if len(words) > 1 and words[1].isdigit()}


def free_host_bytes(root: Path) -> int | None:
    """What Linux could hand out without swapping, and a container's limit (cgroup v2) lets it; None elsewhere."""
    free = _fields(root / "proc/meminfo").get("MemAvailable")
    if free is None:
        return None
    group = root / "sys/fs/cgroup"
    limit, used = (f.read_text().strip() if f.is_file() else "" for f in (group / "memory.max", group / "memory.current"))
    if not (limit.isdigit() and used.isdigit()):
        return free * 1024
    cached = _fields(group / "memory.stat").get("inactive_file", 0)           # given back when memory is asked for
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

    def largest_piece(self, batch: int, examples: Sequence[Sequence[int]]) -> int:
        """The largest divisor of a batch size whose longest examples fit together; 0 where not even one does. examples: the
        tokens of each one's sequences."""
        longest = sorted(examples, key=sum, reverse=True)[:batch]
        for count in (n for n in range(batch, 0, -1) if batch % n == 0):
            lengths = tuple(n for example in longest[:count] for n in example)
            plan = self.plan(replace(self.setup, lengths=lengths, accumulates=self.setup.accumulates or count < batch))
            if plan is None or plan.peak <= self.limit:
                return count
        return 0

    def graphs_do_not_fit(self) -> str | None:
        """Why steps that fit cannot be held as CUDA graphs too, or None."""
        plan = self.plan(replace(self.setup, cuda_graphs=True))
        if plan is None or plan.peak <= self.limit:
            return None
        return (f"with their memory pool a step takes {size(plan.peak)} by plan, but {size(self.limit)} are free for it on "
                f"{self.device}")

    def refusal(self, what: str, pieces: int = 0) -> str:
        """The sentence that says what would fit. pieces: sequences of --auto_batch's micro-batches, 0: it does not help."""
        ways = [options_of(changed, self.setup) for changed, other in ways_out(self.setup, self.planner)
                if other.peak <= self.limit][:1]
        ways.append(f"--auto_batch (micro-batches of {pieces})" if pieces else
                    "a smaller model, a shorter prompt, or another device")
        return f"{what}, but {size(self.limit)} are free for it on {self.device}; use {', or '.join(ways)}."


def check_fits(model: PromptedModel, worst: Sequence[int], examples: Sequence[Sequence[int]],
               args: TrainingArguments) -> Budget | None:
    """Raises OutOfMemory, saying what would fit, when the largest batch of a run does not fit where it trains. worst: tokens of
    that batch's sequences; examples: of every example's. Returns what was planned with; None where nothing is planned."""
    if not is_planned(model):
        return None
    setup = setup_of(model, worst, args.device, args.gradient_accumulation_steps > 1)
    budget = Budget(setup, available(args.device, model), args.device)
    plan = budget.plan(setup)
    if plan is not None and plan.peak > budget.limit:
        pieces = budget.largest_piece(args.per_device_train_batch_size, examples)
        what = f"a step of {len(worst)} sequences ({sum(worst):,} tokens) takes {size(plan.peak)} by plan"
        raise OutOfMemory(budget.refusal(what, pieces))
    return budget


def check_model_fits(setup: Setup, device: torch.device) -> None:
    """Raises OutOfMemory when a model does not fit with one short sequence, before any of its weights is read."""
    budget = Budget(replace(setup, lengths=(3,)), available(device), device)
    plan, there = budget.plan(budget.setup), free_host_bytes(Path("/"))
    if plan is None:
        return
    if plan.peak > budget.limit:
        raise OutOfMemory(budget.refusal(f"a model with a batch of 3 tokens takes {size(plan.peak)} by plan"))
    if there is not None and plan.host > there:
        way = "--stream_weights file" + ("" if setup.frozen_dtype else ", or --frozen_dtype int8 beside host")
        raise OutOfMemory(f"{size(plan.host)} of streamed weights do not fit into the {size(there)} that host memory has free; "
                          f"use {way}.")


def choose_micro_batch(model: PromptedModel, args: TrainingArguments, examples: Sequence[Sequence[int]]) -> int:
    """Lower args.per_device_train_batch_size to what fits, and raise gradient_accumulation_steps by the same factor, which is
    returned: the batch that an optimizer step sees stays the same. Raises OutOfMemory."""
    if not is_planned(model):
        _log.warning("auto_batch: this model's steps cannot be planned; one that runs out of memory is redone in pieces")
        return 1
    batch, longest = args.per_device_train_batch_size, max(examples, key=sum)
    setup = setup_of(model, longest, args.device, args.gradient_accumulation_steps > 1)
    budget = Budget(setup, available(args.device, model), args.device)
    fits = budget.largest_piece(batch, examples)
    if not fits:
        raise OutOfMemory(budget.refusal(f"not even one example of {sum(longest)} tokens fits"))
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
    """Where torch's generators are: a failed attempt draws nothing, so that a resumed run, which may not fail, draws the same."""

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
    if "start_positions" in inputs:
        return inputs["start_positions"].numel()
    labels = inputs["labels"]
    return labels.numel() if labels.is_floating_point() else int((labels != IGNORE).sum())
