"""GEGLU, h = gelu(a) * g with [a ; g] = z [T, 2F], and its gradient: each element of z read once, h or dz written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ptv2_engine.kernels.linear_gelu import gelu_and_derivative
from torch import Tensor

BLOCK = 1024


@triton.jit
def geglu_fwd_kernel(z_TG, h_TF, F, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < F
    a = tl.load(z_TG + row * 2 * F + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(z_TG + row * 2 * F + F + columns, mask=mask, other=0.0).to(tl.float32)
    h, _ = gelu_and_derivative(a, False)
    tl.store(h_TF + row * F + columns, (h * gate).to(h_TF.dtype.element_ty), mask=mask)


@triton.jit
def geglu_bwd_kernel(dh_TF, z_TG, dz_TG, F, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < F
    a = tl.load(z_TG + row * 2 * F + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(z_TG + row * 2 * F + F + columns, mask=mask, other=0.0).to(tl.float32)
    dh = tl.load(dh_TF + row * F + columns, mask=mask, other=0.0).to(tl.float32)
    h, derivative = gelu_and_derivative(a, False)
    tl.store(dz_TG + row * 2 * F + columns, (dh * gate * derivative).to(dz_TG.dtype.element_ty), mask=mask)
    tl.store(dz_TG + row * 2 * F + F + columns, (dh * h).to(dz_TG.dtype.element_ty), mask=mask)


def geglu_fwd(z_TG: Tensor) -> Tensor:
    """h [T, F] of contiguous z [T, 2F]."""
    T, G = z_TG.shape
    h_TF = z_TG.new_empty((T, G // 2))
    if h_TF.numel():
        geglu_fwd_kernel[(T, triton.cdiv(G // 2, BLOCK))](z_TG, h_TF, G // 2, BLOCK=BLOCK, num_warps=4)
    return h_TF


def geglu_bwd(dh_TF: Tensor, z_TG: Tensor) -> Tensor:
    """dz [T, 2F] of contiguous dh [T, F] and z."""
    T, F = dh_TF.shape
    dz_TG = torch.empty_like(z_TG)
    if dh_TF.numel():
        geglu_bwd_kernel[(T, triton.cdiv(F, BLOCK))](dh_TF, z_TG, dz_TG, F, BLOCK=BLOCK, num_warps=4)
    return dz_TG
