"""disentangled_attention on the CPU against its reference in fp64, as test_native.py does it for prefix_attention.

Lengths around the bands of the kernel (16 or 24 rows) and around vectors: 0, 1, 17, 24, 25, 64, 127, 300. Slots are clamped
distances (v1) and log buckets (v2, v3), from tables shorter and longer than the sequences.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from ptv2_engine.ops import _philox
from ptv2_engine.ops.disentangled_attention import slots_of
from ptv2_engine.testing import assert_error_within

sys.path.insert(0, str(Path(__file__).parent))
import native_checks
from native_checks import DTYPES, SEED, Case, check_attention, make_case, run_native

RAGGED = [0, 1, 17, 64, 127]
SLOTS = {"clamped": (20, 0, 0), "all distances": (512, 0, 0), "log buckets": (32, 32, 300)}  # span, buckets, largest distance


@pytest.fixture(autouse=True)
def _native_with_poisoned_memory():  # type: ignore[no-untyped-def]
    with native_checks.native_with_poisoned_memory():
        yield


def disentangled_case(lengths: list[int], prompt_length: int, head_dim: int, dtype: torch.dtype, dropout: float = 0.0,
                      slots: str = "clamped", terms: str = "c2p p2c", spare: int = 3, **options: int) -> Case:
    case = make_case(lengths, prompt_length, head_dim, dtype, dropout, **options)
    span, buckets, largest = SLOTS[slots]
    generator = torch.Generator().manual_seed(2)
    shape = (2, 2 * span, *case.qkv.shape[2:])
    rel_k, rel_q = torch.randn(shape, generator=generator).to(dtype)
    case.tables = (rel_k if "c2p" in terms else None, rel_q if "p2c" in terms else None,
                   slots_of(max(*lengths, 1) + spare, span, buckets, largest, torch.device("cpu")))
    return case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("head_dim", [24, 64, 80])
@pytest.mark.parametrize(("lengths", "prompt_length"), [(RAGGED, 0), (RAGGED, 5), (RAGGED, 20), ([300, 24, 25], 20), ([0, 1], 1)])
def test_attention(lengths: list[int], prompt_length: int, head_dim: int, slots: str, dtype: torch.dtype) -> None:
    case = disentangled_case(lengths, prompt_length, head_dim, dtype, slots=slots)
    check_attention(case, run_native(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", ["c2p p2c", "c2p", "p2c", "neither"])
@pytest.mark.parametrize("prompt_length", [0, 5, 20])
def test_terms_with_dropout_and_several_prompts(prompt_length: int, terms: str, dtype: torch.dtype) -> None:
    case = disentangled_case([17, 1, 0, 64, 127, 33, 20], prompt_length, 32, dtype, 0.2, "log buckets", terms, num_prompts=4)
    actual = run_native(case)
    check_attention(case, actual)
    if prompt_length:
        assert not actual["dprefix_k"][1].any(), "prompt 1 has length 0"
        assert not actual["dprefix_k"][2, max(prompt_length - 3, 0):].any(), "rows past a prompt's length get no gradient"


@hypothesis.given(lengths=st.lists(st.integers(0, 130), min_size=2, max_size=6),
                  prompt_length=st.sampled_from([0, 1, 5, 16, 100]), head_dim=st.sampled_from([8, 32, 64]),
                  dropout=st.sampled_from([0.0, 0.1]), slots=st.sampled_from(list(SLOTS)),
                  terms=st.sampled_from(["c2p p2c", "c2p", "p2c"]), spare=st.sampled_from([0, 1, 40]),
                  num_prompts=st.integers(1, 3), dtype=st.sampled_from(DTYPES))
@hypothesis.settings(max_examples=40)
def test_attention_of_any_batch(lengths: list[int], prompt_length: int, head_dim: int, dropout: float, slots: str, terms: str,
                                spare: int, num_prompts: int, dtype: torch.dtype) -> None:
    case = disentangled_case(lengths, prompt_length, head_dim, dtype, dropout, slots, terms, spare, num_prompts=num_prompts)
    check_attention(case, run_native(case))


def test_without_tables_it_is_prefix_attention() -> None:
    case = disentangled_case([17, 64, 0, 127], 20, 32, torch.float32, 0.1, terms="neither")
    actual, case.tables = run_native(case), None
    expected = run_native(case)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_probability_masks_are_the_references_bit_for_bit() -> None:
    """With the identity as values, the output is the masked probabilities themselves."""
    P, S, D = 37, 70, 128
    case = disentangled_case([S], P, D, torch.float32)
    eye = torch.eye(D)[:, None].expand(D, 2, D)
    case.qkv[:, 2], case.dropout_p = eye[P:P + S], 0.3
    case.qkv[:, :2] *= 0.1
    case.prefix = case.prefix[0] * 0.1, eye[None, :P].contiguous()
    out = run_native(case)["out"]
    for heads in range(2):
        for columns, stream, start in ((P, _philox.PREFIX_PROB, 0), (S, _philox.TOKEN_PROB, P)):
            keep = _philox.keep_scale(torch.arange(S), columns, heads, p=0.3, seed=SEED, site=5, stream=stream)
            assert torch.equal(out[:, heads, start:start + columns] != 0, keep != 0)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("terms", ["c2p p2c", "c2p", "p2c"])
def test_only_what_is_needed(terms: str, dropout: float) -> None:
    native_checks.check_only_what_is_needed(
        disentangled_case([20, 65, 3], 20, 64, torch.float32, dropout, terms=terms, num_heads=3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_every_run_and_thread_count(dtype: torch.dtype) -> None:
    native_checks.check_same_bits_on_every_thread_count(
        disentangled_case([64, 5, 17, 127, 0, 30] * 4, 20, 32, dtype, 0.1, num_heads=3, num_prompts=3))


def test_log_sum_exp_and_rows_past_the_last_sequence() -> None:
    case = disentangled_case([10, 20], 4, 32, torch.float32)
    case.qkv = torch.cat((case.qkv, torch.full((3, 3, 2, 32), float("nan"))))
    case.dout = torch.cat((case.dout, torch.full((3, 2, 32), float("nan"))))
    actual = run_native(case)
    for name in ("out", "dqkv"):
        assert not actual[name][30:].any() and torch.isfinite(actual[name]).all(), name
    q, k, _ = case.qkv[:10].double().transpose(0, 1).unbind(0)
    rel_k, rel_q, slots = case.tables
    index = torch.arange(10)
    rows = slots.long()[index[:, None] - index[None, :] + len(slots) // 2]
    scores = (torch.einsum("ind,jnd->nij", q, k) + torch.einsum("ind,ijnd->nij", q, rel_k.double()[rows])
              + torch.einsum("jnd,ijnd->nij", k, rel_q.double()[rows]))
    scores = torch.cat((torch.einsum("ind,pnd->nip", q, case.prefix[0][0].double()), scores), -1)
    assert_error_within("lse", actual["lse"][:, :10], (scores * case.scale).logsumexp(-1), roundings=4.0)
    assert not actual["lse"][:, 30:].any()


def test_no_tokens_at_all() -> None:
    actual = run_native(disentangled_case([0, 0], 5, 32, torch.float32))
    assert actual["out"].shape == (0, 2, 32) and actual["dqkv"].shape == (0, 3, 2, 32)
    assert actual["dprefix_k"].shape == (1, 5, 2, 32) and not actual["dprefix_k"].any() and not actual["dprefix_v"].any()


def test_nan_stays_in_its_sequence() -> None:
    case = disentangled_case([17, 9], 5, 32, torch.float32)
    case.qkv[3, 0, 0, 0] = float("nan")
    out = run_native(case)["out"]
    assert out[3, 0].isnan().all() and torch.isfinite(out[17:]).all() and torch.isfinite(out[:3]).all()


def without_term(case: Case, term: int) -> dict[str, Tensor]:
    tables = list(case.tables or ())
    tables[term] = torch.zeros_like(tables[term])
    kept, case.tables = case.tables, tuple(tables)
    actual, case.tables = run_native(case), kept
    return actual


@pytest.mark.parametrize("mutation", ["no c2p", "no p2c", "distances off by one", "distances turned around",
                                      "no relative part in dq", "no relative part in dk"])
def test_the_check_catches_wrong_results(mutation: str) -> None:
    case = disentangled_case([17, 5, 30], 16, 32, torch.bfloat16, 0.1, terms="c2p p2c")
    actual, slots = run_native(case), case.tables[2]
    if mutation.startswith("no relative"):
        part = mutation.endswith("dk")
        plain = without_term(case, int(part))["dqkv"]
        actual["dqkv"][:, int(part)] = plain[:, int(part)]
    elif mutation.startswith("no"):
        actual = without_term(case, int(mutation == "no p2c"))
    else:
        turned = slots.roll(1) if mutation.endswith("one") else slots.flip(0)
        case.tables = (*case.tables[:2], turned)
        actual = run_native(case)
        case.tables = (*case.tables[:2], slots)
    with pytest.raises(AssertionError, match="error .* > budget"):
        check_attention(case, actual)


def test_words_of_errors() -> None:
    case = disentangled_case([4, 30], 2, 32, torch.float32)
    rel_k, rel_q, slots = case.tables
    for tables, kind, words in (
            ((rel_k, rel_q, slots[5:-5]), RuntimeError, r"slots \[55\] Int must be contiguous int32 \[2L - 1\] with L >= 30"),
            ((rel_k, rel_q, slots.long()), RuntimeError, r"slots \[65\] Long must be"),
            ((rel_k, rel_q[:, :1], slots), RuntimeError, r"rel_q \[40, 1, 32\] Float must be contiguous \[R, 2, 32\]"),
            ((rel_k.bfloat16(), rel_q, slots), RuntimeError, r"rel_k .* BFloat16 must be contiguous .* in q's dtype"),
            ((rel_k[:39], None, slots), IndexError, "slot 39 of distance 19 lies outside the 39 rows of rel_k")):
        case.tables = tables
        with pytest.raises(kind, match=words):
            run_native(case)


def check_all() -> None:
    """A short round through the kernel, for the libraries that this process did not load."""
    for dtype in DTYPES:
        for head_dim in (32, 80):
            for slots in SLOTS:
                case = disentangled_case([17, 5, 0, 64, 127, 1], 21, head_dim, dtype, 0.1, slots, num_prompts=3)
                check_attention(case, run_native(case))
    test_probability_masks_are_the_references_bit_for_bit()
    test_only_what_is_needed("c2p p2c", 0.1)


@pytest.mark.parametrize("arch", ["avx512", "avx2", "default"])
def test_every_instruction_set(arch: str) -> None:
    native_checks.check_instruction_set(arch, __file__)
