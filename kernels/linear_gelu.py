"""GELU in place on the matrix product's output, its derivative in one byte, and the backward product.

One read and one write of z, and one write of the code; backward reads dh and the code and writes dz. The code of a 16-bit
activation is round((g' + 0.13) * 255 / 1.26), fp32 keeps g' itself. tanh is written with exp: libdevice is not in the
interpreter, and exp of a negative argument neither overflows nor cancels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
WARPS = 8

_CODES_PER_UNIT = tl.constexpr(255.0 / 1.26)
_STEP = tl.constexpr(1.26 / 255.0)
_LOW = tl.constexpr(-0.13)


@triton.jit
def tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def gelu_and_derivative(z, TANH: tl.constexpr):
    """GELU and its derivative of an fp32 tile: tanh form or erf form (Hendrycks and Gimpel, arXiv 1606.08415)."""
    if TANH:
        t = tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
        inner = 0.7978845608028654 * (1.0 + 0.134145 * z * z)
        # For |z| beyond fp32's cube root z * z * z overflows to inf, tanh to 1; the product below must not be 0 * inf.
        slope = tl.where(tl.abs(t) < 1.0, (1.0 - t * t) * inner, 0.0)
        cdf = 0.5 * (1.0 + t)
        derivative = cdf + 0.5 * z * slope
    else:
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        derivative = cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    return z * cdf, derivative


@triton.jit(do_not_specialize=["numel"])
def gelu_kernel(z_TF, derivative_TF, numel, TANH: tl.constexpr, SAVE: tl.constexpr, CODED: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    z = tl.load(z_TF + offsets, mask=mask, other=0.0).to(tl.float32)
    h, derivative = gelu_and_derivative(z, TANH)
    tl.store(z_TF + offsets, h.to(z_TF.dtype.element_ty), mask=mask)
    if SAVE:
        if CODED:
            code = tl.floor((derivative - _LOW) * _CODES_PER_UNIT + 0.5)
            code = tl.minimum(tl.maximum(code, 0.0), 255.0)
            tl.store(derivative_TF + offsets, code.to(tl.uint8), mask=mask)
        else:
            tl.store(derivative_TF + offsets, derivative, mask=mask)


@triton.jit(do_not_specialize=["numel"])
def gelu_bwd_kernel(dh_TF, derivative_TF, dz_TF, numel, CODED: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    dh = tl.load(dh_TF + offsets, mask=mask, other=0.0).to(tl.float32)
    derivative = tl.load(derivative_TF + offsets, mask=mask, other=0).to(tl.float32)
    if CODED:
        derivative = derivative * _STEP + _LOW
    tl.store(dz_TF + offsets, (dh * derivative).to(dz_TF.dtype.element_ty), mask=mask)


def gelu_(z_TF: Tensor, approximate: str, save: bool) -> Tensor:
    """GELU of contiguous z [T, F] in place; its derivative as uint8 codes (fp32 for fp32 z), empty uint8 [0] unless save."""
    coded = z_TF.dtype != torch.float32
    derivative_TF = z_TF.new_empty(z_TF.shape if save else 0, dtype=torch.uint8 if coded or not save else torch.float32)
    if z_TF.numel() > 0:
        gelu_kernel[(triton.cdiv(z_TF.numel(), BLOCK),)](z_TF, derivative_TF, z_TF.numel(), TANH=approximate == "tanh", SAVE=save,
                                                         CODED=coded, BLOCK=BLOCK, num_warps=WARPS)
    return derivative_TF


def gelu_bwd(dh_TF: Tensor, derivative_TF: Tensor) -> Tensor:
    """dz = dh * g' for contiguous dh [T, F] and what gelu_ saved."""
    dz_TF = torch.empty_like(dh_TF)
    if dh_TF.numel() > 0:
        gelu_bwd_kernel[(triton.cdiv(dh_TF.numel(), BLOCK),)](dh_TF, derivative_TF, dz_TF, dh_TF.numel(),
                                                              CODED=derivative_TF.dtype == torch.uint8, BLOCK=BLOCK,
                                                              num_warps=WARPS)
    return dz_TF
