"""Prefix attention: the forward kernel, the one-sweep backward of short rows, and the launchers of both directions.

T tokens of all sequences, B sequences, N heads, D head dim (padded to BLOCK_D), P prompt length, K prompts. c2 = b * N + n.

Forward: one program owns (64 queries, head) of a sequence and walks the prefix's key blocks, then the sequence's own. Rows that
fit one block of each kind need no kernel with a plain softmax: rescaling once costs BLOCK_M * D multiplications.
Backward of short rows: one program owns a (sequence, head), with all its keys in registers and shared memory. delta =
rowsum(P * dP) is formed on chip, so neither the output nor an fp32 dQ buffer nor a second read of q, dO is needed: 4 reads
(q, k, v, dO) and 3 writes (dq, dk, dv) of [T, N, D]. Where it pays the prefix gradient leaves as one partial a sequence.
Other rows: prefix_attention_long.py. Batches full of short rows: several a program, prefix_attention_short.py. Lengths far apart:
tile_list.py. The sum of the partials: prefix_grad.py. No atomics anywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ptv2_engine.kernels import prefix_attention_long, prefix_attention_short, prefix_attention_short_bwd, prefix_grad
from ptv2_engine.kernels.attention_tile import (
    LN2,
    LOG2E,
    attend,
    key_bounds,
    key_probabilities,
    load_prefix,
    load_ranges,
    load_stat,
    load_tile,
    prefix_keep,
    prompt_of,
    seen_tile,
    store_tile,
    zero_rows,
)
from ptv2_engine.kernels.philox import PREFIX_K, PREFIX_PROB, PREFIX_V, TOKEN_PROB, threshold_arg
from ptv2_engine.kernels.tile_list import grid, tile_list, work_item
from ptv2_engine.kernels.tuning import PackedPlan, choose, choose_packed, power_of_two, tightened
from torch import Tensor


@triton.jit(do_not_specialize=["T", "B", "P", "threshold", "prefix_threshold", "site"])
def forward_kernel(q_TND, k_TND, v_TND, prefix_k, prefix_v, out_TND, lse_NT, context_B, key_range_T2, items_L2, cu_seqlens,
                   prompt_ids, prompt_lengths, seed,
                   q_row, k_row, v_row, pk_prompt, pk_row, pv_prompt, pv_row, T, B, P, N, scale, threshold, keep_scale,
                   prefix_threshold, prefix_scale, site, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, DROPOUT: tl.constexpr, PREFIX_DROPOUT: tl.constexpr,
                   PRECISION: tl.constexpr):
    tile, n, b, workers = work_item(items_L2)
    start = tl.load(cu_seqlens + b)
    out_row = N * D
    if b == B:
        zero_rows(out_TND + n * D, start, T, out_row, tile, workers, BLOCK_M, D, BLOCK_D)
        for row in range(start + tile * BLOCK_M, T, workers * BLOCK_M):
            rows = tl.arange(0, BLOCK_M)
            tl.store(lse_NT + n.to(tl.int64) * T + row + rows, tl.zeros((BLOCK_M,), tl.float32), mask=rows < T - row)
        return
    length = tl.load(cu_seqlens + b + 1) - start
    first = tile * BLOCK_M
    if first >= length:
        return
    c2 = b * N + n
    scale2 = scale * LOG2E
    q = load_tile(q_TND + n * D, start + first, q_row, length - first, BLOCK_M, D, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # A finite start: a block without a valid key then leaves everything as it was instead of making inf - inf.
    row_max = tl.full((BLOCK_M,), -1.0e30, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    if BLOCK_P > 0:
        prompt, num_prefix = prompt_of(prompt_ids, prompt_lengths, b, P)
        pk_base = prefix_k + prompt * pk_prompt + n * D
        pv_base = prefix_v + prompt * pv_prompt + n * D
        for j in range(0, num_prefix, BLOCK_P):
            k = load_prefix(pk_base, j, pk_row, num_prefix, c2, seed, prefix_threshold, site, PREFIX_K,
                            PREFIX_DROPOUT, BLOCK_P, D, BLOCK_D)
            v = load_prefix(pv_base, j, pv_row, num_prefix, c2, seed, prefix_threshold, site, PREFIX_V,
                            PREFIX_DROPOUT, BLOCK_P, D, BLOCK_D)
            acc, row_max, row_sum = attend(acc, row_max, row_sum, q, k, v, num_prefix - j, scale2 * prefix_scale, prefix_scale,
                                           first, j, c2, PREFIX_PROB, seed,
                                           threshold, site, BLOCK_M, BLOCK_P, DROPOUT, PRECISION)
    if key_range_T2 is not None:
        context = tl.load(context_B + b)
        low, high = load_ranges(key_range_T2, start + first, length - first, BLOCK_M)
        begin, end = key_bounds(context, low, high, length, BLOCK_N)
        for j in range(begin, end, BLOCK_N):
            k = load_tile(k_TND + n * D, start + j, k_row, length - j, BLOCK_N, D, BLOCK_D)
            v = load_tile(v_TND + n * D, start + j, v_row, length - j, BLOCK_N, D, BLOCK_D)
            acc, row_max, row_sum = attend(acc, row_max, row_sum, q, k, v, length - j, scale2, 1.0, first, j, c2, TOKEN_PROB,
                                           seed, threshold, site, BLOCK_M, BLOCK_N, DROPOUT, PRECISION,
                                           seen_tile(context, low, high, j, BLOCK_N))
    else:
        for j in range(0, length, BLOCK_N):
            k = load_tile(k_TND + n * D, start + j, k_row, length - j, BLOCK_N, D, BLOCK_D)
            v = load_tile(v_TND + n * D, start + j, v_row, length - j, BLOCK_N, D, BLOCK_D)
            acc, row_max, row_sum = attend(acc, row_max, row_sum, q, k, v, length - j, scale2, 1.0, first, j, c2, TOKEN_PROB,
                                           seed, threshold, site, BLOCK_M, BLOCK_N, DROPOUT, PRECISION)
    inverse = 1.0 / row_sum
    if DROPOUT:
        inverse = inverse * keep_scale
    store_tile(out_TND + n * D, start + first, out_row, length - first, acc * inverse[:, None], BLOCK_M, D, BLOCK_D)
    rows = tl.arange(0, BLOCK_M)
    tl.store(lse_NT + n.to(tl.int64) * T + start + first + rows, (row_max + tl.log2(row_sum)) * LN2, mask=rows < length - first)


@triton.jit(do_not_specialize=["T", "B", "P", "threshold", "prefix_threshold", "site"])
def sweep_kernel(dout_TND, q_TND, k_TND, v_TND, prefix_k, prefix_v, lse_NT, dqkv_T3ND, delta_NT, partial_2BPND, cu_seqlens,
                 prompt_ids,
                 prompt_lengths, seed, q_row, k_row, v_row, pk_prompt, pk_row, pv_prompt, pv_row, T, B, P, N, scale, threshold,
                 keep_scale, prefix_threshold, prefix_scale, site, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, DROPOUT: tl.constexpr, PREFIX_DROPOUT: tl.constexpr,
                 PRECISION: tl.constexpr, NEED_TOKENS: tl.constexpr, FUSE_PREFIX: tl.constexpr, STORE_DELTA: tl.constexpr):
    n, b = tl.program_id(0), tl.program_id(1)
    start = tl.load(cu_seqlens + b)
    grad_row = 3 * N * D
    if b == B:
        if NEED_TOKENS:
            for part in tl.static_range(3):
                zero_rows(dqkv_T3ND + (part * N + n) * D, start, T, grad_row, 0, 1, BLOCK_M, D, BLOCK_D)
        return
    length = tl.load(cu_seqlens + b + 1) - start
    c2 = b * N + n
    scale2 = scale * LOG2E
    k = load_tile(k_TND + n * D, start, k_row, length, BLOCK_N, D, BLOCK_D)
    v = load_tile(v_TND + n * D, start, v_row, length, BLOCK_N, D, BLOCK_D)
    if NEED_TOKENS:
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if BLOCK_P > 0:
        prompt, num_prefix = prompt_of(prompt_ids, prompt_lengths, b, P)
        pk = load_prefix(prefix_k + prompt * pk_prompt + n * D, 0, pk_row, num_prefix, c2, seed, prefix_threshold,
                         site, PREFIX_K, PREFIX_DROPOUT, BLOCK_P, D, BLOCK_D)
        pv = load_prefix(prefix_v + prompt * pv_prompt + n * D, 0, pv_row, num_prefix, c2, seed, prefix_threshold,
                         site, PREFIX_V, PREFIX_DROPOUT, BLOCK_P, D, BLOCK_D)
        if FUSE_PREFIX:
            dpk = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
            dpv = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    stat_row = n.to(tl.int64) * T + start
    for first in range(0, length, BLOCK_M):
        q = load_tile(q_TND + n * D, start + first, q_row, length - first, BLOCK_M, D, BLOCK_D)
        do = load_tile(dout_TND + n * D, start + first, N * D, length - first, BLOCK_M, D, BLOCK_D)
        lse2 = load_stat(lse_NT, stat_row + first, length - first, float("inf"), BLOCK_M) * LOG2E
        probs, dropped, dprobs = key_probabilities(q, do, k, v, lse2, length, scale2, 1.0, first, 0, c2, TOKEN_PROB, seed,
                                                   threshold,
                                               keep_scale, site, BLOCK_M, BLOCK_N, DROPOUT, PRECISION)
        delta = tl.sum(probs * dprobs, 0)
        if BLOCK_P > 0:
            p_probs, p_dropped, p_dprobs = key_probabilities(q, do, pk, pv, lse2, num_prefix, scale2 * prefix_scale, prefix_scale,
                                                             first, 0, c2, PREFIX_PROB, seed,
                                                         threshold, keep_scale, site, BLOCK_M, BLOCK_P, DROPOUT, PRECISION)
            delta += tl.sum(p_probs * p_dprobs, 0)
            p_ds = (p_probs * (p_dprobs - delta[None, :]) * prefix_scale).to(q.dtype)
            if FUSE_PREFIX:
                dpv = tl.dot(p_dropped.to(do.dtype), do, dpv, input_precision=PRECISION)
                dpk = tl.dot(p_ds, q, dpk, input_precision=PRECISION)
        if STORE_DELTA:
            rows = tl.arange(0, BLOCK_M)
            tl.store(delta_NT + stat_row + first + rows, delta, mask=rows < length - first)
        if NEED_TOKENS:
            dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
            ds = (probs * (dprobs - delta[None, :])).to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
            dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION)
            if BLOCK_P > 0:
                dq = tl.dot(tl.trans(p_ds), pk, dq, input_precision=PRECISION)
            store_tile(dqkv_T3ND + n * D, start + first, grad_row, length - first, dq * scale, BLOCK_M, D, BLOCK_D)
    if NEED_TOKENS:
        store_tile(dqkv_T3ND + (N + n) * D, start, grad_row, length, dk * scale, BLOCK_N, D, BLOCK_D)
        store_tile(dqkv_T3ND + (2 * N + n) * D, start, grad_row, length, dv, BLOCK_N, D, BLOCK_D)
    if FUSE_PREFIX:
        dpk *= scale
        if PREFIX_DROPOUT:
            dpk = tl.where(prefix_keep(0, c2, seed, prefix_threshold, site, PREFIX_K, BLOCK_P, BLOCK_D), dpk, 0.0)
            dpv = tl.where(prefix_keep(0, c2, seed, prefix_threshold, site, PREFIX_V, BLOCK_P, BLOCK_D), dpv * prefix_scale, 0.0)
        row = b.to(tl.int64) * P
        store_tile(partial_2BPND + n * D, row, N * D, num_prefix, dpk, BLOCK_P, D, BLOCK_D)
        store_tile(partial_2BPND + n * D, row + B.to(tl.int64) * P, N * D, num_prefix, dpv, BLOCK_P, D, BLOCK_D)


def plain_arguments(q: Tensor, k: Tensor, v: Tensor, pk: Tensor | None, pv: Tensor | None, cu_seqlens: Tensor,
                    prompt_ids: Tensor | None, prompt_lengths: Tensor | None, scale: float, dropout_p: float,
                    prefix_dropout_p: float, seed: Tensor | None, site: int) -> tuple[dict, dict]:
    """The keyword arguments that all attention kernels share: (run-time ones, compile-time ones). No prefix means P = 0."""
    T, N, D = q.shape
    P = 0 if pk is None else pk.shape[1]
    run = {"cu_seqlens": cu_seqlens, "prompt_ids": prompt_ids, "prompt_lengths": prompt_lengths, "seed": seed,
           "q_row": q.stride(0), "k_row": k.stride(0), "v_row": v.stride(0),
           "pk_prompt": pk.stride(0) if P else 0, "pk_row": pk.stride(1) if P else 0,
           "pv_prompt": pv.stride(0) if P else 0, "pv_row": pv.stride(1) if P else 0,
           "T": T, "B": cu_seqlens.shape[0] - 1, "P": P, "N": N, "scale": scale, "threshold": threshold_arg(dropout_p),
           "keep_scale": 1.0 / (1.0 - dropout_p), "prefix_threshold": threshold_arg(prefix_dropout_p),
           "prefix_scale": 1.0 / (1.0 - prefix_dropout_p), "site": site}
    compile_time = {"D": D, "BLOCK_D": power_of_two(D), "DROPOUT": dropout_p > 0,
                    "PREFIX_DROPOUT": P > 0 and prefix_dropout_p > 0,
                    "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32"}
    return run, compile_time


def packed_plan(run: dict, fixed: dict, prefix_k_KPND: Tensor | None, max_seqlen: int, itemsize: int,
                key_range_T2: Tensor | None) -> PackedPlan | None:
    """Whether rows are short enough for prefix_attention_short.py and see one undropped prompt and all of their sequence."""
    one_prompt = run["prompt_ids"] is None or prefix_k_KPND is None or prefix_k_KPND.shape[0] == 1
    if not one_prompt or fixed["PREFIX_DROPOUT"] or key_range_T2 is not None:
        return None
    return choose_packed(max_seqlen, run["P"], fixed["D"], itemsize, run["B"], run["T"], run["N"], fixed["DROPOUT"])


def prefix_attention_fwd(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prefix_k_KPND: Tensor | None, prefix_v_KPND: Tensor | None,
                         cu_seqlens: Tensor, max_seqlen: int, prompt_ids: Tensor | None, prompt_lengths: Tensor | None,
                         scale: float, dropout_p: float, prefix_dropout_p: float, seed: Tensor | None, site: int,
                         context_B: Tensor | None, key_range_T2: Tensor | None) -> tuple[Tensor, Tensor]:
    """out [T, N, D] and the natural log-sum-exp [N, T] in fp32; both are 0 in rows past the last sequence.

    context_B, key_range_T2: what each query sees (ops/prefix_attention.py), or None for all tokens of its sequence.
    """
    T, N, D = q_TND.shape
    out_TND = q_TND.new_empty((T, N, D))
    lse_NT = q_TND.new_empty((N, T), dtype=torch.float32)
    if T > 0:
        run, fixed = plain_arguments(q_TND, k_TND, v_TND, prefix_k_KPND, prefix_v_KPND, cu_seqlens, prompt_ids, prompt_lengths,
                                     scale, dropout_p, prefix_dropout_p, seed, site)
        if packed := packed_plan(run, fixed, prefix_k_KPND, max_seqlen, q_TND.element_size(), key_range_T2):
            inputs = (q_TND, k_TND, v_TND, prefix_k_KPND, prefix_v_KPND)
            prefix_attention_short.forward(inputs, out_TND, lse_NT, run, fixed, packed)
            return out_TND, lse_NT
        dropout = fixed["DROPOUT"] or fixed["PREFIX_DROPOUT"]
        plan = choose(max_seqlen, run["P"], D, q_TND.element_size(), dropout=dropout)
        items = tile_list(cu_seqlens, run, max_seqlen, plan.forward.block_m)
        if items is not None or key_range_T2 is not None:
            plan = tightened(plan, D, q_TND.element_size(), dropout)
        tiles = plan.forward
        forward_kernel[grid(items, run, max_seqlen, tiles.block_m)](
            q_TND, k_TND, v_TND, prefix_k_KPND, prefix_v_KPND, out_TND, lse_NT, context_B, key_range_T2, items, **run, **fixed,
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_P=tiles.block_p, **tiles.launch)
    return out_TND, lse_NT


def prefix_attention_bwd(dout_TND: Tensor, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prefix_k_KPND: Tensor | None,
                         prefix_v_KPND: Tensor | None, out_TND: Tensor | None, lse_NT: Tensor, cu_seqlens: Tensor,
                         max_seqlen: int,
                         prompt_ids: Tensor | None, prompt_lengths: Tensor | None, scale: float, dropout_p: float,
                         prefix_dropout_p: float, seed: Tensor | None, site: int, context_B: Tensor | None,
                         key_range_T2: Tensor | None, need_tokens: bool, need_prefix: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dqkv [T, 3, N, D] (empty [0] unless need_tokens); dprefix_k, dprefix_v fp32 [K, P, N, D] (empty [0] unless need_prefix)."""
    T, N, D = q_TND.shape
    dqkv = q_TND.new_empty((T, 3, N, D) if need_tokens else 0)
    need_prefix = need_prefix and prefix_k_KPND is not None
    dprefix = tuple(q_TND.new_empty(prefix_k_KPND.shape if need_prefix else 0, dtype=torch.float32) for _ in range(2))
    run, fixed = plain_arguments(q_TND, k_TND, v_TND, prefix_k_KPND, prefix_v_KPND, cu_seqlens, prompt_ids, prompt_lengths, scale,
                                 dropout_p, prefix_dropout_p, seed, site)
    need_prefix = need_prefix and dprefix[0].numel() > 0
    B, P = run["B"], run["P"]
    if T == 0 or B == 0 or max_seqlen == 0:
        return dqkv.zero_(), dprefix[0].zero_(), dprefix[1].zero_()
    if not need_tokens and not need_prefix:
        return dqkv, *dprefix
    dropout = fixed["DROPOUT"] or fixed["PREFIX_DROPOUT"]
    plan = choose(max_seqlen, P, D, q_TND.element_size(), B, T, dropout)
    if key_range_T2 is not None:
        plan = tightened(plan, D, q_TND.element_size(), dropout)
    inputs = (dout_TND, q_TND, k_TND, v_TND, prefix_k_KPND, prefix_v_KPND)
    packed = packed_plan(run, fixed, prefix_k_KPND, max_seqlen, q_TND.element_size(), key_range_T2) if out_TND is None else None
    if packed and packed.sweep is None:
        delta_NT = prefix_attention_short_bwd.tokens_bwd(inputs, lse_NT, dqkv, run, fixed, packed, need_tokens)
    elif plan.sweep is None or out_TND is not None or key_range_T2 is not None:
        delta_NT = prefix_attention_long.tokens_bwd(inputs, out_TND, lse_NT, dqkv, max_seqlen, run, fixed, plan, need_tokens,
                                                    (context_B, key_range_T2))
    else:
        fuse = need_prefix and (packed is not None or plan.fuse_prefix)
        partials = triton.cdiv(T, packed.window) if packed else B
        delta_NT = torch.empty_like(lse_NT) if need_prefix and not fuse else None
        partial = q_TND.new_empty((2, partials, P, N, D), dtype=torch.float32) if fuse else None
        if packed:
            prefix_attention_short.sweep(inputs, lse_NT, dqkv, partial, run, fixed, packed, need_tokens)
        else:
            tiles = plan.sweep
            sweep_kernel[(N, B + 1)](*inputs, lse_NT, dqkv, delta_NT, partial, **run, **fixed, BLOCK_M=tiles.block_m,
                                     BLOCK_N=tiles.block_n, BLOCK_P=tiles.block_p, NEED_TOKENS=need_tokens, FUSE_PREFIX=fuse,
                                     STORE_DELTA=delta_NT is not None, **tiles.launch)
        if fuse:
            prefix_grad.reduce(partial, dprefix, None if packed else prompt_ids, prompt_lengths, by_sequence=True)
            return dqkv, *dprefix
    if need_prefix:
        prefix_grad.prefix_bwd(inputs, lse_NT, delta_NT, dprefix, max_seqlen, run, fixed, plan.prefix)
    return dqkv, *dprefix
