"""The gradient of the shared prefix: partial sums over parts of the batch, then their sum in a fixed order.

Every query of every sequence adds to dPk, dPv [K, P, N, D]. One program per key block would walk all T queries alone, and atomics
would make the result depend on scheduling. So the batch is cut into (sequence groups x query groups) by shape alone
(tuning.choose_splits); a program keeps one key block of one prompt and head in registers, visits its share of the sequences
that use this prompt, and writes one fp32 partial; a second kernel adds the partials of each element always in the same order.
Rows past a prompt's length and prompts nobody uses get 0. With prefix dropout every sequence has masks of its own: its masked
keys and values, and its sums before their mask, pass through scratch memory in L2, because a whole tile's masks and two more
accumulators do not fit the registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ptv2_engine.kernels.attention_tile import (
    LOG2E,
    key_probabilities,
    load_prefix,
    load_stat,
    load_tile,
    prefix_keep,
    store_tile,
)
from ptv2_engine.kernels.philox import PREFIX_K, PREFIX_PROB, PREFIX_V
from ptv2_engine.kernels.tuning import TileConfig, choose_splits
from torch import Tensor

REDUCE_ROWS, REDUCE_COLUMNS = 16, 128


@triton.jit
def copy_masked(target, source, first_row, row_stride, source_stride, num_rows, first_key, c2, seed, threshold, site, stream,
                R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows first_key.. of source under this sequence's prefix mask, to rows first_row.. of target, 8 at a time as below."""
    tl.debug_barrier()
    for r in range(0, tl.minimum(num_rows, R), 8):        # a bound unknown to the compiler: unrolled, the masks would spill
        x = load_prefix(source, first_key + r, source_stride, first_key + num_rows, c2, seed, threshold, site, stream, True, 8, D,
                        BLOCK_D)
        store_tile(target, first_row + r, row_stride, num_rows - r, x, 8, D, BLOCK_D)
    tl.debug_barrier()


@triton.jit
def add_masked(total, raw, first_row, row_stride, num_rows, first_key, c2, seed, threshold, factor, site, stream, x,
               R: tl.constexpr,
               D: tl.constexpr, BLOCK_D: tl.constexpr):
    """total += x * factor under this sequence's prefix mask, for rows of total and raw that only this program touches.

    x goes through memory (L2) and comes back 8 rows at a time: mask, x and running sum of a whole tile would not fit the
    registers. The barriers let one thread read what another one wrote.
    """
    tl.debug_barrier()
    store_tile(raw, first_row, row_stride, num_rows, x, R, D, BLOCK_D)
    tl.debug_barrier()
    for r in range(0, tl.minimum(num_rows, R), 8):        # a bound unknown to the compiler: unrolled, the masks would spill
        part = load_tile(raw, first_row + r, row_stride, num_rows - r, 8, D, BLOCK_D)
        keep = prefix_keep(first_key + r, c2, seed, threshold, site, stream, 8, BLOCK_D)
        part = tl.where(keep, part * factor, 0.0) + load_tile(total, first_row + r, row_stride, num_rows - r, 8, D, BLOCK_D)
        store_tile(total, first_row + r, row_stride, num_rows - r, part, 8, D, BLOCK_D)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["T", "B", "P", "K", "groups", "query_groups", "threshold", "prefix_threshold", "site"])
def prefix_grad_kernel(dout_TND, q_TND, prefix_k, prefix_v, lse_NT, delta_NT, partial_2CKPND, raw_2CKPND, masked_2CKPND,
                       cu_seqlens, prompt_ids, prompt_lengths,
                       seed, q_row, pk_prompt, pk_row, pv_prompt, pv_row, T, B, P, K, N, groups, query_groups, scale, threshold,
                       keep_scale, prefix_threshold, prefix_scale, site, D: tl.constexpr, BLOCK_D: tl.constexpr,
                       BLOCK_M: tl.constexpr,
                       BLOCK_P: tl.constexpr, DROPOUT: tl.constexpr, PREFIX_DROPOUT: tl.constexpr, PRECISION: tl.constexpr):
    split, n, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    prompt, first_key = block % K, block // K * BLOCK_P
    group, query_group = split % groups, split // groups
    num_prefix = tl.load(prompt_lengths + prompt).to(tl.int32) if prompt_lengths is not None else P
    if first_key >= num_prefix:
        return
    scale2 = scale * LOG2E
    pk_base = prefix_k + prompt.to(tl.int64) * pk_prompt + n * D
    pv_base = prefix_v + prompt.to(tl.int64) * pv_prompt + n * D
    row = (split * K + prompt).to(tl.int64) * P + first_key
    row_v = row + (groups * query_groups * K).to(tl.int64) * P
    dpk = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    dpv = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    if PREFIX_DROPOUT:
        store_tile(partial_2CKPND + n * D, row, N * D, num_prefix - first_key, dpk, BLOCK_P, D, BLOCK_D)
        store_tile(partial_2CKPND + n * D, row_v, N * D, num_prefix - first_key, dpv, BLOCK_P, D, BLOCK_D)
    else:
        k = load_tile(pk_base, first_key, pk_row, num_prefix - first_key, BLOCK_P, D, BLOCK_D)
        v = load_tile(pv_base, first_key, pv_row, num_prefix - first_key, BLOCK_P, D, BLOCK_D)
    for b in range(group, B, groups):
        start = tl.load(cu_seqlens + b)
        length = tl.load(cu_seqlens + b + 1) - start
        if prompt_ids is not None:
            length = tl.where(tl.load(prompt_ids + b) == prompt, length, 0)
        c2 = b * N + n
        stat_row = n.to(tl.int64) * T + start
        if PREFIX_DROPOUT:
            # cu_seqlens[0] is 0. Reading it here keeps the addresses below out of registers during the loop over queries.
            here, here_v = row + tl.load(cu_seqlens), row_v + tl.load(cu_seqlens)
            copy_masked(masked_2CKPND + n * D, pk_base, here, N * D, pk_row, num_prefix - first_key, first_key, c2, seed,
                        prefix_threshold, site, PREFIX_K, BLOCK_P, D, BLOCK_D)
            copy_masked(masked_2CKPND + n * D, pv_base, here_v, N * D, pv_row, num_prefix - first_key, first_key, c2, seed,
                        prefix_threshold, site, PREFIX_V, BLOCK_P, D, BLOCK_D)
            k = load_tile(masked_2CKPND + n * D, here, N * D, num_prefix - first_key, BLOCK_P, D, BLOCK_D)
            v = load_tile(masked_2CKPND + n * D, here_v, N * D, num_prefix - first_key, BLOCK_P, D, BLOCK_D)
            dpk = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
            dpv = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
        # Tiles are dealt out round robin, shifted by b: short sequences do not all fall to the first query group.
        for i in range((query_group + b) % query_groups * BLOCK_M, length, query_groups * BLOCK_M):
            q = load_tile(q_TND + n * D, start + i, q_row, length - i, BLOCK_M, D, BLOCK_D)
            do = load_tile(dout_TND + n * D, start + i, N * D, length - i, BLOCK_M, D, BLOCK_D)
            lse2 = load_stat(lse_NT, stat_row + i, length - i, float("inf"), BLOCK_M) * LOG2E
            delta = load_stat(delta_NT, stat_row + i, length - i, 0.0, BLOCK_M)
            probs, dropped, dprobs = key_probabilities(q, do, k, v, lse2, num_prefix - first_key, scale2 * prefix_scale,
                                                       prefix_scale, i, first_key, c2, PREFIX_PROB, seed,
                                                   threshold, keep_scale, site, BLOCK_M, BLOCK_P, DROPOUT, PRECISION)
            dpv = tl.dot(dropped.to(do.dtype), do, dpv, input_precision=PRECISION)
            ds = (probs * (dprobs - delta[None, :])).to(q.dtype)
            dpk = tl.dot(ds, q, dpk, input_precision=PRECISION)
        if PREFIX_DROPOUT:
            # An `if length > 0`, written as a loop of one turn: on sm_100 Triton 3.6 fails on an if that reads both accumulators.
            for _ in range(0, tl.minimum(length, 1)):
                here, here_v = row + tl.load(cu_seqlens), row_v + tl.load(cu_seqlens)
                add_masked(partial_2CKPND + n * D, raw_2CKPND + n * D, here, N * D, num_prefix - first_key, first_key, c2, seed,
                           prefix_threshold, scale * prefix_scale, site, PREFIX_K, dpk, BLOCK_P, D, BLOCK_D)
                add_masked(partial_2CKPND + n * D, raw_2CKPND + n * D, here_v, N * D, num_prefix - first_key, first_key, c2, seed,
                           prefix_threshold, prefix_scale, site, PREFIX_V, dpv, BLOCK_P, D, BLOCK_D)
    if not PREFIX_DROPOUT:
        store_tile(partial_2CKPND + n * D, row, N * D, num_prefix - first_key, dpk * scale, BLOCK_P, D, BLOCK_D)
        store_tile(partial_2CKPND + n * D, row_v, N * D, num_prefix - first_key, dpv, BLOCK_P, D, BLOCK_D)


@triton.jit(do_not_specialize=["C", "K", "P"])
def reduce_kernel(partial, dprefix_k_KPND, dprefix_v_KPND, prompt_ids, prompt_lengths, C, K, P, row_size,
                  BY_SEQUENCE: tl.constexpr,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """dprefix[k, e] = sum over c of partial[c, k, e], or of partial[c, e] of the sequences c with prompt k."""
    prompt, which = tl.program_id(1), tl.program_id(2)
    elements = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    size = P.to(tl.int64) * row_size
    num_prefix = tl.load(prompt_lengths + prompt).to(tl.int32) if prompt_lengths is not None else P
    used = elements < num_prefix * row_size
    stride = size if BY_SEQUENCE else size * K
    base = partial + which * C * stride + (0 if BY_SEQUENCE else prompt * size) + elements
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, C, ROWS):
        rows = first + tl.arange(0, ROWS)
        mine = rows < C
        if BY_SEQUENCE:
            if prompt_ids is not None:
                mine = mine & (tl.load(prompt_ids + rows, mask=mine, other=-1) == prompt)
            else:
                mine = mine & (prompt == 0)
        total += tl.load(base[None, :] + rows.to(tl.int64)[:, None] * stride, mask=mine[:, None] & used[None, :], other=0.0)
    result = tl.sum(total, 0)
    offsets = prompt.to(tl.int64) * size + elements
    if which == 0:
        tl.store(dprefix_k_KPND + offsets, result, mask=elements < size)
    else:
        tl.store(dprefix_v_KPND + offsets, result, mask=elements < size)


def reduce(partial: Tensor, dprefix: tuple[Tensor, Tensor], prompt_ids: Tensor | None, prompt_lengths: Tensor | None,
           by_sequence: bool) -> None:
    """Add partial [2, C, P, N, D] (one a sequence) or [2, C, K, P, N, D] into dprefix = (dPk, dPv) [K, P, N, D]."""
    K, P, N, D = dprefix[0].shape
    reduce_kernel[(triton.cdiv(P * N * D, REDUCE_COLUMNS), K, 2)](
        partial, *dprefix, prompt_ids, prompt_lengths, partial.shape[1], K, P, N * D, BY_SEQUENCE=by_sequence, ROWS=REDUCE_ROWS,
        COLUMNS=REDUCE_COLUMNS, num_warps=4)


def prefix_bwd(inputs: tuple, lse_NT: Tensor, delta_NT: Tensor, dprefix: tuple[Tensor, Tensor], max_seqlen: int, run: dict,
               fixed: dict,
               tiles: TileConfig) -> None:
    """Fill dprefix = (dPk, dPv) [K, P, N, D]. inputs: dout, q, k, v, prefix_k, prefix_v; run, fixed: plain_arguments' two."""
    dout_TND, q_TND, _, _, prefix_k, prefix_v = inputs
    K, P, N, D = dprefix[0].shape
    blocks = triton.cdiv(P, tiles.block_p) * K
    groups, query_groups = choose_splits(run["B"], triton.cdiv(max_seqlen, tiles.block_m), blocks * N)
    partial = dprefix[0].new_empty((2, groups * query_groups, K, P, N, D))
    raw = torch.empty_like(partial) if fixed["PREFIX_DROPOUT"] else None
    masked = torch.empty_like(partial, dtype=q_TND.dtype) if fixed["PREFIX_DROPOUT"] else None
    arguments = {name: value for name, value in run.items() if name not in ("k_row", "v_row")}
    # With no ids every sequence uses prompt 0: the other prompts' programs must not count them.
    prompt_ids = run["prompt_ids"] if run["prompt_ids"] is not None or K == 1 else run["cu_seqlens"].new_zeros(run["B"])
    prefix_grad_kernel[(groups * query_groups, N, blocks)](
        dout_TND, q_TND, prefix_k, prefix_v, lse_NT, delta_NT, partial, raw, masked, **arguments | {"prompt_ids": prompt_ids},
        K=K, groups=groups,
        query_groups=query_groups, **fixed, BLOCK_M=tiles.block_m, BLOCK_P=tiles.block_p, **tiles.launch)
    reduce(partial, dprefix, prompt_ids, run["prompt_lengths"], by_sequence=False)
