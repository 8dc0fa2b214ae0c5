"""The band of distances of a tile: its table rows, the skewed read of its scores, and the skewed write of their gradient.

M queries from i0, N keys from j0. Column c of a band stands for distance i0 - j0 + c - (N - 1), so query ii and key jj of the
tile meet in column ii - jj + N - 1. Both skews are gathers along a row, through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def band_rows(table_RND, slots, n, N, offset, L, BLOCK_N: tl.constexpr, BAND: tl.constexpr, D: tl.constexpr,
              BLOCK_D: tl.constexpr):
    """[BAND, BLOCK_D] rows of head n for the distances of a tile; offset = i0 - j0. Distances beyond the slots take row 0, which
    no query or key of the sequence reads."""
    index = offset + tl.arange(0, BAND) - (BLOCK_N - 1) + L - 1
    rows = tl.load(slots + index, mask=(index >= 0) & (index < 2 * L - 1), other=0)
    columns = tl.arange(0, BLOCK_D)
    pointers = table_RND + rows.to(tl.int64)[:, None] * (N * D) + n * D + columns[None, :]
    if D < BLOCK_D:
        return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def meeting_column(M: tl.constexpr, BLOCK_N: tl.constexpr):
    """int32 [M, BLOCK_N]: the band column of each query and key of a tile."""
    return tl.arange(0, M)[:, None] - tl.arange(0, BLOCK_N)[None, :] + (BLOCK_N - 1)


@triton.jit
def relative_scores(q, k, rel_k_RND, rel_q_RND, slots, n, N, offset, L, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                    BAND: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """fp32 [BLOCK_M, BLOCK_N]: c2p + p2c of a tile, unscaled. A table that is None adds nothing."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if rel_k_RND is not None:
        band = tl.dot(q, tl.trans(band_rows(rel_k_RND, slots, n, N, offset, L, BLOCK_N, BAND, D, BLOCK_D)),
                      input_precision=PRECISION)
        total += tl.gather(band, meeting_column(BLOCK_M, BLOCK_N), 1)
    if rel_q_RND is not None:
        band = tl.dot(k, tl.trans(band_rows(rel_q_RND, slots, n, N, offset, L, BLOCK_N, BAND, D, BLOCK_D)),
                      input_precision=PRECISION)
        total += tl.trans(tl.gather(band, tl.trans(meeting_column(BLOCK_M, BLOCK_N)), 1))
    return total


@triton.jit
def skewed_by_query(ds, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """[BLOCK_M, BAND] from dS [BLOCK_M, BLOCK_N]: each element moved to its band column, zero elsewhere."""
    key = tl.arange(0, BLOCK_M)[:, None] - tl.arange(0, BAND)[None, :] + (BLOCK_N - 1)
    inside = (key >= 0) & (key < BLOCK_N)
    moved = tl.gather(ds, tl.minimum(tl.maximum(key, 0), BLOCK_N - 1), 1)
    return tl.where(inside, moved, tl.zeros_like(moved))


@triton.jit
def skewed_by_key(ds, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """[BLOCK_N, BAND] from dS with keys as rows, [BLOCK_N, BLOCK_M]."""
    query = tl.arange(0, BLOCK_N)[:, None] + tl.arange(0, BAND)[None, :] - (BLOCK_N - 1)
    inside = (query >= 0) & (query < BLOCK_M)
    moved = tl.gather(ds, tl.minimum(tl.maximum(query, 0), BLOCK_M - 1), 1)
    return tl.where(inside, moved, tl.zeros_like(moved))
