"""What kernels save for backward, and in which shape: shared by the Triton launchers and the fakes that stand for all
backends."""

from __future__ import annotations

import torch
from torch import Tensor

XHAT_BLOCK = 64      # columns of an int8 x_hat that share a scale


def empty_norm(x_TH: Tensor, keep: str, with_sum: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What add_norm_fwd fills: y, x_hat, 1/std, scales and the sum; empty [0] where there is nothing to keep."""
    T, H = x_TH.shape
    save, codes = keep != "none", keep == "int8"
    return (x_TH.new_empty((T, H)), x_TH.new_empty((T, H) if save else 0, dtype=torch.int8 if codes else x_TH.dtype),
            x_TH.new_empty(T if save else 0, dtype=torch.float32),
            x_TH.new_empty((T, -(-H // XHAT_BLOCK)) if codes else 0, dtype=torch.float32),
            x_TH.new_empty((T, H) if with_sum else 0))


def empty_derivative(z_TF: Tensor, save: bool, bits: int) -> Tensor:
    """What gelu_ fills: uint8 codes for 16-bit activations, the full derivative otherwise; with 6 bits four codes
    in three bytes (uint8 [T, 3, F / 4], csrc/include/ptv2/gelu_code.h)."""
    if not save:
        return z_TF.new_empty(0, dtype=torch.uint8)
    if bits == 6:
        return z_TF.new_empty((z_TF.shape[0], 3, z_TF.shape[1] // 4), dtype=torch.uint8)
    return z_TF.new_empty(z_TF.shape, dtype=torch.uint8 if z_TF.dtype in (torch.float16, torch.bfloat16) else z_TF.dtype)
