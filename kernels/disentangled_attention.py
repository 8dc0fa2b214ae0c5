"""DeBERTa's disentangled attention with a shared prefix: the forward kernel and the launchers of both directions.

    score_ij = scale (q_i . k_j + q_i . rel_k[slot(i - j)] + k_j . rel_q[slot(i - j)])

A tile of M queries and N keys holds only M + N - 1 distances. Their rows of rel_k and rel_q (the band) are fetched through the
slots, multiplied with q and with k on the tensor cores, and read back askew: element (i, j) takes column i - j + N - 1. Nothing
of size [T, R] is ever in memory, and the tables, a few hundred rows a head, stay in L2. Prefix columns have no relative part, so
they and the prefix gradient are prefix attention's. Backward: disentangled_attention_bwd.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ptv2_engine.kernels import prefix_grad
from ptv2_engine.kernels.attention_tile import LN2, LOG2E, attend, load_prefix, load_tile, prompt_of, store_tile, zero_rows
from ptv2_engine.kernels.disentangled_attention_bwd import tokens_bwd
from ptv2_engine.kernels.disentangled_band import relative_scores
from ptv2_engine.kernels.philox import PREFIX_K, PREFIX_PROB, PREFIX_V, TOKEN_PROB
from ptv2_engine.kernels.prefix_attention import plain_arguments
from ptv2_engine.kernels.tuning import choose_relative, power_of_two
from torch import Tensor


@triton.jit(do_not_specialize=["T", "B", "P", "L", "threshold", "prefix_threshold", "site"])
def relative_forward_kernel(q_TND, k_TND, v_TND, prefix_k, prefix_v, rel_k_RND, rel_q_RND, slots, out_TND, lse_NT, L, cu_seqlens,
                            prompt_ids, prompt_lengths, seed, q_row, k_row, v_row, pk_prompt, pk_row, pv_prompt, pv_row, T, B, P,
                            N, scale, threshold, keep_scale, prefix_threshold, prefix_scale, site, D: tl.constexpr,
                            BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
                            BAND: tl.constexpr, DROPOUT: tl.constexpr, PREFIX_DROPOUT: tl.constexpr, PRECISION: tl.constexpr):
    tile, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(cu_seqlens + b)
    out_row = N * D
    if b == B:
        zero_rows(out_TND + n * D, start, T, out_row, tile, tl.num_programs(0), BLOCK_M, D, BLOCK_D)
        for row in range(start + tile * BLOCK_M, T, tl.num_programs(0) * BLOCK_M):
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
    row_max = tl.full((BLOCK_M,), -1.0e30, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    if BLOCK_P > 0:
        prompt, num_prefix = prompt_of(prompt_ids, prompt_lengths, b, P)
        pk_base = prefix_k + prompt * pk_prompt + n * D
        pv_base = prefix_v + prompt * pv_prompt + n * D
        for j in range(0, num_prefix, BLOCK_P):
            k = load_prefix(pk_base, j, pk_row, num_prefix, c2, seed, prefix_threshold, site, PREFIX_K, PREFIX_DROPOUT,
                            BLOCK_P, D, BLOCK_D)
            v = load_prefix(pv_base, j, pv_row, num_prefix, c2, seed, prefix_threshold, site, PREFIX_V, PREFIX_DROPOUT,
                            BLOCK_P, D, BLOCK_D)
            acc, row_max, row_sum = attend(acc, row_max, row_sum, q, k, v, num_prefix - j, scale2 * prefix_scale, prefix_scale,
                                           first, j, c2, PREFIX_PROB, seed, threshold, site, BLOCK_M, BLOCK_P, DROPOUT, PRECISION)
    for j in range(0, length, BLOCK_N):
        k = load_tile(k_TND + n * D, start + j, k_row, length - j, BLOCK_N, D, BLOCK_D)
        relative = relative_scores(q, k, rel_k_RND, rel_q_RND, slots, n, N, first - j, L, BLOCK_M, BLOCK_N, BAND, D, BLOCK_D,
                                   PRECISION)
        v = load_tile(v_TND + n * D, start + j, v_row, length - j, BLOCK_N, D, BLOCK_D)
        acc, row_max, row_sum = attend(acc, row_max, row_sum, q, k, v, length - j, scale2, 1.0, first, j, c2, TOKEN_PROB, seed,
                                       threshold, site, BLOCK_M, BLOCK_N, DROPOUT, PRECISION, None, relative)
    inverse = 1.0 / row_sum
    if DROPOUT:
        inverse = inverse * keep_scale
    store_tile(out_TND + n * D, start + first, out_row, length - first, acc * inverse[:, None], BLOCK_M, D, BLOCK_D)
    rows = tl.arange(0, BLOCK_M)
    tl.store(lse_NT + n.to(tl.int64) * T + start + first + rows, (row_max + tl.log2(row_sum)) * LN2, mask=rows < length - first)


def disentangled_attention_fwd(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prefix_k_KPND: Tensor | None,
                               prefix_v_KPND: Tensor | None, rel_k_RND: Tensor | None, rel_q_RND: Tensor | None, slots: Tensor,
                               cu_seqlens: Tensor, max_seqlen: int, prompt_ids: Tensor | None, prompt_lengths: Tensor | None,
                               scale: float, dropout_p: float, prefix_dropout_p: float, seed: Tensor | None,
                               site: int) -> tuple[Tensor, Tensor]:
    """out [T, N, D] and the natural log-sum-exp [N, T] in fp32; both are 0 in rows past the last sequence."""
    T, N, D = q_TND.shape
    out_TND = q_TND.new_empty((T, N, D))
    lse_NT = q_TND.new_empty((N, T), dtype=torch.float32)
    if T > 0:
        run, fixed = plain_arguments(q_TND, k_TND, v_TND, prefix_k_KPND, prefix_v_KPND, cu_seqlens, prompt_ids, prompt_lengths,
                                     scale, dropout_p, prefix_dropout_p, seed, site)
        tiles = choose_relative(max_seqlen, run["P"], D, q_TND.element_size(), dropout_p > 0 or prefix_dropout_p > 0).forward
        relative_forward_kernel[(max(1, triton.cdiv(max_seqlen, tiles.block_m)), N, run["B"] + 1)](
            q_TND, k_TND, v_TND, prefix_k_KPND, prefix_v_KPND, rel_k_RND, rel_q_RND, slots, out_TND, lse_NT,
            (slots.shape[0] + 1) // 2, **run, **fixed, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_P=tiles.block_p,
            BAND=power_of_two(tiles.block_m + tiles.block_n - 1), num_warps=tiles.warps, num_stages=tiles.stages)
    return out_TND, lse_NT


def disentangled_attention_bwd(dout_TND: Tensor, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prefix_k_KPND: Tensor | None,
                               prefix_v_KPND: Tensor | None, rel_k_RND: Tensor | None, rel_q_RND: Tensor | None, slots: Tensor,
                               out_TND: Tensor, lse_NT: Tensor, cu_seqlens: Tensor, max_seqlen: int, prompt_ids: Tensor | None,
                               prompt_lengths: Tensor | None, scale: float, dropout_p: float, prefix_dropout_p: float,
                               seed: Tensor | None, site: int, need_tokens: bool,
                               need_prefix: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dqkv [T, 3, N, D] (empty [0] unless need_tokens); dprefix_k, dprefix_v fp32 [K, P, N, D] (empty [0] unless need_prefix).
    out_TND is the forward's."""
    T, N, D = q_TND.shape
    dqkv = q_TND.new_empty((T, 3, N, D) if need_tokens else 0)
    need_prefix = need_prefix and prefix_k_KPND is not None
    dprefix = tuple(q_TND.new_empty(prefix_k_KPND.shape if need_prefix else 0, dtype=torch.float32) for _ in range(2))
    run, fixed = plain_arguments(q_TND, k_TND, v_TND, prefix_k_KPND, prefix_v_KPND, cu_seqlens, prompt_ids, prompt_lengths, scale,
                                 dropout_p, prefix_dropout_p, seed, site)
    need_prefix = need_prefix and dprefix[0].numel() > 0
    if T == 0 or run["B"] == 0 or max_seqlen == 0:
        return dqkv.zero_(), dprefix[0].zero_(), dprefix[1].zero_()
    if not need_tokens and not need_prefix:
        return dqkv, *dprefix
    plan = choose_relative(max_seqlen, run["P"], D, q_TND.element_size(), fixed["DROPOUT"] or fixed["PREFIX_DROPOUT"])
    inputs = (dout_TND, q_TND, k_TND, v_TND, prefix_k_KPND, prefix_v_KPND)
    delta_NT = tokens_bwd(inputs, (rel_k_RND, rel_q_RND, slots), out_TND, lse_NT, dqkv, max_seqlen, run,
                                                  fixed, plan, need_tokens)
    if need_prefix:
        prefix_grad.prefix_bwd(inputs, lse_NT, delta_NT, dprefix, max_seqlen, run, fixed, plan.prefix)
    return dqkv, *dprefix



