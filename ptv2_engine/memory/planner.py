"""The planner: how much a training step takes, without the device, the weights, or a second set of formulas.

A Planner builds the model on fake tensors (sizes without memory), runs a training step of the engine's own code on them, and
counts what is alive at the worst moment (tracker.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ptv2_engine.encoder.weights import random_encoder
from ptv2_engine.errors import ConfigError
from ptv2_engine.graph_inputs import fill_up
from ptv2_engine.masked_lm import CLOZE_FAMILIES, empty_masked_lm
from ptv2_engine.memory.setup import DTYPES, Setup, title_of
from ptv2_engine.memory.tracker import (
    BATCH,
    GRADIENTS,
    GRAPHS,
    HOST,
    OPTIMIZER,
    PROMPTS,
    SAVED,
    WEIGHTS,
    WORKSPACE,
    MemoryTracker,
    Peak,
    mark_gradients,
)
from ptv2_engine.model import OUTPUTS, PromptedModel
from ptv2_engine.ops import planned_for
from ptv2_engine.optim import adamw, add_back, set_aside, state_tensors

# What a process takes beside its tensors on CUDA. cuBLAS's workspace comes from torch's allocator, so that max_memory_allocated
# holds it: torch's 32 MiB (Hopper and later) for each of two threads, forward's and backward's. The context of the driver, with
# torch's and Triton's kernels, does not: a typical value, no part of the predicted peak. Neither has been measured here.
CUDA_CONTEXT, CUBLAS_WORKSPACE = 500 << 20, 2 * 32 << 20


@dataclass(frozen=True)
class Plan:
    """Bytes at the worst moment of a step, by part. Apart from that: what each layer keeps from forward to backward, and the host
    memory of streamed weights (on the CPU they are a part)."""

    title: str
    parts: dict[str, int]
    saved_by_layer: list[int]
    host: int
    tokens: int
    saved_per_token_and_layer: float       # in units of H bytes, of a layer in the middle
    context: int = 0                       # of the CUDA driver, on top of the peak

    @property
    def peak(self) -> int:
        """What the device's allocator has handed out at the worst moment."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"peak": self.peak}


class Workload:
    """A model, and batches and steps for it: real, or fake inside a Planner."""

    def __init__(self, setup: Setup, device: torch.device) -> None:
        self.device = device
        encoder, origin = random_encoder(setup.config(), dtype=DTYPES[setup.dtype], device=device,
                                         frozen_dtype=setup.frozen_dtype, stream_weights="host" if setup.stream_weights else None)
        cloze: dict[str, Any] = {}
        if setup.task == "cloze":
            cloze["verbalizer_ids"] = list(range(setup.num_labels))
            if encoder.config.family not in CLOZE_FAMILIES:
                cloze["masked_lm"] = empty_masked_lm(encoder.config, encoder.dtype, device)
        prompt = replace(setup.prompt, init="normal")           # the values do not matter
        self.model = PromptedModel(encoder, origin, prompt, task=setup.task, pooler=setup.pooler,
                                   num_labels=OUTPUTS.get(setup.task, setup.num_labels),
                                   shift_positions=setup.shift_positions, **cloze).train()
        self.turn_to(setup)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = adamw(self.model, 1e-3)
        self.tracker: MemoryTracker | None = None

    def turn_to(self, setup: Setup) -> None:
        """Another setup of the same model: its batch and its memory policy."""
        self.setup = setup
        self.model.encoder.set_memory(setup.memory)

    def batch(self) -> dict[str, Any]:
        lengths = self.setup.sequences()
        B, S, T = len(lengths), max(lengths), sum(lengths)
        where: dict[str, Any] = {"dtype": torch.long, "device": self.device}
        shape: tuple[int, ...] = (B, S) if self.setup.task == "token-classification" else (B,)
        token = min(5, self.model.encoder.config.vocab_size - 1)
        made = {"input_ids": torch.full((T,), token, **where), "seq_lengths": torch.tensor(lengths, **where), "max_seqlen": S,
                "labels": torch.zeros(shape, **where)}
        if self.setup.task == "question-answering":
            made |= {name: torch.zeros(B, **where) for name in ("start_positions", "end_positions")}
            del made["labels"]
        if self.setup.task == "multiple-choice":         # every sequence its own example: the same memory
            made |= {"choice_counts": torch.ones(B, **where), "max_choices": 1}
        if self.setup.task == "cloze" and self.model.encoder.config.family not in CLOZE_FAMILIES:
            made["mask_positions"] = torch.zeros(B, **where)
        elif self.setup.task == "cloze":
            made["causal_from"] = torch.full((B,), max(min(lengths) - 1, 0), **where)
            made["position_ids"] = torch.zeros(2, T, **where)
        if self.setup.cuda_graphs:
            made = fill_up(made, self.model.max_length(), self.setup.task == "token-classification")
        return made

    def step(self, batch: dict[str, Any], after_forward: Callable[[], None] = lambda: None) -> None:
        """Forward, backward, clipping, AdamW: one step as the Trainer makes it."""
        if self.setup.accumulates or self.setup.cuda_graphs:       # gradients that stay where they are
            for p in self.parameters:
                p.grad = torch.zeros_like(p)
            if self.tracker is not None:
                self.tracker.mark((p.grad for p in self.parameters), GRADIENTS)
        before = set_aside(self.parameters)
        loss = self.model(**batch).loss
        after_forward()
        loss.backward()
        add_back(self.parameters, before)
        del before
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def mark(self, tracker: MemoryTracker) -> None:
        tracker.mark(self.model.encoder.tensors_held(), WEIGHTS)
        tracker.mark(self.model.encoder.tensors_on_host(), HOST)
        trained = [part for part in (self.model.prompt, self.model.head) if part is not None]
        tracker.mark((t.detach() for part in trained for t in (*part.parameters(), *part.buffers())), PROMPTS)
        tracker.mark(state_tensors(self.optimizer), OPTIMIZER)

    def label_layers(self) -> None:
        """Have the tracker told which layer is at work, from the moment of its attention."""
        layers: Any = self.model.encoder.layers
        for i, layer in enumerate(layers):
            def attend(*args: Any, at: int = i, run: Callable[..., Tensor] = layer.attend, **kwargs: Any) -> Tensor:
                if self.tracker is not None:
                    self.tracker.label = str(at)
                return run(*args, **kwargs)

            layer.attend = attend


def track(workload: Any, tracker: MemoryTracker) -> Peak:
    """Run a step of a workload that is warmed up, and return its peak."""
    workload.mark(tracker)
    hooks = mark_gradients(tracker, workload.parameters)
    try:
        tracker.label = ""
        batch = workload.batch()
        tracker.mark((t for t in batch.values() if isinstance(t, Tensor)), BATCH)
        tracker.start()
        workload.step(batch, tracker.forward_is_over)
    finally:
        for hook in hooks:
            hook.remove()
    return tracker.peak


def warm_up(workload: Any, packs: bool) -> None:
    """What only a first step makes: the optimizer's state and, where weights are packed, their copies."""
    if packs:
        workload.step(workload.batch())
        return
    for p in workload.parameters:
        p.grad = torch.zeros_like(p)
    workload.optimizer.step()
    workload.optimizer.zero_grad(set_to_none=True)


class Planner:
    """Makes plans, and keeps the fake models: plans that differ in batch and memory policy share one."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode()
        self.workloads: list[tuple[Setup, Workload]] = []

    def plan(self, setup: Setup) -> Plan:
        """Predict the peak memory of a training step. Raises ConfigError, SequenceTooLong, WeightError."""
        setup.check()
        try:
            return self._plan(setup)
        except DataDependentOutputException as error:           # plain PyTorch reads lengths back
            raise ConfigError(f"{setup.dtype} on {setup.device} has no kernels for this model and runs in plain PyTorch, which "
                              "is not planned; choose another dtype or device (ptv2 info says what runs).") from error

    def _plan(self, setup: Setup) -> Plan:
        tracker = MemoryTracker(512 if setup.device == "cuda" else 64)
        with self.mode, planned_for(setup.device):
            workload = self._workload(setup)
            workload.turn_to(setup)
            workload.tracker = tracker
            try:
                with tracker:
                    peak = track(workload, tracker)
            finally:
                workload.tracker = None
        host = tracker.totals.get(HOST, 0) if setup.stream_weights == "host" else 0
        parts = {name: size for name, size in peak.parts.items() if size and name != HOST}
        if setup.device == "cpu" and host:                # the device's memory is the host's
            parts[HOST], host = host, 0
        if setup.device == "cuda":
            parts[WORKSPACE] = parts.get(WORKSPACE, 0) + CUBLAS_WORKSPACE
        if setup.cuda_graphs:
            parts[GRAPHS] = self._pool(workload, parts)
        config, tokens = workload.model.encoder.config, sum(setup.sequences())
        saved = [tracker.after_forward.get(str(i), 0) for i in range(config.num_layers)]
        return Plan(title_of(setup), parts, saved, host, tokens, saved[config.num_layers // 2] / tokens / config.hidden_size,
                    CUDA_CONTEXT if setup.device == "cuda" else 0)

    def _pool(self, workload: Workload, parts: dict[str, int]) -> int:
        """What graphs hold: all that comes and goes in the largest step, and that a step without a graph takes once more."""
        stays = sum(-(-p.numel() * p.element_size() // 512) * 512 for p in workload.parameters)       # gradients
        return sum(parts.get(part, 0) for part in (SAVED, WORKSPACE, GRADIENTS)) - stays

    def _workload(self, setup: Setup) -> Workload:
        """A workload of this model that has made one step."""
        key = replace(setup, memory="exact", batch_size=1, seq_len=1, lengths=None, accumulates=False, cuda_graphs=False)
        found = next((workload for known, workload in self.workloads if known == key), None)
        if found is None:
            found = Workload(key, torch.device("cpu"))
            warm_up(found, packs=setup.device == "cpu")
            found.label_layers()
            self.workloads.append((key, found))
        return found


def plan(setup: Setup) -> Plan:
    """One plan by a Planner of its own."""
    return Planner().plan(setup)
