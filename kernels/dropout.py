"""y = x * keep / (1 - p): a program reads and writes a tile of ROWS x COLUMNS elements once; the mask is drawn in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from ptv2_engine.kernels.philox import HIDDEN, keep_tile, threshold_arg
from torch import Tensor

ROWS, COLUMNS = 8, 256


@triton.jit(do_not_specialize=["T", "threshold", "site"])
def dropout_kernel(x_TH, y_TH, seed, T, H, threshold, keep_scale, site, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    first_row, first_column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    rows, columns = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    mask = (rows < T)[:, None] & (columns < H)[None, :]
    offsets = rows.to(tl.int64)[:, None] * H + columns[None, :]
    keep = keep_tile(first_row, first_column, site * 0, site * 8 + HIDDEN, seed, threshold, ROWS, COLUMNS)
    x = tl.load(x_TH + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_TH + offsets, tl.where(keep, x * keep_scale, 0.0).to(y_TH.dtype.element_ty), mask=mask)


def dropout(x_TH: Tensor, p: float, seed: Tensor, site: int) -> Tensor:
    """y like x [T, H], contiguous."""
    T, H = x_TH.shape
    y_TH = x_TH.new_empty((T, H))
    if y_TH.numel() > 0:
        dropout_kernel[(triton.cdiv(T, ROWS), triton.cdiv(H, COLUMNS))](
            x_TH, y_TH, seed, T, H, threshold_arg(p), 1.0 / (1.0 - p), site, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4)
    return y_TH
