"""A contest on an op: contestants on the same numbers, peers compared with ours before they are timed.

A contestant is a builder: build(seed) makes its input set, on the numbers that the seed stands for, in the layout it wants.
A case goes round several sets, so that no cache is measured.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import attempt
from benchmarks.shapes import TOKENS
from ptv2_engine.timing import input_sets, stream_for

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}     # of the largest magnitude
ROUNDS = {"cpu": 6, "cuda": 40}
SETS = 8                         # of the ops on rows: at most so many input sets


@dataclass
class InputSet:
    """One set of inputs of a contestant: call() is the forward; leaves get gradients; dout is the gradient of its output."""

    call: Callable[[], Tensor | tuple[Tensor, ...]]
    leaves: list[Tensor]
    dout: Tensor | tuple[Tensor, ...] | None
    common: Callable[[list[Tensor]], list[Tensor]] = list      # its output, and its gradients if made, in the layout of ours

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.call(), self.leaves, self.dout)

    def results(self, backward: bool) -> list[Tensor]:
        """Output, and gradients, as they are compared."""
        out = self.call()
        gradients = torch.autograd.grad(out, self.leaves, self.dout) if backward else ()
        outs = out if isinstance(out, tuple) else (out,)
        return [x.detach() for x in self.common([*outs, *gradients])]


Builder = Callable[[int], InputSet]


def on(inputs: int, device: str, dtype: torch.dtype, width: int, out_width: int,
       outputs: int = 1) -> Callable[[Callable[..., Any]], Builder]:
    """on(..)(function): a contestant that calls the function with so many inputs [T, width], for so many outputs [T, out_width]
    (a tuple of several)."""
    def contestant(function: Callable[..., Any]) -> Builder:
        def build(seed: int) -> InputSet:
            generator = torch.Generator(device).manual_seed(seed)
            draw = lambda columns: torch.randn(TOKENS[device], columns, device=device, generator=generator).to(dtype)
            leaves = [draw(width).requires_grad_() for _ in range(inputs)]
            dout = draw(out_width) if outputs == 1 else tuple(draw(out_width) for _ in range(outputs))
            return InputSet(lambda: function(*leaves), leaves, dout)
        return build
    return contestant


def left_out(seed: int) -> InputSet:
    """In place of a peer that the short grid does without: its row has the reason."""
    raise AssertionError("left out of the short grid, as it compiles for long; --grid full has it")


def check(peer: list[Tensor], truth: list[Tensor]) -> None:
    """A peer computes what ours does: its output and every gradient within a few roundings. Raises AssertionError."""
    if len(peer) != len(truth):
        raise AssertionError(f"computes something else: {len(peer) - 1} gradients where ours has {len(truth) - 1}")
    for i, (x, y) in enumerate(zip(peer, truth, strict=True)):
        error, budget = float((x.float() - y.float()).abs().max()), TOLERANCE[y.dtype] * float(y.float().abs().max())
        if not error <= max(budget, 1e-6):
            name = f"gradient {i} of {len(truth) - 1}" if i else "the output"
            raise AssertionError(f"computes something else: {name} is {error:.2e} off, at most {budget:.2e} was expected")


def calls(build: Callable[[int], InputSet], sets: int, direction: str, device: str,
          truth: list[Tensor] | None = None) -> list[Callable[[], Any]]:
    """What is timed of a contestant: a function an input set, the first of which has run. truth: our results to compare with."""
    with stream_for(device):
        made = [build(seed) for seed in range(sets)]
        if truth is not None:
            check(made[0].results(direction != "forward"), truth)
        if direction == "forward":
            timed: list[Callable[[], Any]] = [torch.no_grad()(s.call) for s in made]
        elif direction == "both":
            timed = [s.both for s in made]
        else:
            timed = [functools.partial(torch.autograd.grad, s.call(), s.leaves, s.dout, retain_graph=True) for s in made]
        timed[0]()                                             # what fails only as it is timed is a reason too
    return timed


def contest(compare: Callable[..., Any], case: str, contestants: Mapping[str, Callable[[int], InputSet]], direction: str,
            device: str, set_bytes: int, *, unchecked: Collection[str] = (), most: int = 16, **facts: Any) -> None:
    """Time a case. The first contestant is ours; the others may fail, and then the row has the reason.

    unchecked: contestants that compute something else on purpose (a floor), or draw random numbers of their own.
    set_bytes: of one input set, of which there are at most `most`.
    """
    sets = input_sets(set_bytes, device, most)
    ours, *others = contestants
    # a compiled backward may else overwrite what it is called with again, and refuses to be
    again = torch._functorch.config.patch(donated_buffer=False) if direction == "backward" else contextlib.nullcontext()
    with again:
        with stream_for(device):
            truth = contestants[ours](0).results(direction != "forward")
        peers, skipped = attempt({peer: functools.partial(calls, contestants[peer], sets, direction, device,
                                                          None if peer in unchecked else truth) for peer in others})
        compare(case, {ours: calls(contestants[ours], sets, direction, device)} | peers, rounds=ROUNDS[device], device=device,
                capture=True, skipped=skipped, input_sets=sets, **{"pass": direction}, **facts)
