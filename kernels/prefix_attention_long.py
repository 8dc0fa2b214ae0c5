"""Backward of rows whose keys do not fit one block: a dQ kernel over query tiles and a dK, dV kernel over key tiles.

The dQ kernel also makes delta = rowsum(dO * O), which the other kernels read back (fp32 [N, T], 4N bytes a token). Where the
output was saved (rows of more than 2048 keys) that is one product; where it was not, a first pass over the keys sums
P * dP: two more tile products, against keeping 2H bytes a token from forward to backward.
Nothing is accumulated in HBM: each output tile is written once, by one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ptv2_engine.kernels.attention_tile import (
    LOG2E,
    key_bounds,
    key_probabilities,
    load_prefix,
    load_ranges,
    load_stat,
    load_tile,
    probabilities,
    prompt_of,
    seen_tile,
    store_tile,
    zero_rows,
)
from ptv2_engine.kernels.philox import PREFIX_K, PREFIX_PROB, PREFIX_V, TOKEN_PROB
from ptv2_engine.kernels.tile_list import grid, tile_list, work_item
from ptv2_engine.kernels.tuning import AttentionPlan
from torch import Tensor


@triton.jit(do_not_specialize=["T", "B", "P", "threshold", "prefix_threshold", "site"])
def dq_kernel(dout_TND, q_TND, k_TND, v_TND, prefix_k, prefix_v, out_TND, lse_NT, dqkv_T3ND, delta_NT, context_B, key_range_T2,
              items_L2, cu_seqlens, prompt_ids, prompt_lengths, seed, q_row, k_row, v_row, pk_prompt, pk_row, pv_prompt, pv_row,
              T, B, P, N, scale, threshold, keep_scale, prefix_threshold, prefix_scale, site, D: tl.constexpr,
              BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, DROPOUT: tl.constexpr,
              PREFIX_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NEED_TOKENS: tl.constexpr):
    tile, n, b, workers = work_item(items_L2)
    start = tl.load(cu_seqlens + b)
    grad_row = 3 * N * D
    if b == B:
        if NEED_TOKENS:
            zero_rows(dqkv_T3ND + n * D, start, T, grad_row, tile, workers, BLOCK_M, D, BLOCK_D)
        return
    length = tl.load(cu_seqlens + b + 1) - start
    first = tile * BLOCK_M
    if first >= length:
        return
    c2 = b * N + n
    scale2 = scale * LOG2E
    stat_row = n.to(tl.int64) * T + start + first
    do = load_tile(dout_TND + n * D, start + first, N * D, length - first, BLOCK_M, D, BLOCK_D)
    q = load_tile(q_TND + n * D, start + first, q_row, length - first, BLOCK_M, D, BLOCK_D)
    lse2 = load_stat(lse_NT, stat_row, length - first, float("inf"), BLOCK_M) * LOG2E
    if BLOCK_P > 0:
        prompt, num_prefix = prompt_of(prompt_ids, prompt_lengths, b, P)
        pk_base = prefix_k + prompt * pk_prompt + n * D
        pv_base = prefix_v + prompt * pv_prompt + n * D
    begin, end = 0, length
    if key_range_T2 is not None:
        context = tl.load(context_B + b)
        low, high = load_ranges(key_range_T2, start + first, length - first, BLOCK_M)
        begin, end = key_bounds(context, low, high, length, BLOCK_N)
    if out_TND is not None:
        out = load_tile(out_TND + n * D, start + first, N * D, length - first, BLOCK_M, D, BLOCK_D)
        delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    else:
        delta = tl.zeros((BLOCK_M,), tl.float32)
        if BLOCK_P > 0:
            for j in range(0, num_prefix, BLOCK_P):
                k = load_prefix(pk_base, j, pk_row, num_prefix, c2, seed, prefix_threshold, site, PREFIX_K,
                                PREFIX_DROPOUT, BLOCK_P, D, BLOCK_D)
                v = load_prefix(pv_base, j, pv_row, num_prefix, c2, seed, prefix_threshold, site, PREFIX_V,
                                PREFIX_DROPOUT, BLOCK_P, D, BLOCK_D)
                probs, _, dprobs = probabilities(q, do, k, v, lse2, num_prefix - j, scale2 * prefix_scale, prefix_scale, first, j,
                                                 c2, PREFIX_PROB, seed, threshold,
                                                 keep_scale, site, BLOCK_M, BLOCK_P, DROPOUT, PRECISION)
                delta += tl.sum(probs * dprobs, 1)
        for j in range(begin, end, BLOCK_N):
            k = load_tile(k_TND + n * D, start + j, k_row, length - j, BLOCK_N, D, BLOCK_D)
            v = load_tile(v_TND + n * D, start + j, v_row, length - j, BLOCK_N, D, BLOCK_D)
            seen = seen_tile(context, low, high, j, BLOCK_N) if key_range_T2 is not None else None
            probs, _, dprobs = probabilities(q, do, k, v, lse2, length - j, scale2, 1.0, first, j, c2, TOKEN_PROB, seed,
                                             threshold,
                                             keep_scale, site, BLOCK_M, BLOCK_N, DROPOUT, PRECISION, seen)
            delta += tl.sum(probs * dprobs, 1)
    rows = tl.arange(0, BLOCK_M)
    tl.store(delta_NT + stat_row + rows, delta, mask=rows < length - first)
    if NEED_TOKENS:
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        if BLOCK_P > 0:
            for j in range(0, num_prefix, BLOCK_P):
                k = load_prefix(pk_base, j, pk_row, num_prefix, c2, seed, prefix_threshold, site, PREFIX_K,
                                PREFIX_DROPOUT, BLOCK_P, D, BLOCK_D)
                v = load_prefix(pv_base, j, pv_row, num_prefix, c2, seed, prefix_threshold, site, PREFIX_V,
                                PREFIX_DROPOUT, BLOCK_P, D, BLOCK_D)
                probs, _, dprobs = probabilities(q, do, k, v, lse2, num_prefix - j, scale2 * prefix_scale, prefix_scale, first, j,
                                                 c2, PREFIX_PROB, seed, threshold,
                                                 keep_scale, site, BLOCK_M, BLOCK_P, DROPOUT, PRECISION)
                ds = (probs * (dprobs - delta[:, None]) * prefix_scale).to(q.dtype)
                dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        for j in range(begin, end, BLOCK_N):
            k = load_tile(k_TND + n * D, start + j, k_row, length - j, BLOCK_N, D, BLOCK_D)
            v = load_tile(v_TND + n * D, start + j, v_row, length - j, BLOCK_N, D, BLOCK_D)
            seen = seen_tile(context, low, high, j, BLOCK_N) if key_range_T2 is not None else None
            probs, _, dprobs = probabilities(q, do, k, v, lse2, length - j, scale2, 1.0, first, j, c2, TOKEN_PROB, seed,
                                             threshold,
                                             keep_scale, site, BLOCK_M, BLOCK_N, DROPOUT, PRECISION, seen)
            ds = (probs * (dprobs - delta[:, None])).to(q.dtype)
            dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        store_tile(dqkv_T3ND + n * D, start + first, grad_row, length - first, dq * scale, BLOCK_M, D, BLOCK_D)


@triton.jit(do_not_specialize=["T", "B", "threshold", "site"])
def dkdv_kernel(dout_TND, q_TND, k_TND, v_TND, lse_NT, delta_NT, dqkv_T3ND, context_B, key_range_T2, items_L2, cu_seqlens, seed,
                q_row, k_row, v_row, T, B, N, scale, threshold, keep_scale, site, D: tl.constexpr, BLOCK_D: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr):
    tile, n, b, workers = work_item(items_L2)
    start = tl.load(cu_seqlens + b)
    grad_row = 3 * N * D
    if b == B:
        for part in tl.static_range(1, 3):
            zero_rows(dqkv_T3ND + (part * N + n) * D, start, T, grad_row, tile, workers, BLOCK_N, D, BLOCK_D)
        return
    length = tl.load(cu_seqlens + b + 1) - start
    first = tile * BLOCK_N
    if first >= length:
        return
    scale2 = scale * LOG2E
    stat_row = n.to(tl.int64) * T + start
    k = load_tile(k_TND + n * D, start + first, k_row, length - first, BLOCK_N, D, BLOCK_D)
    v = load_tile(v_TND + n * D, start + first, v_row, length - first, BLOCK_N, D, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if key_range_T2 is not None:
        context = tl.load(context_B + b)
    for i in range(0, length, BLOCK_M):
        wanted = True
        if key_range_T2 is not None:
            low, high = load_ranges(key_range_T2, start + i, length - i, BLOCK_M)
            wanted = (first < context) | ((tl.min(low, 0) < first + BLOCK_N) & (tl.max(high, 0) > first))
        if wanted:
            q = load_tile(q_TND + n * D, start + i, q_row, length - i, BLOCK_M, D, BLOCK_D)
            do = load_tile(dout_TND + n * D, start + i, N * D, length - i, BLOCK_M, D, BLOCK_D)
            lse2 = load_stat(lse_NT, stat_row + i, length - i, float("inf"), BLOCK_M) * LOG2E
            delta = load_stat(delta_NT, stat_row + i, length - i, 0.0, BLOCK_M)
            seen = tl.trans(seen_tile(context, low, high, first, BLOCK_N)) if key_range_T2 is not None else None
            probs, dropped, dprobs = key_probabilities(q, do, k, v, lse2, length - first, scale2, 1.0, i, first, b * N + n,
                                                       TOKEN_PROB, seed, threshold, keep_scale, site, BLOCK_M, BLOCK_N, DROPOUT,
                                                       PRECISION, seen)
            dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
            ds = (probs * (dprobs - delta[None, :])).to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    store_tile(dqkv_T3ND + (N + n) * D, start + first, grad_row, length - first, dk * scale, BLOCK_N, D, BLOCK_D)
    store_tile(dqkv_T3ND + (2 * N + n) * D, start + first, grad_row, length - first, dv, BLOCK_N, D, BLOCK_D)


def tokens_bwd(inputs: tuple, out_TND: Tensor | None, lse_NT: Tensor, dqkv_T3ND: Tensor, max_seqlen: int, run: dict, fixed: dict,
               plan: AttentionPlan, need_tokens: bool, ranges: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """Fill dqkv [T, 3, N, D] if need_tokens and return delta [N, T]. inputs: dout, q, k, v, prefix_k, prefix_v; run and fixed:
    prefix_attention.plain_arguments; ranges: context_B, key_range_T2."""
    delta_NT = torch.empty_like(lse_NT)
    rows, keys = plan.dq.block_m, plan.dkdv.block_n
    items = tile_list(run["cu_seqlens"], run, max_seqlen, rows)
    dq_kernel[grid(items, run, max_seqlen, rows)](
        *inputs, out_TND, lse_NT, dqkv_T3ND, delta_NT, *ranges, items, **run, **fixed, BLOCK_M=rows, BLOCK_N=plan.dq.block_n,
        BLOCK_P=plan.dq.block_p, NEED_TOKENS=need_tokens, **plan.dq.launch)
    if need_tokens:
        items = items if keys == rows else tile_list(run["cu_seqlens"], run, max_seqlen, keys)
        names = ("cu_seqlens", "seed", "q_row", "k_row", "v_row", "T", "B", "N", "scale", "threshold", "keep_scale", "site")
        dkdv_kernel[grid(items, run, max_seqlen, keys)](
            *inputs[:4], lse_NT, delta_NT, dqkv_T3ND, *ranges, items, **{name: run[name] for name in names},
            **{name: fixed[name] for name in ("D", "BLOCK_D", "DROPOUT", "PRECISION")}, BLOCK_M=plan.dkdv.block_m,
            BLOCK_N=keys, **plan.dkdv.launch)
    return delta_NT
