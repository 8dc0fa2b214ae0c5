"""rotary: rotary position embeddings (RoFormer, arXiv 2104.09864) on the queries and keys of a fused projection, in place.

    x1' = x1 cos - x2 sin,  x2' = x2 cos + x1 sin         x1, x2 the halves of a head; angles position * theta ** (-2 i / D)

The projection's output is not needed by its own backward, so it is overwritten; the backward rotates the gradient the other
way. Nothing is saved but the positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptv2_engine.ops._dispatch import cached_table, choose, launcher

torch.library.define("ptv2::rotary_", "(Tensor(a!) qkv_T3ND, Tensor cos_sin_LD, Tensor positions_T, bool inverse) -> ()")


@torch.library.register_fake("ptv2::rotary_")
def _fake(qkv_T3ND: Tensor, cos_sin_LD: Tensor, positions_T: Tensor, inverse: bool) -> None:
    return None


@cached_table
def cos_sin_table(length: int, head_dim: int, theta: float, device: torch.device | str = "cpu") -> Tensor:
    """fp32 [L, D]: row p holds cos(p w_i), then sin(p w_i), with w_i = theta ** (-2 i / D); computed in fp64."""
    inverse = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * inverse
    return torch.cat((angles.cos(), angles.sin()), 1).float()


def reference(qkv_T3ND: Tensor, cos_sin_LD: Tensor, positions_T: Tensor, inverse: bool = False) -> Tensor:
    """The same in plain PyTorch, out of place and differentiable."""
    half = qkv_T3ND.shape[-1] // 2
    wide = torch.float64 if qkv_T3ND.dtype == torch.float64 else torch.float32
    cos, sin = (x[:, None, None].to(wide) for x in cos_sin_LD[positions_T].split(half, 1))
    sin = -sin if inverse else sin
    x1, x2 = qkv_T3ND[:, :2, ..., :half].to(wide), qkv_T3ND[:, :2, ..., half:].to(wide)
    turned = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).to(qkv_T3ND.dtype)
    return torch.cat((turned, qkv_T3ND[:, 2:]), 1)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_TC: Tensor, num_heads: int, cos_sin_LD: Tensor, positions_T: Tensor, backend: str) -> Tensor:
        launcher(backend, qkv_TC.device, "rotary_")(_split(qkv_TC, num_heads), cos_sin_LD, positions_T, False)
        ctx.mark_dirty(qkv_TC)
        ctx.plain = (num_heads, cos_sin_LD, positions_T, backend)
        return qkv_TC

    @staticmethod
    def backward(ctx: Any, dqkv_TC: Tensor) -> tuple[Tensor | None, ...]:
        num_heads, cos_sin_LD, positions_T, backend = ctx.plain
        dqkv_TC = dqkv_TC.clone(memory_format=torch.contiguous_format)      # autograd may hand the same gradient to others
        launcher(backend, dqkv_TC.device, "rotary_")(_split(dqkv_TC, num_heads), cos_sin_LD, positions_T, True)
        return dqkv_TC, None, None, None, None


def _split(qkv_TC: Tensor, num_heads: int) -> Tensor:
    return qkv_TC.view(qkv_TC.shape[0], 3, num_heads, -1)


def rotary(qkv_TC: Tensor, num_heads: int, cos_sin_LD: Tensor, positions_T: Tensor) -> Tensor:
    """Rotate the queries and keys of a fused projection, in place where a kernel runs: use the result, not the argument.

    Arguments:
        qkv_TC: [T, 3 N D] contiguous, D even. cos_sin_LD: fp32 [L, D] of cos_sin_table.
        positions_T: int64 [T], each below L.
    Returns:
        [T, 3, N, D]; the gradient reaches qkv.
    """
    choice = choose("rotary", qkv_TC.device, qkv_TC.dtype)
    if choice.backend == "reference":
        return reference(_split(qkv_TC, num_heads), cos_sin_LD, positions_T)
    if torch.is_grad_enabled() and qkv_TC.requires_grad:
        return _split(_Rotary.apply(qkv_TC, num_heads, cos_sin_LD, positions_T, choice.backend), num_heads)
    launcher(choice.backend, qkv_TC.device, "rotary_")(_split(qkv_TC, num_heads), cos_sin_LD, positions_T, False)
    return _split(qkv_TC, num_heads)
