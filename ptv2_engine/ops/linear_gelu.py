"""linear_gelu: h = gelu(x W^T + b) with a frozen W. Saves the derivative of GELU and nothing else.

GELU' lies in [-0.1290, 1.1290], so in fp16 and bf16 it is kept as one byte an element: code = round((g' + 0.13) * 255/1.26),
an error of at most 0.0025, about bf16's own rounding. In fp32 and fp64 eight bits would cost accuracy (1e-3), so the
derivative is kept in full. The elementwise part works in place on the matrix product's output: one read, one write, and
the code. approximate "none" is x * Phi(x) with erf, "tanh" is 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
(Hendrycks and Gimpel, arXiv 1606.08415).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptv2_engine.ops._dispatch import choose, launcher
from ptv2_engine.ops.frozen_linear import FrozenLinear, as_frozen, packs

CODE_LOW, CODE_STEP = -0.13, 1.26 / 255

torch.library.define("ptv2::gelu_", "(Tensor(a!) z_TF, str approximate, bool save) -> Tensor derivative_TF")
torch.library.define("ptv2::gelu_bwd", "(Tensor dh_TF, Tensor derivative_TF) -> Tensor dz_TF")


def derivative_dtype(dtype: torch.dtype) -> torch.dtype:
    """uint8 codes for 16-bit activations, the full derivative otherwise."""
    return torch.uint8 if dtype in (torch.float16, torch.bfloat16) else dtype


@torch.library.register_fake("ptv2::gelu_")
def _fake_gelu(z_TF: Tensor, approximate: str, save: bool) -> Tensor:
    if not save:
        return z_TF.new_empty(0, dtype=torch.uint8)
    return z_TF.new_empty(z_TF.shape, dtype=derivative_dtype(z_TF.dtype))


@torch.library.register_fake("ptv2::gelu_bwd")
def _fake_gelu_bwd(dh_TF: Tensor, derivative_TF: Tensor) -> Tensor:
    return dh_TF.new_empty(dh_TF.shape)


def reference(x_TH: Tensor, weight_FH: Tensor, bias_F: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """The same in plain PyTorch: differentiable in everything."""
    return F.gelu(F.linear(x_TH, weight_FH, bias_F), approximate=approximate)


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, linear: FrozenLinear, packed: bool, approximate: str, backend: str) -> Tensor:
        h_TF = linear.matmul(x_TH, packed)
        ctx.save_for_backward(launcher(backend, h_TF.device, "gelu_")(h_TF, approximate, True))
        ctx.linear, ctx.packed, ctx.backend = linear, packed, backend
        return h_TF

    @staticmethod
    def backward(ctx: Any, dh_TF: Tensor) -> tuple[Tensor, None, None, None, None]:
        dz_TF = launcher(ctx.backend, dh_TF.device, "gelu_bwd")(dh_TF.contiguous(), *ctx.saved_tensors)
        return ctx.linear.matmul_transposed(dz_TF, ctx.packed), None, None, None, None


def linear_gelu(x_TH: Tensor, linear: FrozenLinear | Tensor, bias_F: Tensor | None = None, *,
                approximate: str = "none") -> Tensor:
    """gelu(x W^T + b) with W and b frozen.

    Arguments:
        x_TH: [T, H] contiguous. linear: a FrozenLinear, or a plain weight [F, H] with bias_F [F].
        approximate: "none" (erf) or "tanh".
    Returns:
        h_TF [T, F]; only x gets a gradient (on the `reference` backend W and b do too if they require it).
    """
    choice = choose("linear_gelu", x_TH.device, x_TH.dtype)
    if choice.backend == "reference":
        weight, bias = (linear.weight, linear.bias) if isinstance(linear, FrozenLinear) else (linear, bias_F)
        return reference(x_TH, weight, bias, approximate=approximate)
    linear = as_frozen(linear, bias_F)
    packed = packs(x_TH)
    if torch.is_grad_enabled() and x_TH.requires_grad:
        return _LinearGelu.apply(x_TH, linear, packed, approximate, choice.backend)
    h_TF = linear.matmul(x_TH.detach(), packed)
    launcher(choice.backend, h_TF.device, "gelu_")(h_TF, approximate, False)
    return h_TF
