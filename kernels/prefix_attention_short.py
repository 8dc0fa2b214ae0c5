"""Prefix attention of batches full of short rows: programs own packed tokens, whichever sequences these belong to.

One (sequence, head) a program, as in prefix_attention.py, leaves most of a tile empty where sequences have 10 to 40 tokens. Here
every query row knows where its own sequence starts and ends, and keys outside have no probability. The prefix's columns are
shared by all rows, so all sequences must use one prompt, undropped.

Forward: one program owns (BLOCK_M packed queries, head); keys stream from the first row's sequence to the last row's. The grid is
ceil(T / BLOCK_M) x N, no tile but the last has an empty row, and no program returns early.
Backward: one program owns (the sequences that START in a window of packed tokens, head). It takes as many of them at a time as
fit its key block, which then lie on chip as in sweep_kernel, and leaves one partial prefix gradient for them all. Windows need no
list: a program finds its sequences from cu_seqlens, the number of windows follows from T alone, and all hold about as much.

A sequence whose values overflow to inf or NaN takes those beside it along: 0 * inf.
"""

from __future__ import annotations

import triton
import triton.language as tl
from ptv2_engine.kernels.attention_tile import (
    LN2,
    LOG2E,
    attend,
    key_probabilities,
    load_stat,
    load_tile,
    row_bounds,
    sequence_of,
    store_tile,
    zero_rows,
)
from ptv2_engine.kernels.philox import PREFIX_PROB, TOKEN_PROB, keep_bits, keep_rows
from ptv2_engine.kernels.tuning import PackedPlan
from torch import Tensor


@triton.jit
def shifted(bits, index):
    """Bool: the bit of keep_bits for each key, by its index in the row's own sequence; keys of other sequences get any."""
    return ((bits >> (index & 63).to(tl.uint64)) & 1) != 0


@triton.jit(do_not_specialize=["T", "B", "P", "threshold", "site"])
def packed_forward_kernel(q_TND, k_TND, v_TND, prefix_k, prefix_v, out_TND, lse_NT, cu_seqlens, prompt_lengths, seed, q_row,
                          k_row, v_row, pk_row, pv_row, T, B, P, N, scale, threshold, keep_scale, site, D: tl.constexpr,
                          BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
                          LONGEST: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr):
    tile, n = tl.program_id(0), tl.program_id(1)
    first = tile * BLOCK_M
    first_sequence = sequence_of(cu_seqlens, first, B)
    last_sequence = sequence_of(cu_seqlens, tl.minimum(first + BLOCK_M, T) - 1, B)
    rows = first + tl.arange(0, BLOCK_M)
    start, end, sequence = row_bounds(cu_seqlens, rows, first_sequence, last_sequence, B)
    scale2 = scale * LOG2E
    q = load_tile(q_TND + n * D, first, q_row, tl.load(cu_seqlens + B) - first, BLOCK_M, D, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_M,), -1.0e30, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    if DROPOUT:
        c2 = (sequence * N + n)[:, None]
        bits = keep_bits(rows - start, c2, site * 8 + TOKEN_PROB, seed, threshold, LONGEST)
    if BLOCK_P > 0:
        num_prefix = tl.load(prompt_lengths).to(tl.int32) if prompt_lengths is not None else P
        for j in range(0, num_prefix, BLOCK_P):
            k = load_tile(prefix_k + n * D, j, pk_row, num_prefix - j, BLOCK_P, D, BLOCK_D)
            v = load_tile(prefix_v + n * D, j, pv_row, num_prefix - j, BLOCK_P, D, BLOCK_D)
            kept = keep_rows(rows - start, j, c2, site * 8 + PREFIX_PROB, seed, threshold, BLOCK_M, BLOCK_P) if DROPOUT else None
            acc, row_max, row_sum = attend(acc, row_max, row_sum, q, k, v, num_prefix - j, scale2, 1.0, 0, 0, 0, 0, seed,
                                           threshold, site, BLOCK_M, BLOCK_P, DROPOUT, PRECISION, kept=kept)
    stop = tl.load(cu_seqlens + tl.minimum(last_sequence + 1, B))
    for j in range(tl.load(cu_seqlens + first_sequence), stop, BLOCK_N):
        k = load_tile(k_TND + n * D, j, k_row, stop - j, BLOCK_N, D, BLOCK_D)
        v = load_tile(v_TND + n * D, j, v_row, stop - j, BLOCK_N, D, BLOCK_D)
        index = (j + tl.arange(0, BLOCK_N))[None, :] - start[:, None]
        seen = index.to(tl.uint32) < (end - start).to(tl.uint32)[:, None]       # a key before the sequence is a large number
        kept = shifted(bits[:, None], index) if DROPOUT else None
        acc, row_max, row_sum = attend(acc, row_max, row_sum, q, k, v, BLOCK_N, scale2, 1.0, 0, 0, 0, 0, seed, threshold, site,
                                       BLOCK_M, BLOCK_N, DROPOUT, PRECISION, seen, kept=kept)
    real = rows < end               # rows past the last sequence are 0
    inverse = 1.0 / row_sum
    if DROPOUT:
        inverse = inverse * keep_scale
    out = tl.where(real[:, None], acc * inverse[:, None], 0.0)
    store_tile(out_TND + n * D, first, N * D, T - first, out, BLOCK_M, D, BLOCK_D)
    lse = tl.where(real, (row_max + tl.log2(row_sum)) * LN2, 0.0)
    tl.store(lse_NT + n.to(tl.int64) * T + rows, lse, mask=rows < T)


@triton.jit
def fitting(cu_seqlens, sequence, next_sequence, limit):
    """The sequence behind the last one that ends at or before limit, of those from `sequence` on; one at least is taken."""
    found = sequence + 1
    for b in range(sequence + 1, next_sequence):
        found = tl.where(tl.load(cu_seqlens + b + 1) <= limit, b + 1, found)
    return found


@triton.jit(do_not_specialize=["T", "B", "P", "WINDOW", "threshold", "site"])
def packed_sweep_kernel(dout_TND, q_TND, k_TND, v_TND, prefix_k, prefix_v, lse_NT, dqkv_T3ND, partial_2WPND, cu_seqlens,
                        prompt_lengths, seed, q_row, k_row, v_row, pk_row, pv_row, T, B, P, N, scale, threshold, keep_scale,
                        site, WINDOW, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                        BLOCK_P: tl.constexpr, LONGEST: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
                        NEED_TOKENS: tl.constexpr, FUSE_PREFIX: tl.constexpr):
    n, window = tl.program_id(0), tl.program_id(1) * WINDOW
    window_end = tl.minimum(window + WINDOW, T)
    grad_row = 3 * N * D
    if NEED_TOKENS:
        for part in tl.static_range(3):
            zero_rows(dqkv_T3ND + (part * N + n) * D, tl.maximum(tl.load(cu_seqlens + B), window), window_end, grad_row, 0, 1,
                      BLOCK_M, D, BLOCK_D)
    # Sequences that start in the window; empty ones come with the token behind them.
    sequence = tl.where(window > 0, tl.minimum(sequence_of(cu_seqlens, window - 1, B) + 1, B), 0)
    next_sequence = tl.minimum(sequence_of(cu_seqlens, window_end - 1, B) + 1, B)
    scale2 = scale * LOG2E
    stat_row = n.to(tl.int64) * T
    if BLOCK_P > 0:
        num_prefix = tl.load(prompt_lengths).to(tl.int32) if prompt_lengths is not None else P
        pk = load_tile(prefix_k + n * D, 0, pk_row, num_prefix, BLOCK_P, D, BLOCK_D)
        pv = load_tile(prefix_v + n * D, 0, pv_row, num_prefix, BLOCK_P, D, BLOCK_D)
        if FUSE_PREFIX:
            dpk = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
            dpv = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    while sequence < next_sequence:
        first = tl.load(cu_seqlens + sequence)
        stop_sequence = fitting(cu_seqlens, sequence, next_sequence, first + BLOCK_N)
        stop = tl.load(cu_seqlens + stop_sequence)
        k = load_tile(k_TND + n * D, first, k_row, stop - first, BLOCK_N, D, BLOCK_D)
        v = load_tile(v_TND + n * D, first, v_row, stop - first, BLOCK_N, D, BLOCK_D)
        if NEED_TOKENS:
            dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for row in range(first, stop, BLOCK_M):
            # cu_seqlens[0] is 0. Reading it here keeps the addresses below out of registers during the loops.
            head = n + tl.load(cu_seqlens)
            rows = row + tl.arange(0, BLOCK_M)
            start, end, owner = row_bounds(cu_seqlens, rows, sequence, stop_sequence - 1, B)
            q = load_tile(q_TND + head * D, row, q_row, stop - row, BLOCK_M, D, BLOCK_D)
            do = load_tile(dout_TND + head * D, row, N * D, stop - row, BLOCK_M, D, BLOCK_D)
            lse2 = load_stat(lse_NT, stat_row + row, stop - row, float("inf"), BLOCK_M) * LOG2E
            if DROPOUT:
                c2 = (owner * N + n)[:, None]
            delta = tl.zeros((BLOCK_M,), tl.float32)
            if BLOCK_P > 0:
                kept = tl.trans(keep_rows(rows - start, 0, c2, site * 8 + PREFIX_PROB, seed, threshold, BLOCK_M,
                                          BLOCK_P)) if DROPOUT else None
                p_probs, dropped, p_dprobs = key_probabilities(q, do, pk, pv, lse2, num_prefix, scale2, 1.0, 0, 0, 0, 0, seed,
                                                               threshold, keep_scale, site, BLOCK_M, BLOCK_P, DROPOUT, PRECISION,
                                                               kept=kept)
                if FUSE_PREFIX:
                    dpv = tl.dot(dropped.to(do.dtype), do, dpv, input_precision=PRECISION)
                delta += tl.sum(p_probs * p_dprobs, 0)
            index = (first + tl.arange(0, BLOCK_N))[:, None] - start[None, :]
            seen = index.to(tl.uint32) < (end - start).to(tl.uint32)[None, :]   # a key before the sequence is a large number
            kept = shifted(keep_bits(rows - start, c2, site * 8 + TOKEN_PROB, seed, threshold, LONGEST)[None, :],
                           index) if DROPOUT else None
            probs, dropped, dprobs = key_probabilities(q, do, k, v, lse2, BLOCK_N, scale2, 1.0, 0, 0, 0, 0, seed, threshold,
                                                       keep_scale, site, BLOCK_M, BLOCK_N, DROPOUT, PRECISION, seen, kept=kept)
            if NEED_TOKENS:
                dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
            delta += tl.sum(probs * dprobs, 0)
            if BLOCK_P > 0:
                p_ds = (p_probs * (p_dprobs - delta[None, :])).to(q.dtype)
                if FUSE_PREFIX:
                    dpk = tl.dot(p_ds, q, dpk, input_precision=PRECISION)
            if NEED_TOKENS:
                ds = (probs * (dprobs - delta[None, :])).to(q.dtype)
                dk = tl.dot(ds, q, dk, input_precision=PRECISION)
                dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION)
                if BLOCK_P > 0:
                    dq = tl.dot(tl.trans(p_ds), pk, dq, input_precision=PRECISION)
                store_tile(dqkv_T3ND + head * D, row, grad_row, stop - row, dq * scale, BLOCK_M, D, BLOCK_D)
        if NEED_TOKENS:
            store_tile(dqkv_T3ND + (N + n) * D, first, grad_row, stop - first, dk * scale, BLOCK_N, D, BLOCK_D)
            store_tile(dqkv_T3ND + (2 * N + n) * D, first, grad_row, stop - first, dv, BLOCK_N, D, BLOCK_D)
        sequence = stop_sequence
    if FUSE_PREFIX:
        partial = tl.program_id(1).to(tl.int64) * P
        store_tile(partial_2WPND + n * D, partial, N * D, num_prefix, dpk * scale, BLOCK_P, D, BLOCK_D)
        store_tile(partial_2WPND + n * D, partial + tl.num_programs(1).to(tl.int64) * P, N * D, num_prefix, dpv, BLOCK_P, D,
                   BLOCK_D)


_NAMES = ("cu_seqlens", "prompt_lengths", "seed", "q_row", "k_row", "v_row", "pk_row", "pv_row", "T", "B", "P", "N", "scale",
          "threshold", "keep_scale", "site")


def shared_arguments(run: dict, fixed: dict, plan: PackedPlan) -> dict:
    return {name: run[name] for name in _NAMES} | {name: fixed[name] for name in ("D", "BLOCK_D", "DROPOUT", "PRECISION")} | {
        "LONGEST": plan.longest}


def forward(inputs: tuple, out_TND: Tensor, lse_NT: Tensor, run: dict, fixed: dict, plan: PackedPlan) -> None:
    """Fill out [T, N, D] and lse [N, T]. inputs: q, k, v, prefix_k, prefix_v; run, fixed: prefix_attention.plain_arguments."""
    tiles = plan.forward
    packed_forward_kernel[(triton.cdiv(run["T"], tiles.block_m), run["N"])](
        *inputs, out_TND, lse_NT, **shared_arguments(run, fixed, plan), BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
        BLOCK_P=tiles.block_p, **tiles.launch)


def sweep(inputs: tuple, lse_NT: Tensor, dqkv_T3ND: Tensor, partial_2WPND: Tensor | None, run: dict, fixed: dict,
          plan: PackedPlan, need_tokens: bool) -> None:
    """Fill dqkv [T, 3, N, D] if need_tokens, and the partials [2, windows, P, N, D] of the prefix gradient if given."""
    tiles = plan.sweep
    assert tiles is not None
    packed_sweep_kernel[(run["N"], triton.cdiv(run["T"], plan.window))](
        *inputs, lse_NT, dqkv_T3ND, partial_2WPND, **shared_arguments(run, fixed, plan), WINDOW=plan.window,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_P=tiles.block_p, NEED_TOKENS=need_tokens,
        FUSE_PREFIX=partial_2WPND is not None, **tiles.launch)
