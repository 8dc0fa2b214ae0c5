"""Counting memory: which storages are alive at the worst moment of a step, and what each of them is for.

The tracker sees every operator that runs inside it, forward and backward, on real or on fake tensors, and follows each storage
from its birth to its release; autograd's saved-tensor hooks tell it which ones are kept for backward. It knows no formula of the
engine's: what it reports is what the code does.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

WEIGHTS, PROMPTS, GRADIENTS, OPTIMIZER, SAVED, WORKSPACE, BATCH, HOST, GRAPHS = (
    "frozen weights", "prompts and head", "gradients", "optimizer state", "saved activations", "workspaces", "batch",
    "host memory", "CUDA graphs")
_RANDOM = {"aten::normal_", "aten::uniform_", "aten::random_"}       # a fake tensor has no values to draw


@dataclass
class Held:
    """One storage: its bytes as the allocator rounds them, what it is for, and the label under which it was born."""

    nbytes: int
    part: str
    label: str


class Peak:
    """The worst moment: bytes in all and by part."""

    def __init__(self) -> None:
        self.total = 0
        self.parts: dict[str, int] = {}


class MemoryTracker(TorchDispatchMode):
    """Follows storages while it is entered. Storages that were there before are counted once `mark` has named them.

    granule: bytes an allocation is rounded up to (512 on CUDA, 64 on the CPU).
    """

    def __init__(self, granule: int = 512) -> None:
        super().__init__()
        self.granule = granule
        self.held: WeakIdKeyDictionary = WeakIdKeyDictionary()       # storage -> Held
        self.totals: dict[str, int] = {}
        self.saved: dict[str, int] = {}
        self.total = 0
        self.peak = Peak()
        self.label = ""
        self.after_forward: dict[str, int] = {}      # saved bytes by label when `forward_is_over` was called last
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def __enter__(self) -> MemoryTracker:
        self.hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.hooks.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _RANDOM and type(args[0]) is not Tensor:
            return args[0]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.follow(tensor, WORKSPACE)
        return out

    def follow(self, tensor: Tensor, part: str) -> Held | None:
        """The record of a tensor's storage, made now for one that is new."""
        if tensor.layout != torch.strided or tensor.device.type == "meta" and type(tensor) is Tensor:
            return None
        storage = tensor.untyped_storage()
        held = self.held.get(storage)
        if held is None:
            held = Held(-(-storage.nbytes() // self.granule) * self.granule, part, self.label)
            self.held[storage] = held
            weakref.finalize(storage, self._release, held)
            self._count(held, 1)
        return held

    def mark(self, tensors: Iterable[Tensor | None], part: str) -> None:
        """Say what these tensors are for."""
        for tensor in tensors:
            if tensor is not None and (held := self.follow(tensor, part)) is not None and held.part != part:
                self._count(held, -1)
                held.part = part
                self._count(held, 1)

    def start(self) -> None:
        """Forget the peak: count from what is alive now."""
        self.peak = Peak()
        self._look()

    def forward_is_over(self) -> None:
        """Note what is kept for backward: while backward runs, layers that are computed again keep more for a moment."""
        self.after_forward = dict(self.saved)

    def _keep(self, tensor: Tensor) -> Tensor:
        held = self.follow(tensor, SAVED)
        if held is not None and held.part == WORKSPACE:
            self.mark([tensor], SAVED)
        # an operator that keeps its own output would otherwise keep itself alive
        return tensor.detach() if tensor.requires_grad else tensor

    def _release(self, held: Held) -> None:
        self._count(held, -1)

    def _count(self, held: Held, sign: int) -> None:
        self.totals[held.part] = self.totals.get(held.part, 0) + sign * held.nbytes
        if held.part == SAVED:
            self.saved[held.label] = self.saved.get(held.label, 0) + sign * held.nbytes
        if held.part != HOST:
            self.total += sign * held.nbytes
            if sign > 0:
                self._look()

    def _look(self) -> None:
        if self.total > self.peak.total:
            self.peak.total, self.peak.parts = self.total, dict(self.totals)


def mark_gradients(tracker: MemoryTracker, parameters: Iterable[nn.Parameter]) -> list[Any]:
    """Have gradients counted as such from the moment they are accumulated; returns the hooks, to be removed."""
    def seen(parameter: Tensor) -> None:
        tracker.mark([parameter.grad], GRADIENTS)

    return [p.register_post_accumulate_grad_hook(seen) for p in parameters if p.requires_grad]
