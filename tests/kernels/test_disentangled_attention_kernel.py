"""Disentangled attention's kernels against fp64 PyTorch written from the formula, pair by pair."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, KERNELS, TIMES, assert_same, kernel, randn, seed_tensor
from ptv2_engine.kernels.tuning import choose_relative

from ptv2_engine.ops import _philox
from ptv2_engine.ops.disentangled_attention import slots_of
from ptv2_engine.testing import assert_error_within, cu_seqlens_of, poisoned_memory, random_prefix, random_qkv

fp16, fp32 = torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    P: int = 5
    N: int = 1
    D: int = 32
    K: int = 1
    prompt_ids: tuple[int, ...] | None = None
    prompt_lengths: tuple[int, ...] | None = None
    dropout_p: float = 0.0
    prefix_dropout_p: float = 0.0
    dtype: torch.dtype = fp16
    terms: str = "c2p p2c"
    span: int = 24                 # distances are clamped, or in log buckets, within the longer sequences
    buckets: int = 0
    spare_rows: int = 0


def inputs(case: Case) -> dict:
    T = sum(case.lengths) + case.spare_rows
    qkv = random_qkv([T], case.N, case.D, case.dtype, device=DEVICE)
    qkv[T - case.spare_rows:] = float("nan")
    longest = max(case.lengths, default=0)
    ids = [None if x is None else torch.tensor(x, dtype=torch.int32, device=DEVICE)
           for x in (case.prompt_ids, case.prompt_lengths)]
    slots = slots_of(1 << max(longest - 1, 0).bit_length(), case.span, case.buckets, 4 * case.span, torch.device(DEVICE))
    return {"qkv": qkv, "dout": randn(T, case.N, case.D, seed=9, dtype=case.dtype) + 1, "longest": longest, "ids": ids,
            "prefix": random_prefix(case.K, case.P, case.N, case.D, case.dtype, device=DEVICE) if case.P else (None, None),
            "tables": [randn(2 * case.span, case.N, case.D, seed=20 + i, dtype=case.dtype) if term in case.terms else None
                       for i, term in enumerate(("c2p", "p2c"))], "slots": slots, "cu": cu_seqlens_of(list(case.lengths), DEVICE)}


def exact(case: Case, given: dict, precision: torch.dtype) -> list[torch.Tensor]:
    """out, dqkv and the prefix gradients, from the formula."""
    qkv = given["qkv"].to(precision).requires_grad_()
    pk, pv = prefix = [None if p is None else p.to(precision).requires_grad_() for p in given["prefix"]]
    rel_k, rel_q = (None if t is None else t.to(precision) for t in given["tables"])
    scale, draw, L = case.D**-0.5, {"seed": seed_tensor(), "site": 5}, (given["slots"].numel() + 1) // 2
    rows, start = [], 0
    for b, S in enumerate(case.lengths):
        q, k, v = (x[start:start + S].transpose(0, 1) for x in qkv.unbind(1))
        start += S
        heads = b * case.N + torch.arange(case.N, device=DEVICE)
        distance = torch.arange(S, device=DEVICE)[:, None] - torch.arange(S, device=DEVICE)[None]
        slot = given["slots"].long()[distance + L - 1]
        scores = q @ k.transpose(1, 2)
        if rel_k is not None:
            scores = scores + (q[:, :, None] * rel_k[slot].permute(2, 0, 1, 3)).sum(-1)
        if rel_q is not None:
            scores = scores + (k[:, None] * rel_q[slot].permute(2, 0, 1, 3)).sum(-1)
        used = 0
        if pk is not None:
            prompt = 0 if case.prompt_ids is None else case.prompt_ids[b]
            used = case.P if case.prompt_lengths is None else case.prompt_lengths[prompt]
            mine = [p[prompt, :used].transpose(0, 1) for p in prefix]
            if case.prefix_dropout_p > 0:
                at = torch.arange(used, device=DEVICE).expand(case.N, -1)
                mine = [p * _philox.keep_scale(at, case.D, heads, p=case.prefix_dropout_p, stream=stream, **draw).to(precision)
                        for p, stream in zip(mine, (_philox.PREFIX_K, _philox.PREFIX_V), strict=True)]
            scores, v = torch.cat((q @ mine[0].transpose(1, 2), scores), -1), torch.cat((mine[1], v), 1)
        probs = (scores * scale).softmax(-1)
        if case.dropout_p > 0:
            at = torch.arange(S, device=DEVICE).expand(case.N, -1)
            keep = [_philox.keep_scale(at, n, heads, p=case.dropout_p, stream=stream, **draw)
                    for n, stream in ((used, _philox.PREFIX_PROB), (S, _philox.TOKEN_PROB))]
            probs = probs * torch.cat(keep, -1).to(precision)
        rows.append((probs @ v).transpose(0, 1))
    out = torch.cat([*rows, qkv.new_zeros(case.spare_rows, case.N, case.D)])
    leaves = [qkv, *(p for p in prefix if p is not None)]
    if not out.numel() or not out.requires_grad:
        return [out.detach(), *map(torch.zeros_like, leaves)]
    grads = torch.autograd.grad(out, leaves, given["dout"].to(precision), allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g.nan_to_num() for x, g in zip(leaves, grads, strict=True))]


def run(case: Case, given: dict, package: str = KERNELS, need_tokens: bool = True, need_prefix: bool = True) -> tuple:
    module = kernel("disentangled_attention", package)
    q, k, v = given["qkv"].unbind(1)
    tables = (*given["prefix"], *given["tables"], given["slots"])
    plain = (given["cu"], given["longest"], *given["ids"], case.D**-0.5, case.dropout_p, case.prefix_dropout_p, seed_tensor(), 5)
    with poisoned_memory():
        out, lse = module.disentangled_attention_fwd(q, k, v, *tables, *plain)
        grads = module.disentangled_attention_bwd(given["dout"], q, k, v, *tables, out, lse, *plain, need_tokens, need_prefix)
    return out, lse, *grads


def check(case: Case, package: str = KERNELS) -> None:
    given = inputs(case)
    out, lse, *grads = run(case, given, package)
    truth, stock = (exact(case, given, precision) for precision in (torch.float64, case.dtype))
    assert torch.isfinite(lse).all()
    found = [out, grads[0], *([g.to(case.dtype) for g in grads[1:]] if case.P else [])]
    for name, mine, right, low in zip(("out", "dqkv", "dprefix_k", "dprefix_v"), found, truth, stock, strict=False):
        assert_error_within(f"{name} {case}", mine, right, low, TIMES, 2.0 if case.dtype == fp32 else 4.0)
    only_prefix, only_tokens = run(case, given, package, need_tokens=False), run(case, given, package, need_prefix=False)
    assert only_prefix[2].numel() == 0 and only_tokens[3].numel() == 0
    assert_same("dqkv when the prefix gradient is not asked for", only_tokens[2], grads[0])
    if case.P:
        assert_same("dprefix when dqkv is not asked for", only_prefix[3].to(case.dtype), grads[1].to(case.dtype))


@settings(max_examples=8)
@given(st.lists(st.sampled_from([0, 1, 5, 17, 40, 70]), min_size=1, max_size=3).map(tuple), st.sampled_from([0, 1, 5, 36]),
       st.sampled_from([16, 32, 64, 80]), st.sampled_from([0, 24]))
def test_shapes(lengths, P, D, buckets):
    check(Case(lengths, P, D=D, buckets=buckets, spare_rows=2))


@pytest.mark.parametrize("terms", ["c2p", "p2c", ""])
def test_tables_that_are_left_out(terms):
    check(Case((40, 17), terms=terms))


@pytest.mark.parametrize("case", [
    Case((40, 5), N=2, dtype=fp32), Case((17,), 0, dtype=fp32), Case((33, 1), 20, D=64, dtype=fp32)])
def test_fp32(case):
    check(case)


@pytest.mark.parametrize("dtype", [fp16, fp32])
def test_dropout_and_mixed_prompts(dtype):
    check(Case((40, 5, 17), 9, N=2, K=3, prompt_ids=(2, 0, 2), prompt_lengths=(4, 7, 9), dropout_p=0.2, prefix_dropout_p=0.3,
               dtype=dtype))


def test_two_runs_give_the_same_bits():
    case = Case((40, 17), dropout_p=0.2, prefix_dropout_p=0.2)
    given = inputs(case)
    for one, other in zip(run(case, given), run(case, given), strict=True):
        assert torch.equal(one, other)


def test_a_table_without_gaps_is_not_read_past_its_end():
    """Distances of a tile's padding lie beyond the slots: they must take a row that exists."""
    check(replace(Case((33,), span=40), buckets=0))


def test_tiles_fit_any_shape():
    for shape in ((1, 0, 16, 2), (16, 5, 64, 2), (512, 200, 128, 2), (128, 20, 64, 4)):
        plan = choose_relative(*shape)
        assert plan.forward.block_m >= 16 and plan.forward.block_n >= 16 and plan.forward.why
        assert (plan.forward.block_p == 0) == (shape[1] == 0)
