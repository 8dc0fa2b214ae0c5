"""Prefix attention's kernels against the fp64 reference: output, log-sum-exp, all gradients, both backward forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import cases, examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, Attention, attention_inputs, check_attention, kernel, mixed_prompts, run_attention

from ptv2_engine.testing import cu_seqlens_of, poisoned_memory

fp16, fp32 = torch.float16, torch.float32


@settings(max_examples=examples(8))
@given(cases(), st.sampled_from([False, False, True]))
@example(Attention((127, 0, 17), 5, D=64, N=1, dtype=fp16), True)
@example(Attention((0, 0), 5, dtype=fp16), True)
@example(Attention((0,), 5, dtype=fp16, spare_rows=3), True)
@example(Attention((64, 17), 200, N=1, dtype=fp16, keep_out=True), False)
@example(Attention((1,), 1, N=1, prefix_dropout_p=0.2), False)     # these two, in fp32, were found by a night
@example(Attention((17,), 0, D=80), False)
def test_any_shape(case, partly):
    check_attention(case, partly=partly)


@pytest.mark.parametrize("keep_out", [False, True])
def test_dropout_and_mixed_prompts(keep_out):
    check_attention(mixed_prompts(Attention((40, 0, 5), 20, N=1, dtype=fp16, dropout_p=0.2, prefix_dropout_p=0.3,
                                            keep_out=keep_out)), partly=not keep_out)


ragged = (5, 0, 17, 1, 30, 9, 12, 3, 0)        # no multiple of a tile; empty sequences inside and at the end
two_groups = (60, 0, 5, 5, 4, *(1,) * 10, 40, 20, 4, 1)                 # what starts in 64 tokens does not fit 64 keys


@pytest.mark.parametrize("case", [
    Attention(ragged, 5, N=2, dtype=fp16, spare_rows=3), Attention(ragged, 20, N=2, dtype=fp16, dropout_p=0.2),
    Attention(two_groups, 20, D=64, N=1, dtype=fp16, dropout_p=0.2, spare_rows=100), Attention(ragged, 33, N=1, dtype=fp16),
    Attention((1,) * 70, 0, N=1, dtype=fp16, dropout_p=0.5), Attention(ragged, 5, N=1, D=80, dropout_p=0.2),
    Attention(ragged, 5, N=1, dtype=fp16, K=3, prompt_lengths=(3, 5, 5)), Attention((0, 0, 7), 5, N=1, dtype=fp16)])
def test_several_short_sequences_a_program(case):
    check_attention(replace(case, packed=True))


@pytest.mark.parametrize("case", [
    Attention((5, 0, 130, 1), 5, N=2, dtype=fp16, spare_rows=3), Attention((5, 70), 33, N=1, dtype=fp16, spare_rows=200),
    Attention((33, 0, 70), 5, N=1, dtype=fp16, seen="window", keep_out=True), Attention((0,), 5, N=2, dtype=fp16, spare_rows=70)])
def test_tiles_in_a_list(case):
    check_attention(replace(case, listed=True), partly=False)


@pytest.mark.parametrize("lengths, tile, spare", [((5, 130, 0, 64, 65, 130, 1), 64, 9), ((1,) * 150, 16, 0), ((), 16, 5),
                                                  ((0, 0), 32, 0)])
def test_the_list_holds_every_tile_once_the_longest_sequences_first(lengths, tile, spare, monkeypatch):
    monkeypatch.setattr(kernel("tuning"), "IDLE_PROGRAMS", -10**9)
    run = {"B": len(lengths), "T": sum(lengths) + spare, "N": 1}
    cu_seqlens = cu_seqlens_of(list(lengths), DEVICE)
    with poisoned_memory():
        found = kernel("tile_list").tile_list(cu_seqlens, run, max(lengths, default=0), tile).tolist()
    order = sorted(range(len(lengths)), key=lambda b: (-lengths[b], b))
    wanted = [[b, t] for b in order for t in range(-(-lengths[b] // tile))]
    assert found[:len(wanted)] == wanted
    assert found[len(wanted):] == [[len(lengths), i] for i in range(len(found) - len(wanted))] != []


def test_windows_of_several_groups(monkeypatch):
    """Enough work makes windows of 128 tokens: the sequences of one go through the key block in turns."""
    monkeypatch.setattr(kernel("tuning"), "PROGRAMS", 0)
    check_attention(Attention(two_groups + ragged, 5, N=1, dtype=fp16, packed=True, dropout_p=0.2))


def test_sequences_that_share_a_tile_draw_the_masks_they_draw_alone():
    case = Attention(ragged, 5, N=2, dtype=fp16, dropout_p=0.5)
    given, ones = attention_inputs(case), {}
    given["qkv"][:, 2] = given["prefix"][1][:] = 1      # then the output counts the kept probabilities
    for packed in (False, True):
        ones[packed] = run_attention(replace(case, packed=packed), given)[0]
    torch.testing.assert_close(ones[True], ones[False], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("case", [
    Attention((17, 1), 5, D=64, N=2), Attention((5, 70), 20, N=1, spare_rows=1, dropout_p=0.2), Attention((33,), 5, D=80, N=1),
    Attention((17, 5), 9, N=2, dropout_p=0.2, prefix_dropout_p=0.3), Attention((17,), 0, N=1, dropout_p=0.5)])
def test_fp32(case):
    check_attention(case)


@pytest.mark.parametrize("seen", ["causal", "candidates", "window"])
@pytest.mark.parametrize("lengths, P, keep_out", [((127, 0, 17, 1), 5, False), ((200,), 0, True), ((70, 33), 20, False)])
def test_queries_that_do_not_see_every_token(lengths, P, seen, keep_out):
    check_attention(Attention(lengths, P, N=1, dtype=fp16, seen=seen, keep_out=keep_out, spare_rows=3))


@pytest.mark.parametrize("seen, dtype", [("causal", fp32), ("window", fp16)])
def test_ranges_with_dropout_and_mixed_prompts(seen, dtype):
    check_attention(mixed_prompts(Attention((40, 5), 9, N=1, dtype=dtype, dropout_p=0.2, prefix_dropout_p=0.3, seen=seen)),
                    partly=False)


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
