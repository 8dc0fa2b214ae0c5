"""Quantised frozen weights [O, I] back to the compute dtype: every code read once, every weight written once.

fp8 is decoded from its bits: exact, and the same code on sm_80, which has no fp8 instructions, and in Triton's interpreter, whose
fp8 casts are wrong. A program writes TILE weights; a thread loads 16 bytes of codes at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ptv2_engine.kernels import nf4
from ptv2_engine.kernels.tuning import power_of_two
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

TILE = 4096
WIDEST = 2048


@triton.jit
def decode_e4m3(byte):
    """The float32 of the e4m3fn bits in an int32: 4 exponent bits of bias 7, 3 of mantissa, no infinities, NaN all ones."""
    low = byte & 0x7F
    normal = ((low << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    # a subnormal goes through an integer conversion: a float32 subnormal might be flushed
    magnitude = tl.where(low < 8, low.to(tl.float32) * 0.001953125, normal)
    magnitude = tl.where(low == 0x7F, float("nan"), magnitude)
    return tl.where(byte < 0x80, magnitude, -magnitude)


@triton.jit
def dequantise_rows_kernel(codes_OI, scales_O, out_OI, O, I, FP8: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offsets = rows.to(tl.int64)[:, None] * I + columns[None, :]
    mask = (rows < O)[:, None] & (columns < I)[None, :]
    codes = tl.load(codes_OI + offsets, mask=mask, other=0)
    scales = tl.load(scales_O + rows, mask=rows < O, other=0.0)
    if FP8:
        values = decode_e4m3(codes.to(tl.int32))
    else:
        values = codes.to(tl.float32)
    tl.store(out_OI + offsets, (values * scales[:, None]).to(out_OI.dtype.element_ty), mask=mask)


@triton.jit
def dequantise_nf4_kernel(codes, scales_B, levels_16, out, B, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    present = (blocks < B)[:, None]
    pairs = blocks[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    byte = tl.load(codes + pairs, mask=present, other=0).to(tl.int32)
    scales = tl.load(scales_B + blocks, mask=blocks < B, other=0.0)
    # 64 bytes that stay in L1: a load each costs less than the 15 selects of a tree
    values = tl.join(tl.load(levels_16 + (byte >> 4)), tl.load(levels_16 + (byte & 15))).reshape(BLOCKS, BLOCK)
    offsets = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + offsets, (values * scales[:, None]).to(out.dtype.element_ty), mask=present)


_levels: dict[torch.device, Tensor] = {}


def levels_on(device: torch.device) -> Tensor:
    """NF4's levels in the device's memory, made once: a copy from the host in every call would wait and could not be captured.
    A fake table is not kept: it would outlive the plan it was made for."""
    table = _levels.get(device)
    if table is None:
        table = torch.tensor(nf4.LEVELS, dtype=torch.float32, device=device)
        if not isinstance(table, FakeTensor):
            _levels[device] = table
    return table


def dequantise(codes: Tensor, scales: Tensor, kind: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight [rows, columns] in dtype; codes and scales contiguous, as quantise makes them."""
    out_OI = torch.empty((rows, columns), dtype=dtype, device=codes.device)
    if kind == "nf4":
        blocks = scales.shape[0]
        dequantise_nf4_kernel[(triton.cdiv(blocks * nf4.BLOCK, TILE),)](
            codes, scales, levels_on(codes.device), out_OI, blocks, BLOCKS=TILE // nf4.BLOCK, BLOCK=nf4.BLOCK, num_warps=4)
        return out_OI
    block = min(WIDEST, power_of_two(columns))
    grid = triton.cdiv(rows, TILE // block), triton.cdiv(columns, block)
    dequantise_rows_kernel[grid](codes.view(torch.uint8) if kind == "fp8" else codes, scales, out_OI, rows, columns,
                                 FP8=kind == "fp8", ROWS=TILE // block, BLOCK=block, num_warps=4)
    return out_OI
