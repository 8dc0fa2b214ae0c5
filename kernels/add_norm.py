"""add_norm: y = LayerNorm(s) * weight + bias with s = dropout(x) + residual, and its gradient with frozen weight and bias.

A program owns ROWS whole rows of H (padded to a power of two) and computes in fp32: mean, then the centred variance,
from registers. Saved: x_hat in x's dtype and 1/std in fp32; no dgamma, no dbeta, ever.
HBM: forward reads x, residual and writes y, x_hat; backward reads dy, x_hat and writes dresidual (and dx with dropout). A pre-LN
layer also wants s (one write more) and hands its gradient back (one read more).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ptv2_engine.kernels.philox import HIDDEN, keep_tile, threshold_arg
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


@triton.jit(do_not_specialize=["T", "threshold", "site"])
def add_norm_fwd_kernel(x_TH, residual_TH, weight_H, bias_H, y_TH, xhat_TH, rstd_T, sum_TH, seed, T, H, eps, threshold,
                        keep_scale, site, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, DROPOUT: tl.constexpr, SAVE: tl.constexpr):
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
        tl.store(xhat_TH + offsets, xhat.to(xhat_TH.dtype.element_ty), mask=mask)
        rows = first_row + tl.arange(0, ROWS)
        tl.store(rstd_T + rows, rstd, mask=rows < T)


@triton.jit(do_not_specialize=["T", "threshold", "site"])
def add_norm_bwd_kernel(dy_TH, dsum_TH, xhat_TH, rstd_T, weight_H, dresidual_TH, dx_TH, seed, T, H, threshold, keep_scale, site,
                        ROWS: tl.constexpr, BLOCK_H: tl.constexpr, DROPOUT: tl.constexpr):
    first_row = tl.program_id(0) * ROWS
    offsets, mask, inside = row_tile(first_row, T, H, ROWS, BLOCK_H)
    columns = tl.arange(0, BLOCK_H)
    rows = first_row + tl.arange(0, ROWS)
    xhat = tl.load(xhat_TH + offsets, mask=mask, other=0.0).to(tl.float32)
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


def add_norm_fwd(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float, dropout_p: float,
                 seed: Tensor | None, site: int, save: bool, with_sum: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [T, H], x_hat [T, H], 1/std [T] (fp32; both empty [0] unless save) and the sum [T, H] (empty unless with_sum).
    Contiguous inputs."""
    T, H = x_TH.shape
    y_TH = torch.empty_like(x_TH)
    xhat_TH = x_TH.new_empty((T, H) if save else 0)
    rstd_T = x_TH.new_empty(T if save else 0, dtype=torch.float32)
    sum_TH = x_TH.new_empty((T, H) if with_sum else 0)
    if T > 0:
        config = choose_rows(H)
        add_norm_fwd_kernel[(triton.cdiv(T, config.rows),)](
            x_TH, residual_TH, weight_H, bias_H, y_TH, xhat_TH, rstd_T, sum_TH if with_sum else None,
            seed if dropout_p > 0 else None, T, H, eps, threshold_arg(dropout_p), 1.0 / (1.0 - dropout_p), site,
            ROWS=config.rows, BLOCK_H=config.block, DROPOUT=dropout_p > 0, SAVE=save, num_warps=config.warps)
    return y_TH, xhat_TH, rstd_T, sum_TH


def add_norm_bwd(dy_TH: Tensor, dsum_TH: Tensor | None, xhat_TH: Tensor, rstd_T: Tensor, weight_H: Tensor, dropout_p: float,
                 seed: Tensor | None, site: int) -> tuple[Tensor, Tensor]:
    """dresidual [T, H] and dx [T, H]; without dropout they are equal and dx is empty [0]. Contiguous inputs.
    dsum_TH: the gradient of the sum, where it was asked for."""
    T, H = dy_TH.shape
    dresidual_TH = torch.empty_like(dy_TH)
    dx_TH = dy_TH.new_empty((T, H) if dropout_p > 0 else 0)
    if T > 0:
        config = choose_rows(H)
        add_norm_bwd_kernel[(triton.cdiv(T, config.rows),)](
            dy_TH, dsum_TH, xhat_TH, rstd_T, weight_H, dresidual_TH, dx_TH, seed if dropout_p > 0 else None, T, H,
            threshold_arg(dropout_p), 1.0 / (1.0 - dropout_p), site, ROWS=config.rows, BLOCK_H=config.block,
            DROPOUT=dropout_p > 0, num_warps=config.warps)
    return dresidual_TH, dx_TH
