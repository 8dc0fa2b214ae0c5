"""embedding: x = dropout(LayerNorm(word[ids] + position[positions] + type[types])), forward only (the tables are frozen).

A program gathers ROWS tokens' rows, sums them in fp32 and normalises them in registers. HBM: three gathered rows read (the
position and type tables stay in L2), one row written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from ptv2_engine.kernels.add_norm import normalise, row_tile
from ptv2_engine.kernels.philox import HIDDEN, keep_tile, threshold_arg
from ptv2_engine.kernels.tuning import choose_rows
from torch import Tensor


@triton.jit(do_not_specialize=["T", "threshold", "site"])
def embedding_kernel(word_ids_T, position_ids_T, token_type_ids_T, word_VE, position_ME, type_UE, weight_E, bias_E, x_TE, seed,
                     T, E, eps, threshold, keep_scale, site, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, DROPOUT: tl.constexpr):
    first_row = tl.program_id(0) * ROWS
    offsets, mask, inside = row_tile(first_row, T, E, ROWS, BLOCK_E)
    rows = first_row + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_E)
    present = rows < T
    ids = tl.load(word_ids_T + rows, mask=present, other=0).to(tl.int64)
    x = tl.load(word_VE + ids[:, None] * E + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if position_ME is not None:
        positions = tl.load(position_ids_T + rows, mask=present, other=0).to(tl.int64)
        x += tl.load(position_ME + positions[:, None] * E + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if type_UE is not None:
        if token_type_ids_T is not None:
            types = tl.load(token_type_ids_T + rows, mask=present, other=0).to(tl.int64)
            x += tl.load(type_UE + types[:, None] * E + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        else:
            x += tl.load(type_UE + columns, mask=columns < E, other=0.0).to(tl.float32)[None, :]
    xhat, _ = normalise(x, inside, E, eps)
    weight = tl.load(weight_E + columns, mask=columns < E, other=0.0).to(tl.float32)
    bias = tl.load(bias_E + columns, mask=columns < E, other=0.0).to(tl.float32)
    y = xhat * weight[None, :] + bias[None, :]
    if DROPOUT:
        keep = keep_tile(first_row, 0, site * 0, site * 8 + HIDDEN, seed, threshold, ROWS, BLOCK_E)
        y = tl.where(keep, y * keep_scale, 0.0)
    tl.store(x_TE + offsets, y.to(x_TE.dtype.element_ty), mask=mask)


def embedding(word_ids_T: Tensor, position_ids_T: Tensor, token_type_ids_T: Tensor | None, word_VE: Tensor,
              position_ME: Tensor | None, type_UE: Tensor | None, weight_E: Tensor, bias_E: Tensor, eps: float,
              dropout_p: float, seed: Tensor | None, site: int) -> Tensor:
    """x [T, E] in the tables' dtype. Tables contiguous; no type ids means row 0 of the type table, when there is one."""
    T, E = word_ids_T.shape[0], word_VE.shape[1]
    x_TE = word_VE.new_empty((T, E))
    if T > 0:
        config = choose_rows(E)
        embedding_kernel[(triton.cdiv(T, config.rows),)](
            word_ids_T, position_ids_T, token_type_ids_T, word_VE, position_ME, type_UE, weight_E, bias_E, x_TE,
            seed if dropout_p > 0 else None, T, E, eps, threshold_arg(dropout_p), 1.0 / (1.0 - dropout_p), site,
            ROWS=config.rows, BLOCK_E=config.block, DROPOUT=dropout_p > 0, num_warps=config.warps)
    return x_TE
