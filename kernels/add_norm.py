"""add_norm: y = LayerNorm(s) * weight + bias with s = dropout(x) + residual, and its gradient with frozen weight and bias.

A program owns ROWS whole rows of H (padded to a power of two) and computes in fp32: mean, then the centred variance,
from registers. Saved: x_hat in x's dtype and 1/std in fp32; no dgamma, no dbeta, ever.
HBM: forward reads x, residual and writes y, x_hat; backward reads dy, x_hat and writes dresidual (and dx with dropout). A pre-LN
layer also wants s (one write more) and hands its gradient back (one read more). With keep "int8" x_hat is written and read as
codes with a scale for 64 columns: half the bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ptv2_engine.kernels.philox import HIDDEN, keep_tile, threshold_arg
from ptv2_engine.kernels.saved import XHAT_BLOCK, empty_norm
from ptv2_engine.kernels.tuning import choose_rows
from torch import Tensor


@triton.jit
def row_tile(first_row, T, H, ROWS: tl.constexpr, BLOCK_H: tl.constexpr):
    """int64 offsets [ROWS, BLOCK_H] into a contiguous [T, H] tensor, their mask, and the columns' own mask [1, BLOCK_H]."""
    rows = first_row + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_H)
    inside = (columns < H)[None, :]
    offsets = rows.to(tl.int64)[:, None] * H + columns[None, :]
    return offsets, (rows < T)[:, None] & inside, inside


@triton.jit
def normalise(x, inside, H, eps):
    """x_hat and 1/std of the rows of an fp32 tile whose padding columns are 0."""
    mean = tl.sum(x, 1) / H
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / H + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def scale_tile(first_row, T, H, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr):
    """Offsets [ROWS, BLOCK_H / GROUP] into scales [T, ceil(H / GROUP)], and their mask."""
    rows, groups = first_row + tl.arange(0, ROWS), tl.arange(0, BLOCK_H // GROUP)
    per_row = tl.cdiv(H, GROUP)
    return rows[:, None] * per_row + groups[None, :], (rows < T)[:, None] & (groups < per_row)[None, :]


@triton.jit
def store_codes(xhat_TH, scales, offsets, mask, xhat, first_row, T, H, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
                GROUP: tl.constexpr):
    """x_hat as int8, scaled by its largest magnitude in GROUP columns; padding columns are 0 and change no maximum."""
    grouped = tl.reshape(xhat, (ROWS, BLOCK_H // GROUP, GROUP))
    top = tl.max(tl.abs(grouped), 2)
    inverse = 127.0 / tl.where(top > 0.0, top, 1.0)
    codes = tl.reshape(tl.floor(grouped * inverse[:, :, None] + 0.5), (ROWS, BLOCK_H))
    tl.store(xhat_TH + offsets, codes.to(tl.int8), mask=mask)
    where, valid = scale_tile(first_row, T, H, ROWS, BLOCK_H, GROUP)
    tl.store(scales + where, top / 127.0, mask=valid)


@triton.jit
def load_saved(xhat_TH, scales, offsets, mask, first_row, T, H, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr):
    """x_hat in fp32, from its own dtype or from codes and scales."""
    xhat = tl.load(xhat_TH + offsets, mask=mask, other=0).to(tl.float32)
    if scales is not None:
        where, valid = scale_tile(first_row, T, H, ROWS, BLOCK_H, GROUP)
        scale = tl.load(scales + where, mask=valid, other=0.0)
        xhat = tl.reshape(tl.reshape(xhat, (ROWS, BLOCK_H // GROUP, GROUP)) * scale[:, :, None], (ROWS, BLOCK_H))
    return xhat


@triton.jit(do_not_specialize=["T", "threshold", "site"])
def add_norm_fwd_kernel(x_TH, residual_TH, weight_H, bias_H, y_TH, xhat_TH, rstd_T, scales, sum_TH, seed, T, H, eps, threshold,
                        keep_scale, site, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr, DROPOUT: tl.constexpr,
                        SAVE: tl.constexpr):
    first_row = tl.program_id(0) * ROWS
    offsets, mask, inside = row_tile(first_row, T, H, ROWS, BLOCK_H)
    x = tl.load(x_TH + offsets, mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        keep = keep_tile(first_row, 0, site * 0, site * 8 + HIDDEN, seed, threshold, ROWS, BLOCK_H)
        x = tl.where(keep, x * keep_scale, 0.0)
    x += tl.load(residual_TH + offsets, mask=mask, other=0.0).to(tl.float32)
    if sum_TH is not None:
        tl.store(sum_TH + offsets, x.to(sum_TH.dtype.element_ty), mask=mask)
    xhat, rstd = normalise(x, inside, H, eps)
    columns = tl.arange(0, BLOCK_H)
    weight = tl.load(weight_H + columns, mask=columns < H, other=0.0).to(tl.float32)
    bias = tl.load(bias_H + columns, mask=columns < H, other=0.0).to(tl.float32)
    y = xhat * weight[None, :] + bias[None, :]
    tl.store(y_TH + offsets, y.to(y_TH.dtype.element_ty), mask=mask)
    if SAVE:
        if scales is not None:
            store_codes(xhat_TH, scales, offsets, mask, xhat, first_row, T, H, ROWS, BLOCK_H, GROUP)
        else:
            tl.store(xhat_TH + offsets, xhat.to(xhat_TH.dtype.element_ty), mask=mask)
        rows = first_row + tl.arange(0, ROWS)
        tl.store(rstd_T + rows, rstd, mask=rows < T)


@triton.jit(do_not_specialize=["T", "threshold", "site"])
def add_norm_bwd_kernel(dy_TH, dsum_TH, xhat_TH, scales, rstd_T, weight_H, dresidual_TH, dx_TH, seed, T, H, threshold, keep_scale,
                        site, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr, DROPOUT: tl.constexpr):
    first_row = tl.program_id(0) * ROWS
    offsets, mask, inside = row_tile(first_row, T, H, ROWS, BLOCK_H)
    columns = tl.arange(0, BLOCK_H)
    rows = first_row + tl.arange(0, ROWS)
    xhat = load_saved(xhat_TH, scales, offsets, mask, first_row, T, H, ROWS, BLOCK_H, GROUP)
    weight = tl.load(weight_H + columns, mask=columns < H, other=0.0).to(tl.float32)
    dxhat = tl.load(dy_TH + offsets, mask=mask, other=0.0).to(tl.float32) * weight[None, :]
    rstd = tl.load(rstd_T + rows, mask=rows < T, other=0.0)
    mean_dxhat = tl.sum(dxhat, 1) / H
    mean_product = tl.sum(dxhat * xhat, 1) / H
    dsum = (dxhat - mean_dxhat[:, None] - xhat * mean_product[:, None]) * rstd[:, None]
    if dsum_TH is not None:
        dsum += tl.load(dsum_TH + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(dresidual_TH + offsets, dsum.to(dresidual_TH.dtype.element_ty), mask=mask)
    if DROPOUT:
        keep = keep_tile(first_row, 0, site * 0, site * 8 + HIDDEN, seed, threshold, ROWS, BLOCK_H)
        dx = tl.where(keep, dsum * keep_scale, 0.0)
        tl.store(dx_TH + offsets, dx.to(dx_TH.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def renorm_kernel(xhat_TH, scales, weight_H, bias_H, y_TH, T, H, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr):
    first_row = tl.program_id(0) * ROWS
    offsets, mask, _ = row_tile(first_row, T, H, ROWS, BLOCK_H)
    xhat = load_saved(xhat_TH, scales, offsets, mask, first_row, T, H, ROWS, BLOCK_H, GROUP)
    columns = tl.arange(0, BLOCK_H)
    weight = tl.load(weight_H + columns, mask=columns < H, other=0.0).to(tl.float32)
    bias = tl.load(bias_H + columns, mask=columns < H, other=0.0).to(tl.float32)
    tl.store(y_TH + offsets, (xhat * weight[None, :] + bias[None, :]).to(y_TH.dtype.element_ty), mask=mask)


def group_of(block: int) -> int:
    """Columns that share a scale inside a padded row: XHAT_BLOCK, or all of a row that is shorter."""
    return min(XHAT_BLOCK, block)


def add_norm_fwd(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float, dropout_p: float,
                 seed: Tensor | None, site: int, keep: str, with_sum: bool) -> tuple[Tensor, ...]:
    """y [T, H], x_hat [T, H] (int8 with keep "int8"), 1/std [T] (fp32; both empty [0] with keep "none"), scales (fp32
    [T, ceil(H / 64)], empty unless int8) and the sum [T, H] (empty unless with_sum). Contiguous inputs."""
    T, H = x_TH.shape
    y_TH, xhat_TH, rstd_T, scales, sum_TH = outputs = empty_norm(x_TH, keep, with_sum)
    if T > 0:
        config = choose_rows(H)
        add_norm_fwd_kernel[(triton.cdiv(T, config.rows),)](
            x_TH, residual_TH, weight_H, bias_H, y_TH, xhat_TH, rstd_T, scales if keep == "int8" else None,
            sum_TH if with_sum else None, seed if dropout_p > 0 else None, T, H, eps, threshold_arg(dropout_p),
            1.0 / (1.0 - dropout_p), site, ROWS=config.rows, BLOCK_H=config.block, GROUP=group_of(config.block),
            DROPOUT=dropout_p > 0, SAVE=keep != "none", num_warps=config.warps)
    return outputs


def add_norm_bwd(dy_TH: Tensor, dsum_TH: Tensor | None, xhat_TH: Tensor, scales: Tensor | None, rstd_T: Tensor, weight_H: Tensor,
                 dropout_p: float, seed: Tensor | None, site: int) -> tuple[Tensor, Tensor]:
    """dresidual [T, H] and dx [T, H]; without dropout they are equal and dx is empty [0]. Contiguous inputs.
    dsum_TH: the gradient of the sum, where it was asked for. scales: of an int8 x_hat."""
    T, H = dy_TH.shape
    dresidual_TH = torch.empty_like(dy_TH)
    dx_TH = dy_TH.new_empty((T, H) if dropout_p > 0 else 0)
    if T > 0:
        config = choose_rows(H)
        add_norm_bwd_kernel[(triton.cdiv(T, config.rows),)](
            dy_TH, dsum_TH, xhat_TH, scales, rstd_T, weight_H, dresidual_TH, dx_TH, seed if dropout_p > 0 else None, T, H,
            threshold_arg(dropout_p), 1.0 / (1.0 - dropout_p), site, ROWS=config.rows, BLOCK_H=config.block,
            GROUP=group_of(config.block), DROPOUT=dropout_p > 0, num_warps=config.warps)
    return dresidual_TH, dx_TH


def renorm(xhat_TH: Tensor, scales: Tensor | None, weight_H: Tensor, bias_H: Tensor, dtype: torch.dtype) -> Tensor:
    """y [T, H] = x_hat * weight + bias in dtype, from what add_norm_fwd kept."""
    T, H = xhat_TH.shape
    y_TH = xhat_TH.new_empty((T, H), dtype=dtype)
    if T > 0:
        config = choose_rows(H)
        renorm_kernel[(triton.cdiv(T, config.rows),)](xhat_TH, scales, weight_H, bias_H, y_TH, T, H, ROWS=config.rows,
                                                      BLOCK_H=config.block, GROUP=group_of(config.block), num_warps=config.warps)
    return y_TH
