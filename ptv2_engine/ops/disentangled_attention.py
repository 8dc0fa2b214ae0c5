"""disentangled_attention: DeBERTa's attention (arXiv 2006.03654, equation 4) with a shared trainable prefix, packed.

    score_ij = scale * (q_i . k_j  +  q_i . rel_k[slot(i - j)]  +  k_j . rel_q[slot(i - j)])       content, c2p, p2c
    score_ip = scale * q_i . Pk_p                                                                  prefix: no relative part

rel_k and rel_q are the projected relative-position tables, frozen, so they get no gradient; slot maps a distance to a row
of theirs (clamped in v1, in log buckets in v2 and v3). The relative parts are made inside a tile, from the distances that
occur in it: nothing of size [T, R] is written. Saved for backward: what prefix_attention saves, and on Triton the output
(2H), whose product with dO is cheaper there than a second pass over three score terms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptv2_engine.errors import InputError
from ptv2_engine.ops import _philox, prefix_attention
from ptv2_engine.ops._dispatch import cached_table, choose, describe, launcher

_FRONT = "Tensor q_TND, Tensor k_TND, Tensor v_TND, Tensor? prefix_k_KPND, Tensor? prefix_v_KPND, Tensor? rel_k_RND, "\
         "Tensor? rel_q_RND, Tensor slots, "
_BACK = "Tensor cu_seqlens, int max_seqlen, Tensor? prompt_ids, Tensor? prompt_lengths, float scale, float dropout_p, "\
        "float prefix_dropout_p, Tensor? seed, int site"
torch.library.define("ptv2::disentangled_attention_fwd", f"({_FRONT}{_BACK}) -> (Tensor out_TND, Tensor lse_NT)")
torch.library.define(
    "ptv2::disentangled_attention_bwd",
    f"(Tensor dout_TND, {_FRONT}Tensor? out_TND, Tensor lse_NT, {_BACK}, bool need_tokens, bool need_prefix) "
    "-> (Tensor dqkv_T3ND, Tensor dprefix_k_KPND, Tensor dprefix_v_KPND)")


@torch.library.register_fake("ptv2::disentangled_attention_fwd")
def _fake_fwd(q_TND, *_rest):  # type: ignore[no-untyped-def]
    T, N, _ = q_TND.shape
    return q_TND.new_empty(q_TND.shape), q_TND.new_empty(N, T, dtype=torch.float32)


@torch.library.register_fake("ptv2::disentangled_attention_bwd")
def _fake_bwd(dout_TND, q_TND, k_TND, v_TND, prefix_k_KPND, *rest):  # type: ignore[no-untyped-def]
    T, N, D = q_TND.shape
    need_tokens, need_prefix = rest[-2:]
    dqkv = q_TND.new_empty((T, 3, N, D) if need_tokens else 0)
    if prefix_k_KPND is None or not need_prefix:
        return dqkv, q_TND.new_empty(0, dtype=torch.float32), q_TND.new_empty(0, dtype=torch.float32)
    return dqkv, *(q_TND.new_empty(prefix_k_KPND.shape, dtype=torch.float32) for _ in range(2))


@cached_table
def slots_of(length: int, span: int, buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """int32 [2L - 1]: the table row of each distance d = i - j at index d + L - 1, for tables of 2 * span rows.

    buckets 0: the distance itself, clamped to [-span, span - 1] (v1). Otherwise log buckets: distances below buckets / 2 keep a
    row each, farther ones share rows that grow geometrically up to max_distance (v2's make_log_bucket_position).
    """
    distance = torch.arange(-(length - 1), length)
    if buckets > 0 and max_distance > 0:
        middle = buckets // 2
        far = distance.abs().clamp(min=middle)
        log_range = torch.log(torch.tensor((max_distance - 1) / middle))       # fp32 throughout: ceil must round as published
        log = torch.ceil(torch.log(far / middle) / log_range * (middle - 1)) + middle
        distance = torch.where(distance.abs() <= middle, distance, (log * distance.sign()).long())
    return (distance + span).clamp(0, 2 * span - 1).int().to(device)


def reference(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prefix_k_KPND: Tensor | None, prefix_v_KPND: Tensor | None,
              rel_k_RND: Tensor | None, rel_q_RND: Tensor | None, slots: Tensor, cu_seqlens: Tensor, max_seqlen: int, *,
              prompt_ids: Tensor | None = None, prompt_lengths: Tensor | None = None, scale: float = 1.0,
              dropout_p: float = 0.0, prefix_dropout_p: float = 0.0, seed: Tensor | None = None, site: int = 0) -> Tensor:
    """The same in plain PyTorch: prefix_attention's reference with the relative scores of each sequence added."""
    L = (slots.numel() + 1) // 2

    def relative(start: int, end: int) -> Tensor:
        S, N = end - start, q_TND.shape[1]
        index = torch.arange(S, device=q_TND.device)
        rows = slots[L - S:L + S - 1].long()                           # of the distances that occur, -(S - 1) first
        at_NSS = (index[:, None] - index[None, :] + S - 1).expand(N, S, S)
        total = q_TND.new_zeros(N, S, S)
        if rel_k_RND is not None:                                      # a score for each distance, then each key's distance
            total = total + torch.einsum("snd,rnd->nsr", q_TND[start:end], rel_k_RND[rows]).gather(2, at_NSS)
        if rel_q_RND is not None:
            by_key = torch.einsum("tnd,rnd->ntr", k_TND[start:end], rel_q_RND[rows]).gather(2, at_NSS.transpose(1, 2))
            total = total + by_key.transpose(1, 2)
        return total * scale

    return prefix_attention.reference(
        q_TND, k_TND, v_TND, prefix_k_KPND, prefix_v_KPND, cu_seqlens, max_seqlen, prompt_ids=prompt_ids,
        prompt_lengths=prompt_lengths, scale=scale, dropout_p=dropout_p, prefix_dropout_p=prefix_dropout_p, seed=seed, site=site,
        relative=relative)


class _Disentangled(torch.autograd.Function):
    """q, k, v as one [T, 3, N, D] buffer, and its gradient as another."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, pk: Tensor | None, pv: Tensor | None, tables: tuple[Any, ...], plain: tuple[Any, ...],
                backend: str) -> Tensor:
        out, lse = launcher(backend, qkv.device, "disentangled_attention_fwd")(*qkv.unbind(1), pk, pv, *tables, *plain)
        ctx.save_for_backward(qkv, pk, pv, out if backend == "triton" else None, lse)
        ctx.tables, ctx.plain, ctx.backend = tables, plain, backend
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, pk, pv, out, lse = ctx.saved_tensors
        need_tokens = ctx.needs_input_grad[0]
        need_prefix = pk is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        bwd = launcher(ctx.backend, dout.device, "disentangled_attention_bwd")
        scratch = prefix_attention.planned_partials(ctx.backend, pk if need_prefix else None, ctx.plain[0])  # noqa: F841
        dqkv, dpk, dpv = bwd(dout.contiguous(), *qkv.unbind(1), pk, pv, *ctx.tables, out, lse, *ctx.plain, need_tokens,
                             need_prefix)
        return dqkv if need_tokens else None, dpk if need_prefix else None, dpv if need_prefix else None, None, None, None


def _check_tables(qkv: Tensor, tables: tuple[Tensor | None, Tensor | None], slots: Tensor, max_seqlen: int) -> None:
    for name, table in zip(("rel_k", "rel_q"), tables, strict=True):
        if table is not None and (table.dim() != 3 or table.shape[1:] != qkv.shape[2:] or table.dtype != qkv.dtype
                                  or not table.is_contiguous()):
            raise InputError(f"disentangled_attention: {name} {describe(table)} must be contiguous [R, {qkv.shape[2]}, "
                             f"{qkv.shape[3]}] in {qkv.dtype} like qkv; project and cast the table.")
    if slots.dtype != torch.int32 or slots.dim() != 1 or slots.numel() < 2 * max_seqlen - 1:
        raise InputError(f"disentangled_attention: slots {describe(slots)} must be int32 with 2 * {max_seqlen} - 1 entries or "
                         "more for these sequences; make them with slots_of().")


def disentangled_attention(qkv_T3ND: Tensor, prefix_k_KPND: Tensor | None, prefix_v_KPND: Tensor | None,
                           rel_k_RND: Tensor | None, rel_q_RND: Tensor | None, slots: Tensor, cu_seqlens: Tensor,
                           max_seqlen: int, *, prompt_ids: Tensor | None = None, prompt_lengths: Tensor | None = None,
                           scale: float | None = None, dropout_p: float = 0.0, prefix_dropout_p: float = 0.0,
                           seed: int | Tensor | None = None, site: int = 0) -> Tensor:
    """DeBERTa's attention of packed sequences over a shared trainable prefix and their own tokens.

    Arguments:
        qkv_T3ND: [T, 3, N, D], a fused projection.
        prefix_k_KPND .. site: as prefix_attention; the prefix has no relative score.
        rel_k_RND, rel_q_RND: [R, N, D] contiguous, qkv's dtype, frozen: keys and queries of the relative positions; None leaves
            the c2p or p2c score out.
        slots: int32 [2L - 1], L >= max_seqlen: slots[i - j + L - 1] is the row for query i, key j. See slots_of.
        scale: default 1 / sqrt(D * (1 + number of tables)), as published.
    Returns:
        out_TND [T, N, D]; rows past cu_seqlens[B] are zero. Gradients reach qkv and the prefix.
    Raises:
        InputError: shapes or dtypes that do not fit together. BackendError: see use_backend.
    """
    if qkv_T3ND.dim() != 4 or qkv_T3ND.shape[1] != 3:
        raise InputError(f"disentangled_attention: qkv {describe(qkv_T3ND)} must be [T, 3, N, D]; reshape the fused projection's "
                         "output.")
    tables = (rel_k_RND, rel_q_RND)
    q, k, v = qkv_T3ND.unbind(1)
    prefix_attention.check(q, k, v, prefix_k_KPND, prefix_v_KPND, cu_seqlens, (dropout_p, prefix_dropout_p))
    _check_tables(qkv_T3ND, tables, slots, max_seqlen)
    D = qkv_T3ND.shape[3]
    scale = (D * (1 + sum(t is not None for t in tables)))**-0.5 if scale is None else scale
    pk, pv = prefix_k_KPND, prefix_v_KPND
    if pk is None or pv is None or pk.shape[1] == 0:
        pk = pv = None
        prefix_dropout_p = 0.0
    seed = _philox.seed_tensor(seed, qkv_T3ND.device, dropout_p > 0 or prefix_dropout_p > 0)
    choice = choose("disentangled_attention", qkv_T3ND.device, qkv_T3ND.dtype, prefix_attention.extra_reasons(D))
    if choice.backend == "reference":
        return reference(q, k, v, pk, pv, rel_k_RND, rel_q_RND, slots, cu_seqlens, max_seqlen, prompt_ids=prompt_ids,
                         prompt_lengths=prompt_lengths, scale=scale, dropout_p=dropout_p, prefix_dropout_p=prefix_dropout_p,
                         seed=seed, site=site)
    qkv = qkv_T3ND.contiguous()
    if pk is not None and pv is not None:
        pk, pv = map(prefix_attention.heads_contiguous, (pk, pv))
    plain = (cu_seqlens, max_seqlen, prompt_ids, prompt_lengths, scale, dropout_p, prefix_dropout_p, seed, site)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (qkv, pk, pv)):
        return _Disentangled.apply(qkv, pk, pv, (*tables, slots), plain, choice.backend)
    fwd = launcher(choice.backend, qkv.device, "disentangled_attention_fwd")
    return fwd(*qkv.unbind(1), pk, pv, *tables, slots, *plain)[0]
