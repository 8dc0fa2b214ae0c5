"""prefix_attention: attention of packed sequences over [one shared trainable prefix ; their own tokens].

    out_i = sum_j softmax_j(scale * q_i . [Pk ; k]_j) [Pv ; v]_j        per sequence and head (P-Tuning v2, arXiv 2110.07602)

The prefix is one copy for the whole batch, [K, P, N, D] for K prompts: it is never expanded over sequences nor
concatenated to the keys, and its gradient is summed over the batch inside the kernel in a fixed order.
Saved for backward: q, k, v (6H bytes a token in bf16) and the log-sum-exp (4N). On a GPU, rows of more than TWO_PASS_KEYS keys
also keep their output (2H): a kernel that streams keys needs rowsum(dO * O) before it has seen the whole row, and else passes
over the keys twice.
When q, k, v need no gradient (the lowest prompted layer) only dPk and dPv are computed.

Which tokens a query sees: all of its sequence, or, with `context` and `key_range`, the first context[b] tokens and those in
[lo, hi). That covers GLM's part A and causal part B, candidates that share one context, and sliding windows; see key_ranges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ptv2_engine import _cuda
from ptv2_engine.errors import InputError
from ptv2_engine.ops import _philox
from ptv2_engine.ops._dispatch import choose, describe, launcher, readable

TWO_PASS_KEYS = 2048
TRITON_HEAD_DIMS = (16, 32, 64, 80, 96, 128)

_COMMON = ("Tensor q_TND, Tensor k_TND, Tensor v_TND, Tensor? prefix_k_KPND, Tensor? prefix_v_KPND, {between}Tensor cu_seqlens, "
           "int max_seqlen, Tensor? prompt_ids, Tensor? prompt_lengths, float scale, float dropout_p, float prefix_dropout_p, "
           "Tensor? seed, int site, Tensor? context_B, Tensor? key_range_T2")
torch.library.define("ptv2::prefix_attention_fwd", f"({_COMMON.format(between='')}) -> (Tensor out_TND, Tensor lse_NT)")
torch.library.define(
    "ptv2::prefix_attention_bwd",
    f"(Tensor dout_TND, {_COMMON.format(between='Tensor? out_TND, Tensor lse_NT, ')}, bool need_tokens, bool need_prefix) "
    "-> (Tensor dqkv_T3ND, Tensor dprefix_k_KPND, Tensor dprefix_v_KPND)")


@torch.library.register_fake("ptv2::prefix_attention_fwd")
def _fake_fwd(q_TND, k_TND, v_TND, prefix_k_KPND, prefix_v_KPND, *_rest):  # type: ignore[no-untyped-def]
    T, N, _ = q_TND.shape
    return q_TND.new_empty(q_TND.shape), q_TND.new_empty(N, T, dtype=torch.float32)


@torch.library.register_fake("ptv2::prefix_attention_bwd")
def _fake_bwd(dout_TND, q_TND, k_TND, v_TND, prefix_k_KPND, prefix_v_KPND, out_TND, lse_NT, cu_seqlens, max_seqlen, prompt_ids,
              prompt_lengths, scale, dropout_p, prefix_dropout_p, seed, site, context_B, key_range_T2, need_tokens,
              need_prefix):  # type: ignore[no-untyped-def]
    T, N, D = q_TND.shape
    dqkv = q_TND.new_empty((T, 3, N, D) if need_tokens else 0)
    if prefix_k_KPND is None or not need_prefix:
        return dqkv, q_TND.new_empty(0, dtype=torch.float32), q_TND.new_empty(0, dtype=torch.float32)
    return dqkv, *(q_TND.new_empty(prefix_k_KPND.shape, dtype=torch.float32) for _ in range(2))


def reference(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prefix_k_KPND: Tensor | None, prefix_v_KPND: Tensor | None,
              cu_seqlens: Tensor, max_seqlen: int, *, prompt_ids: Tensor | None = None, prompt_lengths: Tensor | None = None,
              scale: float | None = None, dropout_p: float = 0.0, prefix_dropout_p: float = 0.0, seed: Tensor | None = None,
              site: int = 0, context_B: Tensor | None = None, key_range_T2: Tensor | None = None,
              relative: Callable[[int, int], Tensor] | None = None) -> Tensor:
    """The same in plain PyTorch, one sequence at a time: differentiable in q, k, v and prefix, any dtype and device.

    relative(start, end), when given, adds [N, S, S] to the token scores of the sequence in those rows.
    """
    T, N, D = q_TND.shape
    scale = D**-0.5 if scale is None else scale
    offsets = cu_seqlens.tolist()
    ids = [0] * (len(offsets) - 1) if prompt_ids is None else prompt_ids.tolist()
    rows = [q_TND.new_zeros(0, N, D)]
    for b, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        heads = b * N + torch.arange(N, device=q_TND.device)
        draw: dict[str, Any] = {"seed": seed, "site": site}
        q, k, v = (x[start:end].transpose(0, 1) for x in (q_TND, k_TND, v_TND))                      # [N, S, D]
        num_prefix = 0
        if prefix_k_KPND is not None and prefix_v_KPND is not None:
            num_prefix = prefix_k_KPND.shape[1] if prompt_lengths is None else int(prompt_lengths[ids[b]])
            pk, pv = (p[ids[b], :num_prefix].transpose(0, 1) for p in (prefix_k_KPND, prefix_v_KPND))  # [N, P, D]
            if prefix_dropout_p > 0:
                positions = torch.arange(num_prefix, device=q.device).expand(N, -1)
                pk, pv = (p * _philox.keep_scale(positions, D, heads, p=prefix_dropout_p, stream=stream, **draw).to(p.dtype)
                          for p, stream in ((pk, _philox.PREFIX_K), (pv, _philox.PREFIX_V)))
            k, v = torch.cat((pk, k), 1), torch.cat((pv, v), 1)
        scores = q @ k.transpose(1, 2) * scale                                                        # [N, S, P+S]
        if relative is not None:
            scores = scores + torch.nn.functional.pad(relative(start, end), (num_prefix, 0))
        if context_B is not None and key_range_T2 is not None:
            seen = visible(int(context_B[b]), key_range_T2[start:end])
            scores = scores.masked_fill(torch.nn.functional.pad(~seen, (num_prefix, 0)), float("-inf"))
        probs = torch.softmax(scores, dim=-1)
        if dropout_p > 0:
            queries = torch.arange(end - start, device=q.device).expand(N, -1)
            keep = [_philox.keep_scale(queries, columns, heads, p=dropout_p, stream=stream, **draw)
                    for columns, stream in ((num_prefix, _philox.PREFIX_PROB), (end - start, _philox.TOKEN_PROB))]
            probs = probs * torch.cat(keep, -1).to(probs.dtype)
        rows.append((probs @ v).transpose(0, 1))
    if offsets[-1] < T:
        rows.append(q_TND.new_zeros(T - offsets[-1], N, D))
    return torch.cat(rows)


def visible(context: int, key_range_S2: Tensor) -> Tensor:
    """bool [S, S]: which tokens each query of one sequence sees."""
    keys = torch.arange(key_range_S2.shape[0], device=key_range_S2.device)
    return (keys < context) | (keys >= key_range_S2[:, :1]) & (keys < key_range_S2[:, 1:])


def key_ranges(cu_seqlens: Tensor, num_tokens: int, *, causal_from: Tensor | None = None,
               first_key_T: Tensor | None = None, window: int | None = None) -> tuple[Tensor, Tensor]:
    """(context int32 [B], key_range int32 [T, 2]) for the two kinds of mask that encoders have.

    Arguments:
        causal_from: int [B]: tokens before it see each other (GLM's part A), later ones all of those and what is behind
            them (allowed(i, j) = j < causal_from or j <= i).
        first_key_T: int [T] with causal_from: a later token sees keys from here on only; several candidate answers behind
            one context then do not see each other.
        window: without causal_from, token i sees |i - j| <= window.
    """
    starts = cu_seqlens[:-1].long()
    rows = torch.arange(num_tokens, device=starts.device)
    owner = torch.searchsorted(cu_seqlens[1:].long(), rows, right=True).clamp(max=len(starts) - 1)     # also past the end
    index_T = rows - starts[owner]
    if causal_from is None:
        if window is None:
            raise InputError("key_ranges: neither causal_from nor window was given; pass one, or no ranges at all.")
        context = torch.zeros_like(starts)
        low, high = index_T - window, index_T + window + 1
    else:
        context = causal_from.to(starts.device)
        low = torch.zeros_like(index_T) if first_key_T is None else first_key_T
        high = torch.where(index_T < context[owner], low, index_T + 1)      # part A: nothing beyond the context
    return context.int(), torch.stack((low, high), 1).int()


def planned_partials(backend: str, prefix_KPND: Tensor | None, cu_seqlens: Tensor) -> Tensor | None:
    """While memory is planned, as much memory as the C++ kernels take for a moment for partial sums of the prefix's gradient: a
    planner sees what Python allocates. csrc/cpu/register_attention.cpp: about 16 runs of sequences of one prompt."""
    if backend != "native" or prefix_KPND is None or readable(prefix_KPND):
        return None
    K, P, N, D = prefix_KPND.shape
    runs = min(cu_seqlens.shape[0] - 1, 16 + K - 1)
    return prefix_KPND.new_empty((2, runs, P, N, D), dtype=torch.float32)


def _backward(ctx: Any, dout_TND: Tensor, need_tokens: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    q, k, v, pk, pv, out, lse = ctx.saved_tensors
    need_prefix = pk is not None and (ctx.needs_input_grad[ctx.prefix_at] or ctx.needs_input_grad[ctx.prefix_at + 1])
    bwd = launcher(ctx.backend, dout_TND.device, "prefix_attention_bwd")
    scratch = planned_partials(ctx.backend, pk if need_prefix else None, ctx.plain[0])  # noqa: F841  counted while bwd runs
    dqkv, dpk, dpv = bwd(dout_TND.contiguous(), q, k, v, pk, pv, out, lse, *ctx.plain, need_tokens, need_prefix)
    return dqkv, dpk if need_prefix else None, dpv if need_prefix else None


def _forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pk: Tensor | None, pv: Tensor | None, plain: tuple[Any, ...],
             backend: str, prefix_at: int) -> Tensor:
    out, lse = launcher(backend, q.device, "prefix_attention_fwd")(q, k, v, pk, pv, *plain)
    long = backend in ("triton", "cuda") and plain[1] + (0 if pk is None else pk.shape[1]) > TWO_PASS_KEYS
    ctx.save_for_backward(q, k, v, pk, pv, out if long else None, lse)
    ctx.plain, ctx.backend, ctx.prefix_at = plain, backend, prefix_at
    return out


class _PrefixAttention(torch.autograd.Function):
    """q, k, v apart: their gradients are three views of one buffer."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pk: Tensor | None, pv: Tensor | None, plain: tuple[Any, ...],
                backend: str) -> Tensor:
        return _forward(ctx, q, k, v, pk, pv, plain, backend, prefix_at=3)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        need_tokens = any(ctx.needs_input_grad[:3])
        dqkv, dpk, dpv = _backward(ctx, dout, need_tokens)
        return *(dqkv.unbind(1) if need_tokens else (None, None, None)), dpk, dpv, None, None


class _PrefixAttentionQKV(torch.autograd.Function):
    """q, k, v as one [T, 3, N, D] buffer: so is their gradient, ready for the dX product, without slices to add up."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, pk: Tensor | None, pv: Tensor | None, plain: tuple[Any, ...], backend: str) -> Tensor:
        q, k, v = qkv.unbind(1)
        return _forward(ctx, q, k, v, pk, pv, plain, backend, prefix_at=1)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        need_tokens = ctx.needs_input_grad[0]
        dqkv, dpk, dpv = _backward(ctx, dout, need_tokens)
        return dqkv if need_tokens else None, dpk, dpv, None, None


def check(q: Tensor, k: Tensor, v: Tensor, pk: Tensor | None, pv: Tensor | None, cu_seqlens: Tensor,
           dropouts: tuple[float, float]) -> None:
    if q.dim() != 3 or q.shape != k.shape or q.shape != v.shape or not q.dtype == k.dtype == v.dtype:
        raise InputError(f"prefix_attention: q {describe(q)}, k {describe(k)}, v {describe(v)} must share one shape [T, N, D] "
                         "and dtype; pass packed rows of equal head count and head dim.")
    if (pk is None) != (pv is None):
        raise InputError("prefix_attention: only one of prefix_k and prefix_v was given; pass both, or None for both.")
    if pk is not None and pv is not None and (pk.dim() != 4 or pk.shape != pv.shape or pk.shape[2:] != q.shape[1:]
                                              or pk.dtype != q.dtype or pv.dtype != q.dtype):
        raise InputError(f"prefix_attention: prefix_k {describe(pk)} and prefix_v {describe(pv)} must be [K, P, "
                         f"{q.shape[1]}, {q.shape[2]}] in {q.dtype} like q {describe(q)}; cast or reshape the prefix.")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise InputError(f"prefix_attention: cu_seqlens {describe(cu_seqlens)} must be int32 [B+1]; use cu_seqlens.int().")
    for p in dropouts:
        if not 0.0 <= p < 1.0:
            raise InputError(f"prefix_attention: drop probability {p} is outside [0, 1); pass 0 to switch dropout off.")


def _check_ranges(context_B: Tensor | None, key_range_T2: Tensor | None, T: int, B: int) -> None:
    if context_B is None and key_range_T2 is None:
        return
    if (context_B is None or key_range_T2 is None or context_B.shape != (B,) or key_range_T2.shape != (T, 2)
            or context_B.dtype != torch.int32 or key_range_T2.dtype != torch.int32 or not key_range_T2.is_contiguous()):
        got = [None if x is None else describe(x) for x in (context_B, key_range_T2)]
        raise InputError(f"prefix_attention: context {got[0]} and key_range {got[1]} must be int32 [{B}] and contiguous int32 "
                         f"[{T}, 2], or both None; make them with key_ranges().")


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def heads_contiguous(prefix_KPND: Tensor) -> Tensor:
    """The prefix with N and D contiguous; rows and prompts keep any stride."""
    fits = prefix_KPND.stride(3) == 1 and prefix_KPND.stride(2) == prefix_KPND.shape[3]
    return prefix_KPND if fits else prefix_KPND.contiguous()


def extra_reasons(head_dim: int) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    if head_dim not in TRITON_HEAD_DIMS:
        reasons["triton"] = [f"head dim {head_dim} (has {', '.join(map(str, TRITON_HEAD_DIMS))})"]
    if head_dim % 8 or head_dim > 256:
        reasons["native"] = [f"head dim {head_dim} (has multiples of 8 up to 256)"]
    return reasons


def _run(tokens: tuple[Tensor, ...], pk: Tensor | None, pv: Tensor | None, cu_seqlens: Tensor, max_seqlen: int,
         prompt_ids: Tensor | None, prompt_lengths: Tensor | None, scale: float | None, dropout_p: float,
         prefix_dropout_p: float, seed: int | Tensor | None, site: int, context_B: Tensor | None,
         key_range_T2: Tensor | None) -> Tensor:
    q, k, v = tokens if len(tokens) == 3 else tokens[0].unbind(1)
    check(q, k, v, pk, pv, cu_seqlens, (dropout_p, prefix_dropout_p))
    _check_ranges(context_B, key_range_T2, q.shape[0], cu_seqlens.numel() - 1)
    scale = q.shape[2]**-0.5 if scale is None else scale
    if pk is None or pk.shape[1] == 0:
        pk = pv = None
        prefix_dropout_p = 0.0
    seed = _philox.seed_tensor(seed, q.device, dropout_p > 0 or prefix_dropout_p > 0)
    extra = extra_reasons(q.shape[2])
    if q.device.type == "cuda":
        extra["cuda"] = _cuda.shape_reasons(q.shape[2], 0 if pk is None else pk.shape[1], key_range_T2 is not None)
    choice = choose("prefix_attention", q.device, q.dtype, extra)
    if choice.backend == "reference":
        return reference(q, k, v, pk, pv, cu_seqlens, max_seqlen, prompt_ids=prompt_ids, prompt_lengths=prompt_lengths,
                         scale=scale, dropout_p=dropout_p, prefix_dropout_p=prefix_dropout_p, seed=seed, site=site,
                         context_B=context_B, key_range_T2=key_range_T2)
    plain = (cu_seqlens, max_seqlen, prompt_ids, prompt_lengths, scale, dropout_p, prefix_dropout_p, seed, site, context_B,
             key_range_T2)
    if pk is not None and pv is not None:
        pk, pv = map(heads_contiguous, (pk, pv))
    if len(tokens) == 1:
        qkv = tokens[0].contiguous()
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (qkv, pk, pv)):
            return _PrefixAttentionQKV.apply(qkv, pk, pv, plain, choice.backend)
        q, k, v = qkv.unbind(1)
    else:
        q, k, v = map(_rows_contiguous, (q, k, v))
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, pk, pv)):
            return _PrefixAttention.apply(q, k, v, pk, pv, plain, choice.backend)
    return launcher(choice.backend, q.device, "prefix_attention_fwd")(q, k, v, pk, pv, *plain)[0]


def prefix_attention(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prefix_k_KPND: Tensor | None, prefix_v_KPND: Tensor | None,
                     cu_seqlens: Tensor, max_seqlen: int, *, prompt_ids: Tensor | None = None,
                     prompt_lengths: Tensor | None = None, scale: float | None = None, dropout_p: float = 0.0,
                     prefix_dropout_p: float = 0.0, seed: int | Tensor | None = None, site: int = 0,
                     context_B: Tensor | None = None, key_range_T2: Tensor | None = None) -> Tensor:
    """Bidirectional attention of packed sequences, each over a shared trainable prefix and its own tokens.

    Arguments:
        q_TND, k_TND, v_TND: [T, N, D], one dtype; any row stride (slices of a fused projection are not copied).
        prefix_k_KPND, prefix_v_KPND: [K, P, N, D] or both None: keys and values of K prompts, q's dtype.
        cu_seqlens: int32 [B+1], offsets of the sequences in T; max_seqlen: the longest, in tokens. Lengths 0 and 1 are legal.
        prompt_ids: int [B], each sequence's prompt (None: prompt 0). prompt_lengths: int [K], rows in use (None: P).
        scale: of the scores, default D ** -0.5.
        dropout_p: on the probabilities. prefix_dropout_p: on the prefix's elements, drawn anew for each sequence, as
            published. seed: int, int64 tensor [1] or None (drawn from torch's generator); site: the Philox call site.
        context_B, key_range_T2: int32 [B] and [T, 2] or both None (all tokens see each other): query i sees the prefix, tokens
            j < context[b] and lo <= j < hi, indices inside its sequence; it must see something. See key_ranges.
    Returns:
        out_TND [T, N, D]; rows past cu_seqlens[B] are zero. Gradients reach q, k, v and the prefix.
    Raises:
        InputError: shapes or dtypes that do not fit together. BackendError: see use_backend.
    """
    return _run((q_TND, k_TND, v_TND), prefix_k_KPND, prefix_v_KPND, cu_seqlens, max_seqlen, prompt_ids, prompt_lengths, scale,
                dropout_p, prefix_dropout_p, seed, site, context_B, key_range_T2)


def prefix_attention_qkv(qkv_T3ND: Tensor, prefix_k_KPND: Tensor | None, prefix_v_KPND: Tensor | None, cu_seqlens: Tensor,
                         max_seqlen: int, *, prompt_ids: Tensor | None = None, prompt_lengths: Tensor | None = None,
                         scale: float | None = None, dropout_p: float = 0.0, prefix_dropout_p: float = 0.0,
                         seed: int | Tensor | None = None, site: int = 0,
                         context_B: Tensor | None = None, key_range_T2: Tensor | None = None) -> Tensor:
    """prefix_attention for q, k, v that are one buffer [T, 3, N, D] (a fused projection): its gradient is one buffer too."""
    if qkv_T3ND.dim() != 4 or qkv_T3ND.shape[1] != 3:
        raise InputError(
            f"prefix_attention: qkv {describe(qkv_T3ND)} must be [T, 3, N, D]; reshape the fused projection's output."
        )
    return _run((qkv_T3ND,), prefix_k_KPND, prefix_v_KPND, cu_seqlens, max_seqlen, prompt_ids, prompt_lengths, scale, dropout_p,
                prefix_dropout_p, seed, site, context_B, key_range_T2)
