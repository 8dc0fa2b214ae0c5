"""Backward of short rows whose prefix or heads are too large for packed_sweep_kernel: dQ over tiles of packed queries, dK and dV
over tiles of packed keys. As in prefix_attention_long.py, but a tile spans sequences and every query knows where its own lies;
keys pass by twice, once for delta = rowsum(P * dP). Nothing is accumulated in HBM.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ptv2_engine.kernels.attention_tile import (
    LOG2E,
    key_probabilities,
    load_stat,
    load_tile,
    probabilities,
    row_bounds,
    sequence_of,
    store_tile,
)
from ptv2_engine.kernels.philox import PREFIX_PROB, TOKEN_PROB, keep_bits, keep_rows
from ptv2_engine.kernels.prefix_attention_short import shared_arguments, shifted
from ptv2_engine.kernels.tuning import PackedPlan
from torch import Tensor


@triton.jit(do_not_specialize=["T", "B", "P", "threshold", "site"])
def packed_dq_kernel(dout_TND, q_TND, k_TND, v_TND, prefix_k, prefix_v, lse_NT, dqkv_T3ND, delta_NT, cu_seqlens, prompt_lengths,
                     seed, q_row, k_row, v_row, pk_row, pv_row, T, B, P, N, scale, threshold, keep_scale, site,
                     D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
                     LONGEST: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, NEED_TOKENS: tl.constexpr):
    tile, n = tl.program_id(0), tl.program_id(1)
    first = tile * BLOCK_M
    first_sequence = sequence_of(cu_seqlens, first, B)
    last_sequence = sequence_of(cu_seqlens, tl.minimum(first + BLOCK_M, T) - 1, B)
    rows = first + tl.arange(0, BLOCK_M)
    start, end, owner = row_bounds(cu_seqlens, rows, first_sequence, last_sequence, B)
    # Rows past the last sequence count as missing: they get gradients of 0.
    num_rows = tl.load(cu_seqlens + B) - first
    scale2 = scale * LOG2E
    stat_row = n.to(tl.int64) * T + first
    q = load_tile(q_TND + n * D, first, q_row, num_rows, BLOCK_M, D, BLOCK_D)
    do = load_tile(dout_TND + n * D, first, N * D, num_rows, BLOCK_M, D, BLOCK_D)
    lse2 = load_stat(lse_NT, stat_row, num_rows, float("inf"), BLOCK_M) * LOG2E
    if DROPOUT:
        c2 = (owner * N + n)[:, None]
        bits = keep_bits(rows - start, c2, site * 8 + TOKEN_PROB, seed, threshold, LONGEST)[:, None]
    if BLOCK_P > 0:
        num_prefix = tl.load(prompt_lengths).to(tl.int32) if prompt_lengths is not None else P
    begin = tl.load(cu_seqlens + first_sequence)
    stop = tl.load(cu_seqlens + tl.minimum(last_sequence + 1, B))
    delta = tl.zeros((BLOCK_M,), tl.float32)
    if BLOCK_P > 0:
        for j in range(0, num_prefix, BLOCK_P):
            k = load_tile(prefix_k + n * D, j, pk_row, num_prefix - j, BLOCK_P, D, BLOCK_D)
            v = load_tile(prefix_v + n * D, j, pv_row, num_prefix - j, BLOCK_P, D, BLOCK_D)
            kept = keep_rows(rows - start, j, c2, site * 8 + PREFIX_PROB, seed, threshold, BLOCK_M, BLOCK_P) if DROPOUT else None
            probs, _, dprobs = probabilities(q, do, k, v, lse2, num_prefix - j, scale2, 1.0, 0, 0, 0, 0, seed, threshold,
                                             keep_scale, site, BLOCK_M, BLOCK_P, DROPOUT, PRECISION, kept=kept)
            delta += tl.sum(probs * dprobs, 1)
    for j in range(begin, stop, BLOCK_N):
        k = load_tile(k_TND + n * D, j, k_row, stop - j, BLOCK_N, D, BLOCK_D)
        v = load_tile(v_TND + n * D, j, v_row, stop - j, BLOCK_N, D, BLOCK_D)
        index = (j + tl.arange(0, BLOCK_N))[None, :] - start[:, None]
        seen = index.to(tl.uint32) < (end - start).to(tl.uint32)[:, None]       # a key before the sequence is a large number
        kept = shifted(bits, index) if DROPOUT else None
        probs, _, dprobs = probabilities(q, do, k, v, lse2, BLOCK_N, scale2, 1.0, 0, 0, 0, 0, seed, threshold, keep_scale, site,
                                         BLOCK_M, BLOCK_N, DROPOUT, PRECISION, seen, kept=kept)
        delta += tl.sum(probs * dprobs, 1)
    tl.store(delta_NT + n.to(tl.int64) * T + rows, delta, mask=rows < T)
    if NEED_TOKENS:
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        if BLOCK_P > 0:
            for j in range(0, num_prefix, BLOCK_P):
                k = load_tile(prefix_k + n * D, j, pk_row, num_prefix - j, BLOCK_P, D, BLOCK_D)
                v = load_tile(prefix_v + n * D, j, pv_row, num_prefix - j, BLOCK_P, D, BLOCK_D)
                kept = keep_rows(rows - start, j, c2, site * 8 + PREFIX_PROB, seed, threshold, BLOCK_M,
                                 BLOCK_P) if DROPOUT else None
                probs, _, dprobs = probabilities(q, do, k, v, lse2, num_prefix - j, scale2, 1.0, 0, 0, 0, 0, seed, threshold,
                                                 keep_scale, site, BLOCK_M, BLOCK_P, DROPOUT, PRECISION, kept=kept)
                dq = tl.dot((probs * (dprobs - delta[:, None])).to(q.dtype), k, dq, input_precision=PRECISION)
        for j in range(begin, stop, BLOCK_N):
            k = load_tile(k_TND + n * D, j, k_row, stop - j, BLOCK_N, D, BLOCK_D)
            v = load_tile(v_TND + n * D, j, v_row, stop - j, BLOCK_N, D, BLOCK_D)
            index = (j + tl.arange(0, BLOCK_N))[None, :] - start[:, None]
            seen = index.to(tl.uint32) < (end - start).to(tl.uint32)[:, None]
            kept = shifted(bits, index) if DROPOUT else None
            probs, _, dprobs = probabilities(q, do, k, v, lse2, BLOCK_N, scale2, 1.0, 0, 0, 0, 0, seed, threshold, keep_scale,
                                             site, BLOCK_M, BLOCK_N, DROPOUT, PRECISION, seen, kept=kept)
            dq = tl.dot((probs * (dprobs - delta[:, None])).to(q.dtype), k, dq, input_precision=PRECISION)
        store_tile(dqkv_T3ND + n * D, first, 3 * N * D, T - first, dq * scale, BLOCK_M, D, BLOCK_D)


@triton.jit(do_not_specialize=["T", "B", "threshold", "site"])
def packed_dkdv_kernel(dout_TND, q_TND, k_TND, v_TND, lse_NT, delta_NT, dqkv_T3ND, cu_seqlens, seed, q_row, k_row, v_row, T, B, N,
                       scale, threshold, keep_scale, site, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                       BLOCK_N: tl.constexpr, LONGEST: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr):
    tile, n = tl.program_id(0), tl.program_id(1)
    first = tile * BLOCK_N
    first_sequence = sequence_of(cu_seqlens, first, B)
    last_sequence = sequence_of(cu_seqlens, tl.minimum(first + BLOCK_N, T) - 1, B)
    stop = tl.load(cu_seqlens + tl.minimum(last_sequence + 1, B))
    scale2 = scale * LOG2E
    stat_row = n.to(tl.int64) * T
    num_keys = tl.load(cu_seqlens + B) - first
    k = load_tile(k_TND + n * D, first, k_row, num_keys, BLOCK_N, D, BLOCK_D)
    v = load_tile(v_TND + n * D, first, v_row, num_keys, BLOCK_N, D, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for row in range(tl.load(cu_seqlens + first_sequence), stop, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        start, end, owner = row_bounds(cu_seqlens, rows, first_sequence, last_sequence, B)
        q = load_tile(q_TND + n * D, row, q_row, stop - row, BLOCK_M, D, BLOCK_D)
        do = load_tile(dout_TND + n * D, row, N * D, stop - row, BLOCK_M, D, BLOCK_D)
        lse2 = load_stat(lse_NT, stat_row + row, stop - row, float("inf"), BLOCK_M) * LOG2E
        delta = load_stat(delta_NT, stat_row + row, stop - row, 0.0, BLOCK_M)
        index = (first + tl.arange(0, BLOCK_N))[:, None] - start[None, :]
        seen = index.to(tl.uint32) < (end - start).to(tl.uint32)[None, :]       # a key before the sequence is a large number
        kept = shifted(keep_bits(rows - start, (owner * N + n)[:, None], site * 8 + TOKEN_PROB, seed, threshold,
                                 LONGEST)[None, :], index) if DROPOUT else None
        probs, dropped, dprobs = key_probabilities(q, do, k, v, lse2, BLOCK_N, scale2, 1.0, 0, 0, 0, 0, seed, threshold,
                                                   keep_scale, site, BLOCK_M, BLOCK_N, DROPOUT, PRECISION, seen, kept=kept)
        dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = (probs * (dprobs - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    grad_row = 3 * N * D
    store_tile(dqkv_T3ND + (N + n) * D, first, grad_row, T - first, dk * scale, BLOCK_N, D, BLOCK_D)
    store_tile(dqkv_T3ND + (2 * N + n) * D, first, grad_row, T - first, dv, BLOCK_N, D, BLOCK_D)


def tokens_bwd(inputs: tuple, lse_NT: Tensor, dqkv_T3ND: Tensor, run: dict, fixed: dict, plan: PackedPlan,
               need_tokens: bool) -> Tensor:
    """Fill dqkv [T, 3, N, D] if need_tokens and return delta [N, T]. inputs: dout, q, k, v, prefix_k, prefix_v."""
    dq, dkdv = plan.dq, plan.dkdv
    delta_NT, arguments = torch.empty_like(lse_NT), shared_arguments(run, fixed, plan)
    packed_dq_kernel[(triton.cdiv(run["T"], dq.block_m), run["N"])](
        *inputs, lse_NT, dqkv_T3ND, delta_NT, **arguments, BLOCK_M=dq.block_m, BLOCK_N=dq.block_n, BLOCK_P=dq.block_p,
        NEED_TOKENS=need_tokens, **dq.launch)
    if need_tokens:
        of_prefix = ("prompt_lengths", "pk_row", "pv_row", "P")
        arguments = {name: value for name, value in arguments.items() if name not in of_prefix}
        packed_dkdv_kernel[(triton.cdiv(run["T"], dkdv.block_n), run["N"])](
            *inputs[:4], lse_NT, delta_NT, dqkv_T3ND, **arguments, BLOCK_M=dkdv.block_m, BLOCK_N=dkdv.block_n, **dkdv.launch)
    return delta_NT
