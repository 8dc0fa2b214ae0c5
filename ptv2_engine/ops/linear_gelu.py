"""linear_gelu: h = gelu(x W^T + b) with a frozen W. Saves the derivative of GELU and nothing else.

GELU' lies in [-0.1290, 1.1290], so in fp16 and bf16 it is kept as one byte an element: code = round((g' + 0.13) * 255/1.26),
an error of at most 0.0025, about bf16's own rounding. In fp32 and fp64 eight bits would cost accuracy (1e-3), so the
derivative is kept in full. bits=6 (memory policy lean) keeps 6 bits in every dtype, multiples of 1/49 from -1/7: 0 and
1, where most units are, are exact, and the error is at most 0.0103. Four codes, one from each quarter of a row, take three bytes.
(4 bits were tried: an error of 11 % in the prompt's gradient of MiniLM, where 6 bits and an int8 x_hat make 4 %.)
The elementwise part works in place on the matrix product's output: one read, one write, and
the code. approximate "none" is x * Phi(x) with erf, "tanh" is 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
(Hendrycks and Gimpel, arXiv 1606.08415).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptv2_engine.errors import InputError
from ptv2_engine.kernels.saved import empty_derivative
from ptv2_engine.ops._dispatch import choose, launcher
from ptv2_engine.ops.frozen_linear import FrozenLinear, as_frozen, frozen_linear

CODE_LOW, CODE_STEP = -0.13, 1.26 / 255

torch.library.define("ptv2::gelu_", "(Tensor(a!) z_TF, str approximate, bool save, int bits) -> Tensor derivative_TF")
torch.library.define("ptv2::gelu_bwd", "(Tensor dh_TF, Tensor derivative_TF, int bits) -> Tensor dz_TF")


@torch.library.register_fake("ptv2::gelu_")
def _fake_gelu(z_TF: Tensor, approximate: str, save: bool, bits: int) -> Tensor:
    return empty_derivative(z_TF, save, bits)


@torch.library.register_fake("ptv2::gelu_bwd")
def _fake_gelu_bwd(dh_TF: Tensor, derivative_TF: Tensor, bits: int) -> Tensor:
    return dh_TF.new_empty(dh_TF.shape)


def reference(x_TH: Tensor, weight_FH: Tensor, bias_F: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """The same in plain PyTorch: differentiable in everything."""
    return F.gelu(F.linear(x_TH, weight_FH, bias_F), approximate=approximate)


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, linear: FrozenLinear, packed: bool, approximate: str, bits: int,
                backend: str) -> Tensor:
        h_TF = linear.matmul(x_TH, packed)
        ctx.save_for_backward(launcher(backend, h_TF.device, "gelu_")(h_TF, approximate, True, bits))
        ctx.linear, ctx.packed, ctx.bits, ctx.backend = linear, packed, bits, backend
        return h_TF

    @staticmethod
    def backward(ctx: Any, dh_TF: Tensor) -> tuple[Tensor | None, ...]:
        dz_TF = launcher(ctx.backend, dh_TF.device, "gelu_bwd")(dh_TF.contiguous(), *ctx.saved_tensors, ctx.bits)
        return ctx.linear.matmul_transposed(dz_TF, ctx.packed), *[None] * 5


def linear_gelu(x_TH: Tensor, linear: FrozenLinear | Tensor, bias_F: Tensor | None = None, *,
                approximate: str = "none", bits: int = 8) -> Tensor:
    """gelu(x W^T + b) with W and b frozen.

    Arguments:
        x_TH: [T, H] contiguous. linear: a FrozenLinear, or a plain weight [F, H] with bias_F [F].
        approximate: "none" (erf) or "tanh". bits: of the derivative kept for backward, 8, or 6 (F a multiple of 4).
    Returns:
        h_TF [T, F]; only x gets a gradient (on the `reference` backend W and b do too if they require it).
    """
    choice = choose("linear_gelu", x_TH.device, x_TH.dtype)
    if choice.backend == "reference":
        return F.gelu(frozen_linear(x_TH, linear, bias_F), approximate=approximate)
    linear = as_frozen(linear, bias_F)
    if bits not in (8, 6) or bits == 6 and linear.out_features % 4:
        raise InputError(f"linear_gelu: {bits} bits of the derivative of {linear.out_features} columns cannot be packed; use "
                         "bits=8, or 6 with a multiple of 4 columns.")
    packed = linear.packs(x_TH)
    if torch.is_grad_enabled() and x_TH.requires_grad:
        return _LinearGelu.apply(x_TH, linear, packed, approximate, bits, choice.backend)
    h_TF = linear.matmul(x_TH.detach(), packed)
    launcher(choice.backend, h_TF.device, "gelu_")(h_TF, approximate, False, 8)
    return h_TF
