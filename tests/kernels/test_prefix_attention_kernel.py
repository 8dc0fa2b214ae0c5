"""Prefix attention's kernels against the fp64 reference: output, log-sum-exp, all gradients, both backward forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_checks import Attention, attention_inputs, check_attention, kernel, mixed_prompts, run_attention

fp16, fp32 = torch.float16, torch.float32

# Lengths 0 and 1 (no and a lone token), 17 (just over a 16-row tile), 64 (a whole tile), 127 (prime); prompts of none, one,
# a part of a block, a block, several blocks. D = 16 and 96 are left out: the tiles are those of 32 and 80.
lengths = st.lists(st.sampled_from([0, 1, 5, 17, 64, 127]), min_size=1, max_size=3).map(tuple)
shapes = st.fixed_dictionaries({"lengths": lengths, "P": st.sampled_from([0, 1, 5, 16, 100, 200]),
                                "D": st.sampled_from([32, 64, 80, 128]), "spare_rows": st.sampled_from([0, 3]),
                                "keep_out": st.booleans(), "N": st.just(1)})


@settings(max_examples=12)
@given(shapes)
@example({"lengths": (127, 0, 17), "P": 5, "D": 64})
@example({"lengths": (0, 0), "P": 5, "D": 32})
@example({"lengths": (0,), "P": 5, "D": 32, "spare_rows": 3})
def test_shapes(shape):
    check_attention(Attention(**shape, dtype=fp16))


@settings(max_examples=6)
@given(lengths, st.sampled_from([1, 5, 16, 36]), st.booleans())
def test_dropout_and_mixed_prompts(lengths, prompt_length, keep_out):
    check_attention(mixed_prompts(Attention(lengths, prompt_length, N=2 if max(lengths) < 64 else 1, dtype=fp16, dropout_p=0.2,
                                            prefix_dropout_p=0.3, keep_out=keep_out)))


@pytest.mark.parametrize("case", [
    Attention((17, 1), 5, D=64, N=2), Attention((5, 70), 20, N=1, spare_rows=1, dropout_p=0.2), Attention((33,), 5, D=80, N=1),
    Attention((17, 5), 9, N=2, dropout_p=0.2, prefix_dropout_p=0.3), Attention((17,), 0, N=1, dropout_p=0.5)])
def test_fp32(case):
    check_attention(case)


@pytest.mark.parametrize("keep_out", [False, True])
@pytest.mark.parametrize("seen", ["causal", "candidates", "window"])
@pytest.mark.parametrize("lengths, P", [((127, 0, 17, 1), 5), ((200,), 0), ((70, 33), 20)])
def test_queries_that_do_not_see_every_token(lengths, P, seen, keep_out):
    check_attention(Attention(lengths, P, N=1, dtype=fp16, seen=seen, keep_out=keep_out, spare_rows=3))


@pytest.mark.parametrize("seen", ["causal", "window"])
def test_ranges_with_dropout_and_mixed_prompts(seen):
    check_attention(mixed_prompts(Attention((40, 5), 9, N=2, dropout_p=0.2, prefix_dropout_p=0.3, seen=seen)))


def test_key_blocks_that_no_query_of_a_tile_sees_are_not_read():
    """NaN keys and values outside every window of the first tile must not reach it: they lie in blocks that are skipped."""
    case = Attention((400,), 5, N=1, dtype=fp16, seen="window")
    given = attention_inputs(case)
    clean = run_attention(case, given)
    given["qkv"][200:, 1:] = float("nan")
    out = run_attention(case, given)[0]
    assert torch.equal(out[:128], clean[0][:128])


def test_several_prompts_without_ids_means_prompt_0():
    case = Attention((17, 5), 5, K=3, N=1, dtype=fp16)
    for keep_out in (False, True):
        check_attention(replace(case, keep_out=keep_out))


def test_the_three_slices_of_one_buffer_are_read_in_place_and_so_are_separate_tensors():
    case = Attention((17, 5), 5, N=2)
    given = attention_inputs(case)
    apart = given | {"qkv": _Apart(given["qkv"])}
    for one, other in zip(run_attention(case, given), run_attention(case, apart), strict=True):
        assert torch.equal(one, other)


class _Apart:
    """Stands for qkv but hands out q, k, v as tensors with strides of their own."""

    def __init__(self, qkv):
        self.parts = [part.contiguous() for part in qkv.unbind(1)]
        self.parts[1] = torch.cat((self.parts[1], self.parts[1]), 1)[:, : self.parts[1].shape[1]]

    def unbind(self, dim):
        return self.parts


def test_a_prefix_with_strides_of_its_own():
    """The prompt bank hands out views of [layers, 2, K, P, N, D]."""
    case = Attention((17, 5), 5, N=2, K=2, prompt_ids=(1, 0))
    given = attention_inputs(case)
    bank = torch.full((2, 2, 7, 2, 32), float("nan"))
    views = []
    for i, p in enumerate(given["prefix"]):
        bank[:, i, :5] = p
        views.append(bank[:, i, :5])
    for one, other in zip(run_attention(case, given), run_attention(case, given | {"prefix": tuple(views)}), strict=True):
        assert torch.equal(one, other)


def test_nothing_asked_for_gives_nothing():
    case = Attention((5,), 5, N=1)
    grads = run_attention(case, attention_inputs(case), need_tokens=False, need_prefix=False)[2:]
    assert [g.numel() for g in grads] == [0, 0, 0]


def test_the_number_of_pieces_changes_the_prefix_gradient_only_by_rounding(monkeypatch):
    """Pieces: sequences first, then query tiles dealt out round robin; every query must be counted once."""
    case = Attention((40, 5), 33, N=1, dtype=fp16, prefix_dropout_p=0.2)
    grad = kernel("prefix_grad")
    for pieces in ((1, 1), (2, 2)):
        monkeypatch.setattr(grad, "choose_splits", lambda *_, pieces=pieces: pieces)
        check_attention(case)
