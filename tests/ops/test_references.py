"""The plain-PyTorch references: finite differences in fp64, and agreement with stock PyTorch where it has the op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ptv2_engine import ops
from ptv2_engine.ops.disentangled_attention import slots_of
from ptv2_engine.ops.prefix_attention import visible
from ptv2_engine.testing import cu_seqlens_of, random_prefix, random_qkv

DROPOUT = {"dropout_p": 0.2, "seed": 5, "site": 3}


@pytest.fixture(autouse=True)
def on_the_reference():
    with ops.use_backend("reference"):
        yield


@pytest.mark.parametrize("prompt_length", [0, 1, 5])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_prefix_attention_gradcheck(prompt_length, dropout):
    lengths = [3, 0, 1, 4]
    qkv = random_qkv(lengths, 2, 8, torch.float64).requires_grad_()
    pk, pv = (p.requires_grad_() for p in random_prefix(2, prompt_length, 2, 8, torch.float64))
    prompts = {"prompt_ids": torch.tensor([0, 1, 1, 0]), "prompt_lengths": torch.tensor([prompt_length, prompt_length // 2])}

    def run(qkv, pk, pv):
        return ops.prefix_attention_qkv(qkv, pk, pv, cu_seqlens_of(lengths), 4, **prompts, dropout_p=dropout,
                                        prefix_dropout_p=dropout, seed=5, site=3)

    assert torch.autograd.gradcheck(run, (qkv, pk, pv), fast_mode=True)


@pytest.mark.parametrize("kind", [{"causal_from": torch.tensor([1, 0, 1, 2])}, {"window": 1}])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_prefix_attention_gradcheck_when_queries_do_not_see_every_token(dropout, kind):
    lengths = [3, 0, 1, 4]
    qkv = random_qkv(lengths, 2, 8, torch.float64).requires_grad_()
    pk, pv = (p.requires_grad_() for p in random_prefix(1, 3, 2, 8, torch.float64))
    cu = cu_seqlens_of(lengths)
    context, ranges = ops.key_ranges(cu, 8, **kind)

    def run(qkv, pk, pv):
        return ops.prefix_attention_qkv(qkv, pk, pv, cu, 4, context_B=context, key_range_T2=ranges, dropout_p=dropout,
                                        prefix_dropout_p=dropout, seed=5, site=3)

    assert torch.autograd.gradcheck(run, (qkv, pk, pv), fast_mode=True)


def test_key_ranges_are_the_masks_they_stand_for():
    cu = cu_seqlens_of([5, 0, 3])
    i, j = torch.arange(5)[:, None], torch.arange(5)[None]
    context, ranges = ops.key_ranges(cu, 8, causal_from=torch.tensor([2, 0, 3]))
    assert torch.equal(visible(2, ranges[:5]), (j < 2) | (j <= i))
    assert visible(3, ranges[5:]).all() and context.tolist() == [2, 0, 3]
    first = torch.tensor([0, 0, 2, 2, 4, 0, 0, 0])
    _, ranges = ops.key_ranges(cu, 8, causal_from=torch.tensor([2, 0, 3]), first_key_T=first)
    expected = (j < 2) | (j <= i) & (j >= first[:5, None])
    assert torch.equal(visible(2, ranges[:5]), expected)
    context, ranges = ops.key_ranges(cu, 8, window=1)
    assert torch.equal(visible(0, ranges[:5]), (i - j).abs() <= 1) and not context.any()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("terms", ["c2p p2c", "c2p", "p2c"])
def test_disentangled_attention_gradcheck(terms, dropout):
    lengths = [3, 0, 1, 6]
    qkv = random_qkv(lengths, 2, 8, torch.float64).requires_grad_()
    pk, pv = (p.requires_grad_() for p in random_prefix(2, 3, 2, 8, torch.float64))
    tables = [torch.randn(8, 2, 8, dtype=torch.float64) if term in terms else None for term in ("c2p", "p2c")]
    slots = slots_of(8, 4, 0, 0, torch.device("cpu"))

    def run(qkv, pk, pv):
        return ops.disentangled_attention(qkv, pk, pv, *tables, slots, cu_seqlens_of(lengths), 6, dropout_p=dropout,
                                          prompt_ids=torch.tensor([0, 1, 1, 0]), prefix_dropout_p=dropout, seed=5, site=3)

    assert torch.autograd.gradcheck(run, (qkv, pk, pv), fast_mode=True)


def test_disentangled_attention_without_tables_is_prefix_attention():
    qkv, (pk, pv) = random_qkv([4, 3], 2, 8, torch.float64), random_prefix(1, 3, 2, 8, torch.float64)
    slots = slots_of(4, 4, 0, 0, torch.device("cpu"))
    out = ops.disentangled_attention(qkv, pk, pv, None, None, slots, cu_seqlens_of([4, 3]), 4)
    torch.testing.assert_close(out, ops.prefix_attention_qkv(qkv, pk, pv, cu_seqlens_of([4, 3]), 4), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("length", "span", "buckets", "distance"), [
    (600, 256, 256, 512), (40, 8, 8, 32), (2000, 128, 128, 1024)])
def test_log_buckets_are_the_published_ones(length, span, buckets, distance):
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    distances = torch.arange(-(length - 1), length)
    theirs = (make_log_bucket_position(distances, buckets, distance).long() + span).clamp(0, 2 * span - 1)
    assert torch.equal(slots_of(length, span, buckets, distance, torch.device("cpu")).long(), theirs)


def test_prefix_attention_equals_sdpa_on_concatenated_keys():
    lengths = [7, 1, 12]
    qkv, (pk, pv) = random_qkv(lengths, 3, 16, torch.float64), random_prefix(1, 5, 3, 16, torch.float64)
    out = ops.prefix_attention(*qkv.unbind(1), pk, pv, cu_seqlens_of(lengths), 12)
    start = 0
    for length in lengths:
        q, k, v = (x.transpose(0, 1) for x in qkv[start:start + length].unbind(1))
        k, v = (torch.cat((p[0].transpose(0, 1), x), 1) for p, x in ((pk, k), (pv, v)))
        expected = F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1)
        torch.testing.assert_close(out[start:start + length], expected, rtol=1e-12, atol=1e-12)
        start += length


def test_prompts_of_a_bank_do_not_mix():
    lengths = [6, 6]
    qkv, (pk, pv) = random_qkv([6], 2, 8, torch.float64).repeat(2, 1, 1, 1), random_prefix(2, 4, 2, 8, torch.float64)
    both = ops.prefix_attention_qkv(qkv, pk, pv, cu_seqlens_of(lengths), 6, prompt_ids=torch.tensor([0, 1]),
                                    prompt_lengths=torch.tensor([4, 2]))
    for i, rows in enumerate((4, 2)):
        alone = ops.prefix_attention_qkv(qkv[:6], pk[i:i + 1, :rows], pv[i:i + 1, :rows], cu_seqlens_of([6]), 6)
        torch.testing.assert_close(both[6 * i:6 * i + 6], alone, rtol=1e-12, atol=1e-12)


def test_prefix_dropout_is_drawn_per_sequence():
    qkv, (pk, pv) = random_qkv([4], 2, 8, torch.float64).repeat(2, 1, 1, 1), random_prefix(1, 6, 2, 8, torch.float64)
    out = ops.prefix_attention_qkv(qkv, pk, pv, cu_seqlens_of([4, 4]), 4, prefix_dropout_p=0.5, seed=1)
    assert not torch.allclose(out[:4], out[4:])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_add_norm_gradcheck(dropout):
    x, residual = (torch.randn(5, 12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = torch.rand(12, dtype=torch.float64) + 0.5, torch.randn(12, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, r: ops.add_norm(x, r, weight, bias, 1e-5, dropout_p=dropout, seed=2, site=1),
                                    (x, residual))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_add_norm_sum_gradcheck(dropout):
    x, residual = (torch.randn(5, 12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = torch.rand(12, dtype=torch.float64) + 0.5, torch.randn(12, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, r: ops.add_norm_sum(x, r, weight, bias, 1e-5, dropout_p=dropout, seed=2, site=1),
                                    (x, residual))


def test_rotary_turns_pairs_by_their_angle():
    table, positions = ops.cos_sin_table(40, 8, 100.0), torch.tensor([0, 3, 39, 7])
    qkv = torch.randn(4, 3 * 2 * 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.rotary(x, 2, table, positions), (qkv,))
    out, given = ops.rotary(qkv, 2, table, positions), qkv.view(4, 3, 2, 8)
    angles = positions[:, None] * 100.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    turn = torch.polar(torch.ones(4, 4, dtype=torch.float64), angles)[:, None, None]
    y = torch.complex(given[:, :2, :, :4], given[:, :2, :, 4:]) * turn
    torch.testing.assert_close(out[:, :2], torch.cat((y.real, y.imag), -1), rtol=1e-6, atol=1e-6)
    assert torch.equal(out[:, 2], given[:, 2])


def test_linear_geglu_gradcheck():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(10, 6, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.linear_geglu(x, weight, bias), (x,))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_linear_gelu_gradcheck(approximate):
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.linear_gelu(x, weight, bias, approximate=approximate), (x,))
    assert torch.autograd.gradcheck(lambda x: ops.frozen_linear(x, weight, bias), (x,))


def test_dropout_keeps_the_mean_and_its_gradient_has_its_mask():
    x = torch.randn(50, 41, dtype=torch.float64).abs().requires_grad_()
    y = ops.dropout(x, 0.25, seed=3, site=9)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    assert abs(kept.double().mean() - 0.75) < 4 * (0.25 * 0.75 / x.numel()) ** 0.5
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], kept.double() / 0.75)
    assert not torch.equal(ops.dropout(x, 0.25, seed=3, site=10) != 0, kept) and ops.dropout(x, 0.0) is x
    narrow = x.detach().float().requires_grad_()              # through a kernel where there is one: the same mask both ways
    out = ops.dropout(narrow, 0.25, seed=3, site=9)
    assert torch.equal(out != 0, kept) and torch.equal(torch.autograd.grad(out.sum(), narrow)[0] != 0, kept)


def test_embedding_equals_its_definition():
    torch.manual_seed(0)
    word, position, types = (torch.randn(n, 8, dtype=torch.float64) for n in (20, 10, 2))
    weight, bias = torch.rand(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    ids, positions = torch.tensor([3, 19, 0]), torch.tensor([0, 9, 4])
    for token_types, rows in ((None, [0, 0, 0]), (torch.tensor([1, 0, 1]), [1, 0, 1])):
        x = torch.stack([word[i] + position[p] + types[t] for i, p, t in zip(ids, positions, rows, strict=True)])
        expected = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-12).sqrt() * weight + bias
        torch.testing.assert_close(
            ops.embedding(ids, positions, token_types, word, position, types, weight, bias, 1e-12), expected
        )
