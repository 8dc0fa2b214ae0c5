"""GELU in place on the matrix product's output, its derivative in one byte, and the backward product.

One read and one write of z, and one write of the code; backward reads dh and the code and writes dz. The code of a 16-bit
activation is round((g' + 0.13) * 255 / 1.26), fp32 keeps g' itself; with 6 bits (multiples of 1/49: 0 and 1 are exact)
four codes take three bytes, one code of each quarter of a row, so that no lane needs its neighbour's. tanh is written with exp:
libdevice is not in the interpreter, and exp of a negative argument neither overflows nor cancels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ptv2_engine.kernels.saved import empty_derivative
from torch import Tensor

BLOCK = 2048
PACKED_BLOCK = 512      # of each quarter
WARPS = 8

_CODES_PER_UNIT = tl.constexpr(255.0 / 1.26)
_STEP = tl.constexpr(1.26 / 255.0)
_LOW = tl.constexpr(-0.13)
_CODES_PER_UNIT_6 = tl.constexpr(49.0)
_STEP_6 = tl.constexpr(1.0 / 49.0)
_LOW_6 = tl.constexpr(-1.0 / 7.0)


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


@triton.jit
def gelu_quarter(z, at, mask, TANH: tl.constexpr):
    """GELU in place of some elements; their 6-bit codes."""
    h, derivative = gelu_and_derivative(tl.load(z + at, mask=mask, other=0.0).to(tl.float32), TANH)
    tl.store(z + at, h.to(z.dtype.element_ty), mask=mask)
    code = tl.floor((derivative - _LOW_6) * _CODES_PER_UNIT_6 + 0.5)
    return tl.minimum(tl.maximum(code, 0.0), 63.0).to(tl.int32)


@triton.jit(do_not_specialize=["count"])
def gelu_packed_kernel(z_TF, packed, count, quarter, TANH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    row = at // quarter
    columns, bytes_at = row * 3 * quarter + at, row * 2 * quarter + at       # of 4 and of 3 quarters a row
    last = gelu_quarter(z_TF, columns + 3 * quarter, mask, TANH)
    for k in tl.static_range(3):
        code = gelu_quarter(z_TF, columns + k * quarter, mask, TANH)
        tl.store(packed + bytes_at + k * quarter, (code | ((last >> 2 * k & 3) << 6)).to(tl.uint8), mask=mask)


@triton.jit
def store_product(dh_TF, dz_TF, at, mask, code):
    dz = tl.load(dh_TF + at, mask=mask, other=0.0).to(tl.float32) * (code.to(tl.float32) * _STEP_6 + _LOW_6)
    tl.store(dz_TF + at, dz.to(dz_TF.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def gelu_packed_bwd_kernel(dh_TF, packed, dz_TF, count, quarter, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    row = at // quarter
    columns, bytes_at = row * 3 * quarter + at, row * 2 * quarter + at
    last = tl.zeros([BLOCK], tl.int32)
    for k in tl.static_range(3):
        byte = tl.load(packed + bytes_at + k * quarter, mask=mask, other=0).to(tl.int32)
        last |= (byte >> 6) << 2 * k
        store_product(dh_TF, dz_TF, columns + k * quarter, mask, byte & 63)
    store_product(dh_TF, dz_TF, columns + 3 * quarter, mask, last)


def gelu_(z_TF: Tensor, approximate: str, save: bool, bits: int) -> Tensor:
    """GELU of contiguous z [T, F] in place; its derivative as uint8 codes (fp32 for fp32 z), empty uint8 [0] unless save; with
    6 bits uint8 [T, 3, F / 4]."""
    derivative_TF = empty_derivative(z_TF, save, bits)
    if save and bits == 6:
        count, quarter = z_TF.numel() // 4, z_TF.shape[1] // 4
        if count > 0:
            gelu_packed_kernel[(triton.cdiv(count, PACKED_BLOCK),)](z_TF, derivative_TF, count, quarter, num_warps=WARPS,
                                                                    TANH=approximate == "tanh", BLOCK=PACKED_BLOCK)
        return derivative_TF
    coded = z_TF.dtype != torch.float32
    if z_TF.numel() > 0:
        gelu_kernel[(triton.cdiv(z_TF.numel(), BLOCK),)](z_TF, derivative_TF, z_TF.numel(), TANH=approximate == "tanh", SAVE=save,
                                                         CODED=coded, BLOCK=BLOCK, num_warps=WARPS)
    return derivative_TF


def gelu_bwd(dh_TF: Tensor, derivative_TF: Tensor, bits: int) -> Tensor:
    """dz = dh * g' for contiguous dh [T, F] and what gelu_ saved in as many bits."""
    dz_TF = torch.empty_like(dh_TF)
    if bits == 6:
        count, quarter = dh_TF.numel() // 4, dh_TF.shape[1] // 4
        if count > 0:
            gelu_packed_bwd_kernel[(triton.cdiv(count, PACKED_BLOCK),)](dh_TF, derivative_TF, dz_TF, count, quarter,
                                                                        BLOCK=PACKED_BLOCK, num_warps=WARPS)
        return dz_TF
    if dh_TF.numel() > 0:
        gelu_bwd_kernel[(triton.cdiv(dh_TF.numel(), BLOCK),)](dh_TF, derivative_TF, dz_TF, dh_TF.numel(),
                                                              CODED=derivative_TF.dtype == torch.uint8, BLOCK=BLOCK,
                                                              num_warps=WARPS)
    return dz_TF
