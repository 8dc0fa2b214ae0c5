"""add_norm: y = LayerNorm(dropout(x) + residual) * weight + bias, the post-LN step of BERT.

add_norm_sum returns the sum too: the residual stream of a pre-LN layer (GLM, ModernBERT), with the next branch's input y.
Saved for backward: x_hat in x's dtype (2H bytes a token in bf16), or with keep="int8" (memory policy lean) as int8 with an fp32
scale for XHAT_BLOCK columns, their largest magnitude / 127 (1.06H), and 1/std in fp32. weight and bias are frozen, so
neither the sum nor y is needed and dgamma, dbeta are never computed; dropout is redrawn from its seed.
Bytes: forward 2 reads and 2 writes of [T, H]; backward 2 reads and 1 write (2 with dropout); the sum is one more of each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ptv2_engine.errors import InputError
from ptv2_engine.kernels.saved import XHAT_BLOCK, empty_norm
from ptv2_engine.ops import _philox
from ptv2_engine.ops._dispatch import choose, launcher

KEEP = ("full", "int8")

torch.library.define(
    "ptv2::add_norm_fwd",
    "(Tensor x_TH, Tensor residual_TH, Tensor weight_H, Tensor bias_H, float eps, float dropout_p, Tensor? seed, int site, "
    "str keep, bool with_sum) -> (Tensor y_TH, Tensor xhat_TH, Tensor rstd_T, Tensor scales, Tensor sum_TH)")
torch.library.define(
    "ptv2::add_norm_bwd",
    "(Tensor dy_TH, Tensor? dsum_TH, Tensor xhat_TH, Tensor? scales, Tensor rstd_T, Tensor weight_H, float dropout_p, "
    "Tensor? seed, int site) -> (Tensor dresidual_TH, Tensor dx_TH)")
torch.library.define("ptv2::renorm", "(Tensor xhat_TH, Tensor? scales, Tensor weight_H, Tensor bias_H, ScalarType dtype) -> "
                                     "Tensor y_TH")


@torch.library.register_fake("ptv2::add_norm_fwd")
def _fake_fwd(x_TH, residual_TH, weight_H, bias_H, eps, dropout_p, seed, site, keep, with_sum):  # type: ignore[no-untyped-def]
    return empty_norm(x_TH, keep, with_sum)


@torch.library.register_fake("ptv2::add_norm_bwd")
def _fake_bwd(dy_TH, dsum_TH, xhat_TH, scales, rstd_T, weight_H, dropout_p, seed, site):  # type: ignore[no-untyped-def]
    return dy_TH.new_empty(dy_TH.shape), dy_TH.new_empty(dy_TH.shape if dropout_p > 0 else 0)


@torch.library.register_fake("ptv2::renorm")
def _fake_renorm(xhat_TH, scales, weight_H, bias_H, dtype):  # type: ignore[no-untyped-def]
    return xhat_TH.new_empty(xhat_TH.shape, dtype=dtype)


class Kept(NamedTuple):
    """What add_norm saved of its normed rows: x_hat, or its int8 codes [T, H] and their scales [T, ceil(H / XHAT_BLOCK)]."""

    xhat_TH: Tensor
    scales: Tensor | None

    def y(self, weight_H: Tensor, bias_H: Tensor, dtype: torch.dtype) -> Tensor:
        """x_hat * weight + bias [T, H]: add_norm's output again, as exactly as x_hat was kept. No gradient."""
        choice = choose("add_norm", self.xhat_TH.device, dtype)
        if choice.backend == "reference":
            return reference_renorm(self.xhat_TH, self.scales, weight_H, bias_H, dtype)
        return launcher(choice.backend, self.xhat_TH.device, "renorm")(self.xhat_TH, self.scales, weight_H, bias_H, dtype)


def reference_renorm(xhat_TH: Tensor, scales: Tensor | None, weight_H: Tensor, bias_H: Tensor, dtype: torch.dtype) -> Tensor:
    """Kept.y in plain PyTorch."""
    wide = torch.promote_types(dtype, torch.float32)
    xhat = xhat_TH.to(wide)
    if scales is not None:
        xhat = xhat * scales.to(wide).repeat_interleave(XHAT_BLOCK, 1)[:, :xhat.shape[1]]
    return (xhat * weight_H.to(wide) + bias_H.to(wide)).to(dtype)


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
                seed: Tensor | None, site: int, backend: str, keep: str, with_sum: bool) -> tuple[Tensor, ...]:
        fwd = launcher(backend, x_TH.device, "add_norm_fwd")
        y_TH, xhat_TH, rstd_T, scales, sum_TH = fwd(x_TH, residual_TH, weight_H, bias_H, eps, dropout_p, seed, site, keep,
                                                    with_sum)
        ctx.save_for_backward(xhat_TH, scales if keep == "int8" else None, rstd_T)
        ctx.set_materialize_grads(False)                # no zeros are made for the sum of the last layer, which nobody reads
        ctx.mark_non_differentiable(xhat_TH, scales)
        ctx.weight_H, ctx.seed, ctx.plain = weight_H, seed, (dropout_p, site, backend)
        return y_TH, sum_TH, xhat_TH, scales

    @staticmethod
    def backward(ctx: Any, dy_TH: Tensor | None, dsum_TH: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        xhat_TH, scales, rstd_T = ctx.saved_tensors
        dropout_p, site, backend = ctx.plain
        if dy_TH is None:
            assert dsum_TH is not None
            dy_TH = torch.zeros_like(dsum_TH)
        bwd = launcher(backend, dy_TH.device, "add_norm_bwd")
        dresidual_TH, dx_TH = bwd(dy_TH.contiguous(), None if dsum_TH is None else dsum_TH.contiguous(), xhat_TH, scales, rstd_T,
                                  ctx.weight_H, dropout_p, ctx.seed, site)
        return dresidual_TH if dropout_p == 0 else dx_TH, dresidual_TH, *[None] * 9


def add_norm_kept(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float, *, dropout_p: float = 0.0,
                  seed: int | Tensor | None = None, site: int = 0, keep: str = "full",
                  with_sum: bool = False) -> tuple[Tensor, Tensor | None, Kept | None]:
    """add_norm (and the sum of add_norm_sum, with with_sum) together with what it saved for backward.

    Arguments as add_norm; keep: "full" saves x_hat in x's dtype, "int8" in 8 bits.
    Returns:
        y_TH, the sum or None, and Kept: the same memory that backward reads, not a copy. None where nothing requires grad, and
        on the `reference` backend, which keeps what autograd keeps.
    """
    if keep not in KEEP:
        raise InputError(f"add_norm: keep {keep!r} does not exist; choose one of {', '.join(KEEP)}.")
    seed = _philox.seed_tensor(seed, x_TH.device, dropout_p > 0)
    choice = choose("add_norm", x_TH.device, x_TH.dtype)
    if choice.backend == "reference":
        y_TH, sum_TH = reference_sum(x_TH, residual_TH, weight_H, bias_H, eps, dropout_p=dropout_p, seed=seed, site=site)
        return y_TH, sum_TH if with_sum else None, None
    x_TH, residual_TH = x_TH.contiguous(), residual_TH.contiguous()
    if torch.is_grad_enabled() and (x_TH.requires_grad or residual_TH.requires_grad):
        y_TH, sum_TH, xhat_TH, scales = _AddNorm.apply(x_TH, residual_TH, weight_H, bias_H, eps, dropout_p, seed, site,
                                                       choice.backend, keep, with_sum)
        return y_TH, sum_TH if with_sum else None, Kept(xhat_TH, scales if keep == "int8" else None)
    fwd = launcher(choice.backend, x_TH.device, "add_norm_fwd")
    y_TH, _, _, _, sum_TH = fwd(x_TH, residual_TH, weight_H, bias_H, eps, dropout_p, seed, site, "none", with_sum)
    return y_TH, sum_TH if with_sum else None, None


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
    return add_norm_kept(x_TH, residual_TH, weight_H, bias_H, eps, dropout_p=dropout_p, seed=seed, site=site)[0]


def add_norm_sum(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float, *, dropout_p: float = 0.0,
                 seed: int | Tensor | None = None, site: int = 0) -> tuple[Tensor, Tensor]:
    """(LayerNorm(s), s) with s = dropout(x) + residual, arguments as add_norm: one step of a pre-LN residual stream.

    Returns:
        y_TH and sum_TH [T, H] in x's dtype; y is made from the fp32 sum. Gradients of both reach x and residual.
    """
    y_TH, sum_TH, _ = add_norm_kept(x_TH, residual_TH, weight_H, bias_H, eps, dropout_p=dropout_p, seed=seed, site=site,
                                    with_sum=True)
    assert sum_TH is not None
    return y_TH, sum_TH
