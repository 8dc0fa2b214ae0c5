"""Rotary positions on the queries and keys of a fused projection, in place: a program turns ROWS rows of one part and head.

Each element is read and written once; the angles come from a table of cosines and sines, fp32 [L, D].
"""

from __future__ import annotations

import triton
import triton.language as tl
from ptv2_engine.kernels.tuning import power_of_two
from torch import Tensor

ROWS = 32


@triton.jit(do_not_specialize=["T"])
def rotary_kernel(qkv_T3ND, cos_sin_LD, positions_T, T, N, D: tl.constexpr, BLOCK_H: tl.constexpr, INVERSE: tl.constexpr,
                  ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_H)
    half = D // 2
    mask = (rows < T)[:, None] & (columns < half)[None, :]
    positions = tl.load(positions_T + rows, mask=rows < T, other=0)
    angles = cos_sin_LD + positions[:, None] * D + columns[None, :]
    cos = tl.load(angles, mask=mask, other=1.0)
    sin = tl.load(angles + half, mask=mask, other=0.0)
    if INVERSE:
        sin = -sin
    # program_id(1) counts part * N + head of the first two of the three parts
    first = qkv_T3ND + rows.to(tl.int64)[:, None] * (3 * N * D) + tl.program_id(1) * D + columns[None, :]
    x1 = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(first + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(first, (x1 * cos - x2 * sin).to(qkv_T3ND.dtype.element_ty), mask=mask)
    tl.store(first + half, (x2 * cos + x1 * sin).to(qkv_T3ND.dtype.element_ty), mask=mask)


def rotary_(qkv_T3ND: Tensor, cos_sin_LD: Tensor, positions_T: Tensor, inverse: bool) -> None:
    """Turn parts 0 and 1 of qkv [T, 3, N, D] in place; positions_T int64 [T], rows of cos_sin_LD fp32 [L, D]. Contiguous."""
    T, _, N, D = qkv_T3ND.shape
    if T > 0:
        rotary_kernel[(triton.cdiv(T, ROWS), 2 * N)](qkv_T3ND, cos_sin_LD, positions_T, T, N, D=D,
                                                     BLOCK_H=power_of_two(D // 2), INVERSE=inverse, ROWS=ROWS, num_warps=4)
