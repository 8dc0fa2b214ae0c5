"""Computing something again in backward instead of keeping what it saves.

Training Deep Nets with Sublinear Memory Cost (arXiv 1604.06174), for blocks of this stack: dropout is drawn from counters, so a
block computes the same again without any generator's state, and the prefix is an argument like any other: its gradient is not
lost, as it is where a checkpointing wrapper sees the hidden states only.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ptv2_engine.ops import Kept, use_backend


class NormSource(NamedTuple):
    """What a normed x_TH can be made from again, x_hat * weight + bias: add_norm's saved x_hat, which costs nothing more."""

    kept: Kept
    weight_H: Tensor
    bias_H: Tensor


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: Callable[..., Tensor], source: NormSource | None, x_TH: Tensor,
                *others: Tensor | None) -> Tensor:
        ctx.block, ctx.norm, ctx.dtype = block, None if source is None else source[1:], x_TH.dtype
        ctx.context = contextvars.copy_context()        # the backend asked for: on a GPU backward has a thread of its own
        ctx.save_for_backward(*((x_TH, None) if source is None else source.kept), *others)
        return block(x_TH, *others)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.context.run(_Recomputed.again, ctx, dout)

    @staticmethod
    def again(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        first, scales, *others = ctx.saved_tensors
        x_TH = first if ctx.norm is None else Kept(first, scales).y(ctx.norm[0], ctx.norm[1], ctx.dtype)
        needed = ctx.needs_input_grad[2:]
        inputs = [None if t is None else t.detach().requires_grad_(need)
                  for t, need in zip((x_TH, *others), needed, strict=True)]
        with torch.enable_grad():
            out = ctx.block(*inputs)
        wanted: Any = [t for t, need in zip(inputs, needed, strict=True) if need]
        grads = iter(torch.autograd.grad(out, wanted, dout))
        return None, None, *(next(grads) if need else None for need in needed)


def recomputed(block: Callable[..., Tensor], x_TH: Tensor, *others: Tensor | None, source: NormSource | None = None,
               trains: bool = False) -> Tensor:
    """block(x_TH, *others), keeping x_TH and others for backward and nothing that block itself would save.

    source: keep what add_norm saved, in place of x_TH. trains: the block's own weights get gradients too, so autograd has to see
    it run, on the `reference` backend both times.
    """
    if trains and torch.is_grad_enabled():
        again: Any = checkpoint(block, x_TH, *others, use_reentrant=False, preserve_rng_state=False,
                                context_fn=lambda: (nullcontext(), use_backend("reference")))
        return again
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_TH, *others)):
        return _Recomputed.apply(block, source, x_TH, *others)
    return block(x_TH, *others)
