"""linear_geglu: h = gelu(x Wa^T) * (x Wg^T) with both halves in one frozen weight (GEGLU, arXiv 2002.05202; ModernBERT's FFN).

Saved for backward: the product's output z [T, 2F], both factors' gradients need both halves. ModernBERT's F is 1.5 H, so
that is 6H bytes a token in bf16 and the layer stays within 16H.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptv2_engine.ops._dispatch import choose, launcher
from ptv2_engine.ops.frozen_linear import FrozenLinear, as_frozen, frozen_linear

torch.library.define("ptv2::geglu_fwd", "(Tensor z_TG) -> Tensor h_TF")
torch.library.define("ptv2::geglu_bwd", "(Tensor dh_TF, Tensor z_TG) -> Tensor dz_TG")


@torch.library.register_fake("ptv2::geglu_fwd")
def _fake_fwd(z_TG: Tensor) -> Tensor:
    return z_TG.new_empty(z_TG.shape[0], z_TG.shape[1] // 2)


@torch.library.register_fake("ptv2::geglu_bwd")
def _fake_bwd(dh_TF: Tensor, z_TG: Tensor) -> Tensor:
    return z_TG.new_empty(z_TG.shape)


def reference(x_TH: Tensor, weight_GH: Tensor, bias_G: Tensor | None = None) -> Tensor:
    """The same in plain PyTorch: differentiable in everything."""
    a, gate = F.linear(x_TH, weight_GH, bias_G).chunk(2, -1)
    return F.gelu(a) * gate


class _LinearGeglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, linear: FrozenLinear, packed: bool, backend: str) -> Tensor:
        z_TG = linear.matmul(x_TH, packed)
        ctx.save_for_backward(z_TG)
        ctx.linear, ctx.packed, ctx.backend = linear, packed, backend
        return launcher(backend, z_TG.device, "geglu_fwd")(z_TG)

    @staticmethod
    def backward(ctx: Any, dh_TF: Tensor) -> tuple[Tensor, None, None, None]:
        dz_TG = launcher(ctx.backend, dh_TF.device, "geglu_bwd")(dh_TF.contiguous(), *ctx.saved_tensors)
        return ctx.linear.matmul_transposed(dz_TG, ctx.packed), None, None, None


def linear_geglu(x_TH: Tensor, linear: FrozenLinear | Tensor, bias_G: Tensor | None = None) -> Tensor:
    """gelu(z[:, :F]) * z[:, F:] with z = x W^T + b, W and b frozen; gelu with erf.

    Arguments:
        x_TH: [T, H] contiguous. linear: a FrozenLinear with 2F outputs, or a plain weight [2F, H] with bias_G [2F] or None.
    Returns:
        h_TF [T, F]; only x gets a gradient (on the `reference` backend W and b do too if they require it).
    """
    choice = choose("linear_geglu", x_TH.device, x_TH.dtype)
    if choice.backend == "reference":
        a, gate = frozen_linear(x_TH, linear, bias_G).chunk(2, -1)
        return F.gelu(a) * gate
    linear = as_frozen(linear, bias_G)
    packed = linear.packs(x_TH)
    if torch.is_grad_enabled() and x_TH.requires_grad:
        return _LinearGeglu.apply(x_TH, linear, packed, choice.backend)
    z_TG = linear.matmul(x_TH.detach(), packed)
    return launcher(choice.backend, z_TG.device, "geglu_fwd")(z_TG)
