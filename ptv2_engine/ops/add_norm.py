"""add_norm: y = LayerNorm(dropout(x) + residual) * weight + bias, the post-LN step of BERT.

add_norm_sum returns the sum too: the residual stream of a pre-LN layer (GLM, ModernBERT), with the next branch's input y.
Saved for backward: x_hat in x's dtype (2H bytes a token in bf16) and 1/std in fp32. weight and bias are frozen, so
neither the sum nor y is needed and dgamma, dbeta are never computed; dropout is redrawn from its seed.
Bytes: forward 2 reads and 2 writes of [T, H]; backward 2 reads and 1 write (2 with dropout); the sum is one more of each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptv2_engine.ops import _philox
from ptv2_engine.ops._dispatch import choose, launcher

torch.library.define(
    "ptv2::add_norm_fwd",
    "(Tensor x_TH, Tensor residual_TH, Tensor weight_H, Tensor bias_H, float eps, float dropout_p, Tensor? seed, int site, "
    "bool save, bool with_sum) -> (Tensor y_TH, Tensor xhat_TH, Tensor rstd_T, Tensor sum_TH)")
torch.library.define(
    "ptv2::add_norm_bwd",
    "(Tensor dy_TH, Tensor? dsum_TH, Tensor xhat_TH, Tensor rstd_T, Tensor weight_H, float dropout_p, Tensor? seed, int site) "
    "-> (Tensor dresidual_TH, Tensor dx_TH)")


@torch.library.register_fake("ptv2::add_norm_fwd")
def _fake_fwd(x_TH, residual_TH, weight_H, bias_H, eps, dropout_p, seed, site, save, with_sum):  # type: ignore[no-untyped-def]
    y_TH, sum_TH = x_TH.new_empty(x_TH.shape), x_TH.new_empty(x_TH.shape if with_sum else 0)
    if not save:
        return y_TH, x_TH.new_empty(0), x_TH.new_empty(0, dtype=torch.float32), sum_TH
    return y_TH, x_TH.new_empty(x_TH.shape), x_TH.new_empty(x_TH.shape[0], dtype=torch.float32), sum_TH


@torch.library.register_fake("ptv2::add_norm_bwd")
def _fake_bwd(dy_TH, dsum_TH, xhat_TH, rstd_T, weight_H, dropout_p, seed, site):  # type: ignore[no-untyped-def]
    return dy_TH.new_empty(dy_TH.shape), dy_TH.new_empty(dy_TH.shape if dropout_p > 0 else 0)


def reference(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float, **dropout: Any) -> Tensor:
    """add_norm in plain PyTorch: differentiable in everything, any dtype and device."""
    return reference_sum(x_TH, residual_TH, weight_H, bias_H, eps, **dropout)[0]


def reference_sum(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float, *, dropout_p: float = 0.0,
                  seed: Tensor | None = None, site: int = 0) -> tuple[Tensor, Tensor]:
    """add_norm_sum in plain PyTorch."""
    if dropout_p > 0:
        rows = torch.arange(x_TH.shape[0], device=x_TH.device)
        keep = _philox.keep_scale(rows, x_TH.shape[1], 0, p=dropout_p, seed=seed, site=site, stream=_philox.HIDDEN)
        x_TH = x_TH * keep.to(x_TH.dtype)
    sum_TH = x_TH + residual_TH
    return F.layer_norm(sum_TH, weight_H.shape, weight_H, bias_H, eps), sum_TH


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float, dropout_p: float,
                seed: Tensor | None, site: int, backend: str, with_sum: bool) -> Tensor | tuple[Tensor, Tensor]:
        fwd = launcher(backend, x_TH.device, "add_norm_fwd")
        y_TH, xhat_TH, rstd_T, sum_TH = fwd(x_TH, residual_TH, weight_H, bias_H, eps, dropout_p, seed, site, True, with_sum)
        ctx.save_for_backward(xhat_TH, rstd_T)
        ctx.set_materialize_grads(False)                # no zeros are made for the sum of the last layer, which nobody reads
        ctx.weight_H, ctx.seed, ctx.plain = weight_H, seed, (dropout_p, site, backend)
        return (y_TH, sum_TH) if with_sum else y_TH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy_TH, dsum_TH = grads[0], grads[1] if len(grads) > 1 else None
        xhat_TH, rstd_T = ctx.saved_tensors
        dropout_p, site, backend = ctx.plain
        if dy_TH is None:
            dy_TH = torch.zeros_like(xhat_TH)
        bwd = launcher(backend, dy_TH.device, "add_norm_bwd")
        dresidual_TH, dx_TH = bwd(dy_TH.contiguous(), None if dsum_TH is None else dsum_TH.contiguous(), xhat_TH, rstd_T,
                                  ctx.weight_H, dropout_p, ctx.seed, site)
        return dresidual_TH if dropout_p == 0 else dx_TH, dresidual_TH, *[None] * 8


def _run(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float, dropout_p: float,
         seed: int | Tensor | None, site: int, with_sum: bool) -> tuple[Tensor, Tensor | None]:
    seed = _philox.seed_tensor(seed, x_TH.device, dropout_p > 0)
    choice = choose("add_norm", x_TH.device, x_TH.dtype)
    if choice.backend == "reference":
        return reference_sum(x_TH, residual_TH, weight_H, bias_H, eps, dropout_p=dropout_p, seed=seed, site=site)
    x_TH, residual_TH = x_TH.contiguous(), residual_TH.contiguous()
    if torch.is_grad_enabled() and (x_TH.requires_grad or residual_TH.requires_grad):
        out = _AddNorm.apply(x_TH, residual_TH, weight_H, bias_H, eps, dropout_p, seed, site, choice.backend, with_sum)
        return out if with_sum else (out, None)
    fwd = launcher(choice.backend, x_TH.device, "add_norm_fwd")
    y_TH, _, _, sum_TH = fwd(x_TH, residual_TH, weight_H, bias_H, eps, dropout_p, seed, site, False, with_sum)
    return y_TH, sum_TH


def add_norm(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float, *, dropout_p: float = 0.0,
             seed: int | Tensor | None = None, site: int = 0) -> Tensor:
    """LayerNorm(dropout(x) + residual) with frozen weight and bias.

    Arguments:
        x_TH, residual_TH: [T, H], same dtype (float16, bfloat16, float32, float64), contiguous.
        weight_H, bias_H: [H], frozen: they get no gradient on any backend but `reference`.
        eps: added to the variance. dropout_p acts on x; seed: int, int64 tensor [1] or None (drawn); site: Philox call site.
    Returns:
        y_TH [T, H] in x's dtype; gradients reach x and residual.
    """
    return _run(x_TH, residual_TH, weight_H, bias_H, eps, dropout_p, seed, site, False)[0]


def add_norm_sum(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float, *, dropout_p: float = 0.0,
                 seed: int | Tensor | None = None, site: int = 0) -> tuple[Tensor, Tensor]:
    """(LayerNorm(s), s) with s = dropout(x) + residual, arguments as add_norm: one step of a pre-LN residual stream.

    Returns:
        y_TH and sum_TH [T, H] in x's dtype; y is made from the fp32 sum. Gradients of both reach x and residual.
    """
    y_TH, sum_TH = _run(x_TH, residual_TH, weight_H, bias_H, eps, dropout_p, seed, site, True)
    assert sum_TH is not None
    return y_TH, sum_TH
