"""All backends of an op agree: one hypothesis-driven check for the public functions, and torch's own opcheck of the schemas."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptv2_engine import ops
from ptv2_engine.ops.disentangled_attention import slots_of
from ptv2_engine.testing import assert_error_within, cu_seqlens_of, random_prefix, random_qkv

LENGTHS = st.lists(st.sampled_from([0, 1, 5, 17, 64, 127]), min_size=1, max_size=4)


def run_attention(backend, dtype, lengths, prompts, P, D, dropout):
    qkv = random_qkv(lengths, 2, D).to(torch.float32).to(dtype).requires_grad_()
    pk, pv = (p.to(dtype).requires_grad_() for p in random_prefix(prompts, P, 2, D))
    ids = torch.arange(len(lengths)) % prompts
    rows = torch.tensor([max(P - 3 * k, min(P, 1)) for k in range(prompts)])
    with ops.use_backend(backend):
        out = ops.prefix_attention_qkv(qkv, pk, pv, cu_seqlens_of(lengths), max(lengths), prompt_ids=ids, prompt_lengths=rows,
                                       dropout_p=dropout, prefix_dropout_p=dropout, seed=77, site=5)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
        grads = torch.autograd.grad((out * weights).sum(), (qkv, pk, pv), materialize_grads=True) if out.numel() else ()
    return dict(zip(("out", "dqkv", "dprefix_k", "dprefix_v"), (out.detach(), *grads), strict=False))


@settings(max_examples=30)
@given(LENGTHS, st.integers(1, 3), st.sampled_from([0, 1, 5, 16, 100, 200]), st.sampled_from([32, 64, 80, 128]),
       st.sampled_from([0.0, 0.25]))
def test_native_attention_agrees_with_the_reference(lengths, prompts, P, D, dropout):
    if not sum(lengths):
        return
    case = (lengths, prompts, P, D, dropout)
    exact = run_attention("reference", torch.float64, *case)
    stock = run_attention("reference", torch.float32, *case)
    native = run_attention("native", torch.float32, *case)
    again = run_attention("native", torch.float32, *case)
    for name, value in native.items():
        assert_error_within(name, value, exact[name], stock[name], roundings=8)
        assert torch.equal(value, again[name]), f"{name} differs between two runs"


@pytest.mark.parametrize("P", [0, 5, 20])
def test_native_bf16_attention_is_within_twice_stock_bf16(P):
    case = ([33, 1, 64, 17], 2, P, 64, 0.1)
    exact = {n: t for n, t in run_attention("reference", torch.float64, *case).items()}
    stock, native = (run_attention(b, torch.bfloat16, *case) for b in ("reference", "native"))
    qkv = random_qkv(case[0], 2, 64).bfloat16()
    assert not torch.equal(qkv.double(), random_qkv(case[0], 2, 64).double())      # rounding matters, so round first:
    rounded = run_rounded(case)
    for name in native:
        assert_error_within(name, native[name], rounded[name], stock[name])
    assert set(exact) == set(native)


def run_rounded(case):
    """The fp64 truth of inputs that were rounded to bf16 first."""
    lengths, prompts, P, D, dropout = case
    qkv = random_qkv(lengths, 2, D).bfloat16().double().requires_grad_()
    pk, pv = (p.bfloat16().double().requires_grad_() for p in random_prefix(prompts, P, 2, D))
    rows = torch.tensor([max(P - 3 * k, min(P, 1)) for k in range(prompts)])
    with ops.use_backend("reference"):
        out = ops.prefix_attention_qkv(
            qkv,
            pk,
            pv,
            cu_seqlens_of(lengths),
            max(lengths),
            prompt_ids=torch.arange(len(lengths)) % prompts,
            prompt_lengths=rows,
            dropout_p=dropout,
            prefix_dropout_p=dropout,
            seed=77,
            site=5,
        )
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).bfloat16().double()
        grads = torch.autograd.grad((out * weights).sum(), (qkv, pk, pv), materialize_grads=True)
    return dict(zip(("out", "dqkv", "dprefix_k", "dprefix_v"), (out.detach(), *grads), strict=True))


def test_separate_q_k_v_equal_the_fused_buffer():
    lengths, (pk, pv) = [5, 12], random_prefix(1, 4, 2, 16)
    fused = random_qkv(lengths, 2, 16).requires_grad_()
    apart = [x.detach().clone().requires_grad_() for x in fused.unbind(1)]
    a = ops.prefix_attention_qkv(fused, pk, pv, cu_seqlens_of(lengths), 12)
    b = ops.prefix_attention(*apart, pk, pv, cu_seqlens_of(lengths), 12)
    a.square().sum().backward()
    b.square().sum().backward()
    assert torch.equal(a, b) and torch.equal(fused.grad, torch.stack([x.grad for x in apart], 1))


def test_only_what_is_asked_for_is_computed():
    lengths, (pk, pv) = [5, 12], random_prefix(1, 4, 2, 16)
    qkv = random_qkv(lengths, 2, 16)
    both = [t.clone().requires_grad_() for t in (qkv, pk, pv)]
    ops.prefix_attention_qkv(*both, cu_seqlens_of(lengths), 12).square().sum().backward()
    prefix_only = [qkv, *(t.clone().requires_grad_() for t in (pk, pv))]
    ops.prefix_attention_qkv(*prefix_only, cu_seqlens_of(lengths), 12).square().sum().backward()
    assert torch.equal(both[1].grad, prefix_only[1].grad) and torch.equal(both[2].grad, prefix_only[2].grad)


def test_linear_gelu_saves_one_byte_an_element_in_bf16_and_is_exact_in_fp32():
    linear = ops.FrozenLinear(torch.randn(96, 32), torch.randn(96))
    for dtype, size in ((torch.bfloat16, 1), (torch.float32, 4)):
        saved = []
        x = torch.randn(10, 32).to(dtype).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            out = ops.linear_gelu(x, linear.to(dtype))
        assert [(t.shape, t.element_size()) for t in saved] == [((10, 96), size)]
        out.sum().backward()
        exact_x = x.detach().double().requires_grad_()
        with ops.use_backend("reference"):
            exact = ops.linear_gelu(exact_x, linear.weight.double(), linear.bias.double())
            stock_x = x.detach().clone().requires_grad_()
            ops.linear_gelu(stock_x, linear.weight, linear.bias).sum().backward()
        exact.sum().backward()
        assert_error_within(f"dx {dtype}", x.grad, exact_x.grad, stock_x.grad)


def test_frozen_linear_packs_again_when_its_weight_changes():
    linear = ops.FrozenLinear(torch.randn(24, 16))
    x = torch.randn(5, 16)
    before = linear(x)
    assert linear.packed_bytes() == linear.weight.numel() * 4
    linear.load_state_dict({"weight": torch.ones(24, 16)})
    torch.testing.assert_close(linear(x), x @ torch.ones(24, 16).T)
    assert not torch.allclose(before, linear(x))
    import copy
    torch.testing.assert_close(copy.deepcopy(linear)(x), linear(x))


def test_opcheck_of_every_schema():
    """Schema, fake and real outputs agree, on permuted and ragged inputs."""
    N, D, lengths = 2, 16, [3, 0, 5]
    qkv, (pk, pv) = random_qkv(lengths, N, D), random_prefix(2, 4, N, D)
    seed, cu = torch.tensor([3]), cu_seqlens_of(lengths)
    plain = (cu, 5, torch.tensor([0, 1, 0]), torch.tensor([4, 2]), 0.25, 0.1, 0.1, seed, 1)
    ranges = ops.key_ranges(cu, 8, window=1)
    out, lse = torch.ops.ptv2.prefix_attention_fwd(*qkv.unbind(1), pk, pv, *plain, None, None)
    x, weight = torch.randn(6, 32), torch.rand(32)
    _, xhat, rstd, _, _ = torch.ops.ptv2.add_norm_fwd(x, x, weight, weight, 1e-5, 0.1, seed, 0, "full", False)
    _, codes, _, scales, _ = torch.ops.ptv2.add_norm_fwd(x, x, weight, weight, 1e-5, 0.1, seed, 0, "int8", False)
    tables = (torch.randn(8, N, D), None, slots_of(5, 4, 0, 0, torch.device("cpu")))
    z = torch.randn(6, 16)
    checks = [
        *((torch.ops.ptv2.prefix_attention_fwd, (*qkv.unbind(1), pk, pv, *plain, *seen)) for seen in ((None, None), ranges)),
        *((torch.ops.ptv2.prefix_attention_bwd,
           (torch.randn_like(out), *qkv.unbind(1), pk, pv, None, lse, *plain, *seen, tokens, True))
          for tokens, seen in ((True, (None, None)), (False, (None, None)), (True, ranges))),
        (torch.ops.ptv2.disentangled_attention_fwd, (*qkv.unbind(1), pk, pv, *tables, *plain)),
        *((torch.ops.ptv2.disentangled_attention_bwd,
           (torch.randn_like(out), *qkv.unbind(1), pk, pv, *tables, None, lse, *plain, tokens, True))
          for tokens in (True, False)),
        (torch.ops.ptv2.rotary_, (qkv.clone(), torch.randn(9, D), torch.arange(8), False)),
        (torch.ops.ptv2.dropout, (x, 0.3, seed, 4)),
        (torch.ops.ptv2.geglu_fwd, (z,)),
        (torch.ops.ptv2.geglu_bwd, (torch.randn(6, 8), z)),
        *((torch.ops.ptv2.add_norm_fwd, (x, x, weight, weight, 1e-5, 0.1, seed, 0, keep, total)) for total in (False, True)
          for keep in ("none", "full", "int8")),
        (torch.ops.ptv2.add_norm_bwd, (x, None, xhat, None, rstd, weight, 0.1, seed, 0)),
        (torch.ops.ptv2.add_norm_bwd, (x, x, codes, scales, rstd, weight, 0.0, None, 0)),
        (torch.ops.ptv2.renorm, (xhat, None, weight, weight, torch.float32)),
        (torch.ops.ptv2.renorm, (codes, scales, weight, weight, torch.bfloat16)),
        *((torch.ops.ptv2.gelu_, (x.clone(), "none", save, bits)) for save in (False, True) for bits in (8, 6)),
        (torch.ops.ptv2.gelu_bwd, (x, x, 8)),
        (torch.ops.ptv2.gelu_bwd, (x, torch.zeros(x.shape[0], 3, x.shape[1] // 4, dtype=torch.uint8), 6)),
        (torch.ops.ptv2.embedding, (torch.tensor([1, 2]), torch.tensor([0, 1]), None, torch.randn(4, 32), torch.randn(3, 32),
                                    torch.randn(2, 32), weight, weight, 1e-5, 0.0, None, 0)),
    ]
    for op, args in checks:
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_an_interpreted_kernel_never_runs_unasked(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.backend_for("add_norm", "cpu", torch.float16).backend == "reference"
