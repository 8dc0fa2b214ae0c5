"""Backward of disentangled attention: a dQ kernel over query tiles and a dK, dV kernel over key tiles.

delta = rowsum(dO * O) from the saved output: making it again would take all three score terms twice. The gradient of the band's
scores is dS moved askew, and one product each: dQ += skew(dS) rel_k, dK += skew(dS^T) rel_q. Each output is written once.
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
    probabilities,
    prompt_of,
    store_tile,
    zero_rows,
)
from ptv2_engine.kernels.disentangled_band import band_rows, relative_scores, skewed_by_key, skewed_by_query
from ptv2_engine.kernels.philox import PREFIX_K, PREFIX_PROB, PREFIX_V, TOKEN_PROB
from ptv2_engine.kernels.tuning import RelativePlan, power_of_two
from torch import Tensor


@triton.jit(do_not_specialize=["T", "B", "P", "L", "threshold", "prefix_threshold", "site"])
def relative_dq_kernel(dout_TND, q_TND, k_TND, v_TND, prefix_k, prefix_v, rel_k_RND, rel_q_RND, slots, out_TND, lse_NT, dqkv_T3ND,
                       delta_NT, L, cu_seqlens, prompt_ids, prompt_lengths, seed, q_row, k_row, v_row, pk_prompt, pk_row,
                       pv_prompt, pv_row, T, B, P, N, scale, threshold, keep_scale, prefix_threshold, prefix_scale, site,
                       D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                       BLOCK_P: tl.constexpr, BAND: tl.constexpr, DROPOUT: tl.constexpr, PREFIX_DROPOUT: tl.constexpr,
                       PRECISION: tl.constexpr, NEED_TOKENS: tl.constexpr):
    tile, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(cu_seqlens + b)
    grad_row = 3 * N * D
    if b == B:
        if NEED_TOKENS:
            zero_rows(dqkv_T3ND + n * D, start, T, grad_row, tile, tl.num_programs(0), BLOCK_M, D, BLOCK_D)
        return
    length = tl.load(cu_seqlens + b + 1) - start
    first = tile * BLOCK_M
    if first >= length:
        return
    c2 = b * N + n
    scale2 = scale * LOG2E
    stat_row = n.to(tl.int64) * T + start + first
    do = load_tile(dout_TND + n * D, start + first, N * D, length - first, BLOCK_M, D, BLOCK_D)
    out = load_tile(out_TND + n * D, start + first, N * D, length - first, BLOCK_M, D, BLOCK_D)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    rows = tl.arange(0, BLOCK_M)
    tl.store(delta_NT + stat_row + rows, delta, mask=rows < length - first)
    if NEED_TOKENS:
        q = load_tile(q_TND + n * D, start + first, q_row, length - first, BLOCK_M, D, BLOCK_D)
        lse2 = load_stat(lse_NT, stat_row, length - first, float("inf"), BLOCK_M) * LOG2E
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        if BLOCK_P > 0:
            prompt, num_prefix = prompt_of(prompt_ids, prompt_lengths, b, P)
            pk_base = prefix_k + prompt * pk_prompt + n * D
            pv_base = prefix_v + prompt * pv_prompt + n * D
            for j in range(0, num_prefix, BLOCK_P):
                k = load_prefix(pk_base, j, pk_row, num_prefix, c2, seed, prefix_threshold, site, PREFIX_K, PREFIX_DROPOUT,
                                BLOCK_P, D, BLOCK_D)
                v = load_prefix(pv_base, j, pv_row, num_prefix, c2, seed, prefix_threshold, site, PREFIX_V, PREFIX_DROPOUT,
                                BLOCK_P, D, BLOCK_D)
                probs, _, dprobs = probabilities(q, do, k, v, lse2, num_prefix - j, scale2 * prefix_scale, prefix_scale, first, j,
                                                 c2, PREFIX_PROB, seed, threshold, keep_scale, site, BLOCK_M, BLOCK_P, DROPOUT,
                                                 PRECISION)
                ds = (probs * (dprobs - delta[:, None]) * prefix_scale).to(q.dtype)
                dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        for j in range(0, length, BLOCK_N):
            k = load_tile(k_TND + n * D, start + j, k_row, length - j, BLOCK_N, D, BLOCK_D)
            relative = relative_scores(q, k, rel_k_RND, rel_q_RND, slots, n, N, first - j, L, BLOCK_M, BLOCK_N, BAND, D, BLOCK_D,
                                       PRECISION)
            v = load_tile(v_TND + n * D, start + j, v_row, length - j, BLOCK_N, D, BLOCK_D)
            probs, _, dprobs = probabilities(q, do, k, v, lse2, length - j, scale2, 1.0, first, j, c2, TOKEN_PROB, seed,
                                             threshold, keep_scale, site, BLOCK_M, BLOCK_N, DROPOUT, PRECISION, None, relative)
            ds = (probs * (dprobs - delta[:, None])).to(q.dtype)
            dq = tl.dot(ds, k, dq, input_precision=PRECISION)
            if rel_k_RND is not None:
                band = band_rows(rel_k_RND, slots, n, N, first - j, L, BLOCK_N, BAND, D, BLOCK_D)
                dq = tl.dot(skewed_by_query(ds, BLOCK_M, BLOCK_N, BAND), band, dq, input_precision=PRECISION)
        store_tile(dqkv_T3ND + n * D, start + first, grad_row, length - first, dq * scale, BLOCK_M, D, BLOCK_D)


@triton.jit(do_not_specialize=["T", "B", "L", "threshold", "site"])
def relative_dkdv_kernel(dout_TND, q_TND, k_TND, v_TND, rel_k_RND, rel_q_RND, slots, lse_NT, delta_NT, dqkv_T3ND, L, cu_seqlens,
                         seed, q_row, k_row, v_row, T, B, N, scale, threshold, keep_scale, site, D: tl.constexpr,
                         BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr,
                         DROPOUT: tl.constexpr, PRECISION: tl.constexpr):
    tile, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(cu_seqlens + b)
    grad_row = 3 * N * D
    if b == B:
        for part in tl.static_range(1, 3):
            zero_rows(dqkv_T3ND + (part * N + n) * D, start, T, grad_row, tile, tl.num_programs(0), BLOCK_N, D, BLOCK_D)
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
    for i in range(0, length, BLOCK_M):
        q = load_tile(q_TND + n * D, start + i, q_row, length - i, BLOCK_M, D, BLOCK_D)
        relative = relative_scores(q, k, rel_k_RND, rel_q_RND, slots, n, N, i - first, L, BLOCK_M, BLOCK_N, BAND, D, BLOCK_D,
                                   PRECISION)
        do = load_tile(dout_TND + n * D, start + i, N * D, length - i, BLOCK_M, D, BLOCK_D)
        lse2 = load_stat(lse_NT, stat_row + i, length - i, float("inf"), BLOCK_M) * LOG2E
        delta = load_stat(delta_NT, stat_row + i, length - i, 0.0, BLOCK_M)
        probs, dropped, dprobs = key_probabilities(q, do, k, v, lse2, length - first, scale2, 1.0, i, first, b * N + n,
                                                   TOKEN_PROB, seed, threshold, keep_scale, site, BLOCK_M, BLOCK_N, DROPOUT,
                                                   PRECISION, None, tl.trans(relative))
        dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = (probs * (dprobs - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        if rel_q_RND is not None:
            band = band_rows(rel_q_RND, slots, n, N, i - first, L, BLOCK_N, BAND, D, BLOCK_D)
            dk = tl.dot(skewed_by_key(ds, BLOCK_M, BLOCK_N, BAND), band, dk, input_precision=PRECISION)
    store_tile(dqkv_T3ND + (N + n) * D, start + first, grad_row, length - first, dk * scale, BLOCK_N, D, BLOCK_D)
    store_tile(dqkv_T3ND + (2 * N + n) * D, start + first, grad_row, length - first, dv, BLOCK_N, D, BLOCK_D)


def tokens_bwd(inputs: tuple, tables: tuple[Tensor | None, Tensor | None, Tensor], out_TND: Tensor, lse_NT: Tensor,
               dqkv_T3ND: Tensor, max_seqlen: int, run: dict, fixed: dict, plan: RelativePlan, need_tokens: bool) -> Tensor:
    """Fill dqkv [T, 3, N, D] if need_tokens and return delta [N, T]. inputs: dout, q, k, v, prefix_k, prefix_v; tables: rel_k,
    rel_q, slots; run and fixed: prefix_attention.plain_arguments."""
    N, B, L = run["N"], run["B"], (tables[2].shape[0] + 1) // 2
    delta_NT = torch.empty_like(lse_NT)
    relative_dq_kernel[(triton.cdiv(max_seqlen, plan.dq.block_m), N, B + 1)](
        *inputs, *tables, out_TND, lse_NT, dqkv_T3ND, delta_NT, L, **run, **fixed, BLOCK_M=plan.dq.block_m,
        BLOCK_N=plan.dq.block_n, BLOCK_P=plan.dq.block_p, BAND=power_of_two(plan.dq.block_m + plan.dq.block_n - 1),
        NEED_TOKENS=need_tokens, num_warps=plan.dq.warps, num_stages=plan.dq.stages)
    if need_tokens:
        names = ("cu_seqlens", "seed", "q_row", "k_row", "v_row", "T", "B", "N", "scale", "threshold", "keep_scale", "site")
        relative_dkdv_kernel[(triton.cdiv(max_seqlen, plan.dkdv.block_n), N, B + 1)](
            *inputs[:4], *tables, lse_NT, delta_NT, dqkv_T3ND, L, **{name: run[name] for name in names},
            **{name: fixed[name] for name in ("D", "BLOCK_D", "DROPOUT", "PRECISION")}, BLOCK_M=plan.dkdv.block_m,
            BLOCK_N=plan.dkdv.block_n, BAND=power_of_two(plan.dkdv.block_m + plan.dkdv.block_n - 1), num_warps=plan.dkdv.warps,
            num_stages=plan.dkdv.stages)
    return delta_NT
