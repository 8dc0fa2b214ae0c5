"""A CUDA graph on the CPU, as far as numbers go: a tape of the operators that a function ran, on the tensors it ran them on.

What a function computes in Python is frozen when it is taped, as in a graph; a replay reads inputs where they lay and writes
results where they lay. As capturing runs nothing, what taping changed is put back. Before every replay all memory that was born
while taping is filled with NaN, as if another graph of the pool had used it: what is read there must have been written before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """The operators that run inside, and how to run them again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.born: dict[int, Tensor] = {}                     # by storage: what a graph's pool would hold
        self.changed: dict[int, tuple[Tensor, Tensor]] = {}   # by storage: a tensor that was there before, and what it held

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function._schema.is_mutable:
            for tensor in written(function, args, kwargs):
                self._remember(tensor)
        out = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, out))
        for tensor in made(function, out):
            self.born[tensor.untyped_storage().data_ptr()] = tensor
        return out

    def _remember(self, tensor: Tensor) -> None:
        place = tensor.untyped_storage().data_ptr()
        if place not in self.born and place not in self.changed:
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            self.changed[place] = (whole, whole.clone())

    def rewind(self) -> None:
        for tensor, before in self.changed.values():
            tensor.copy_(before)

    def replay(self) -> None:
        with torch.no_grad():
            for tensor in self.born.values():
                if tensor.is_floating_point():
                    torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).fill_(torch.nan)
            for function, args, kwargs, out in self.calls:
                for old, new in zip(made(function, out), made(function, function(*args, **kwargs)), strict=True):
                    old.copy_(new)


def made(function: Any, out: Any) -> list[Tensor]:
    """The tensors of an operator's result that are neither views of its arguments nor its arguments."""
    results = out if isinstance(out, (tuple, list)) and len(function._schema.returns) > 1 else [out]
    return [tensor for declared, result in zip(function._schema.returns, results, strict=False) if declared.alias_info is None
            for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]


def written(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operator writes into."""
    named = zip(function._schema.arguments, args, strict=False)
    given = [*named, *((a, kwargs[a.name]) for a in function._schema.arguments if a.name in kwargs)]
    return [tensor for declared, value in given if declared.alias_info is not None and declared.alias_info.is_write
            for tensor in tree_leaves(value) if isinstance(tensor, Tensor)]


class Tapes:
    """In CudaGraphs' place."""

    def __init__(self) -> None:
        self.captured = 0

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.captured += 1
        random, tape = torch.get_rng_state(), Tape()
        with tape:
            result = function()
        torch.set_rng_state(random)
        with torch.no_grad():
            tape.rewind()
        return tape.replay, result
