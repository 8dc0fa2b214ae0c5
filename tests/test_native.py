"""prefix_attention on the CPU against its reference in fp64: values, exact dropout masks, determinism, every instruction set.

Shapes are awkward on purpose: lengths 0 and 1 (an empty and a lone sequence), 5, 17 (just over a vector), 64, 127 (prime),
300 and 900 (several blocks of query rows); prompts of 0, 1, 5, 16, 100, 200 rows; head dims
32, 64, 80 (an odd number of vectors), 128.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from ptv2_engine.ops import _philox, key_ranges
from ptv2_engine.testing import assert_error_within, cu_seqlens_of

sys.path.insert(0, str(Path(__file__).parent))
import native_checks
from native_checks import DTYPES, SEED, Case, check_attention, make_case, run_native

RAGGED = [5, 0, 17, 1, 64]


@pytest.fixture(autouse=True)
def _native_with_poisoned_memory():  # type: ignore[no-untyped-def]
    with native_checks.native_with_poisoned_memory():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize(("lengths", "prompt_length"), [(RAGGED, 16), (RAGGED, 0), (RAGGED, 200), ([127], 5),
                                                        ([300, 3], 100), ([0, 1], 1), ([900], 60)])
def test_attention(lengths: list[int], prompt_length: int, head_dim: int, dtype: torch.dtype) -> None:
    case = make_case(lengths, prompt_length, head_dim, dtype)
    check_attention(case, run_native(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 64, 80])
def test_attention_with_dropout_and_several_prompts(head_dim: int, dtype: torch.dtype) -> None:
    case = make_case([17, 5, 0, 64, 1, 33, 20], 21, head_dim, dtype, dropout=0.2, num_prompts=4)
    actual = run_native(case)
    check_attention(case, actual)
    assert not actual["dprefix_k"][1].any(), "prompt 1 has length 0"
    assert not actual["dprefix_k"][2, 18:].any(), "rows past a prompt's length get no gradient"


@hypothesis.given(lengths=st.lists(st.sampled_from([0, 1, 5, 17, 64, 127]), min_size=1, max_size=6),
                  prompt_length=st.sampled_from([0, 1, 5, 16, 100]), head_dim=st.sampled_from([16, 32, 64]),
                  dropout=st.sampled_from([0.0, 0.1]), num_prompts=st.integers(1, 3), dtype=st.sampled_from(DTYPES))
@hypothesis.settings(max_examples=25)
def test_attention_of_any_batch(lengths: list[int], prompt_length: int, head_dim: int, dropout: float, num_prompts: int,
                                dtype: torch.dtype) -> None:
    case = make_case(lengths, prompt_length, head_dim, dtype, dropout, num_prompts=num_prompts)
    check_attention(case, run_native(case))


def random_ranges(lengths: list[int], kind: str) -> tuple[Tensor, Tensor]:
    """Ranges of every kind for sequences of these lengths: what the encoders make, and what only the contract allows."""
    cu_seqlens, T = cu_seqlens_of(lengths), sum(lengths)
    generator = torch.Generator().manual_seed(4)
    sizes = torch.tensor(lengths)
    causal_from = (torch.rand(len(lengths), generator=generator) * sizes).long().add(1).clamp(max=sizes)
    index = torch.cat([torch.arange(length) for length in lengths])
    if kind.startswith("window"):
        return key_ranges(cu_seqlens, T, window=int(kind.split()[1]))
    if kind == "causal":
        return key_ranges(cu_seqlens, T, causal_from=causal_from)
    if kind == "candidates":  # of 7 tokens behind each context
        owner_from = torch.repeat_interleave(causal_from, sizes)
        return key_ranges(cu_seqlens, T, causal_from=causal_from, first_key_T=owner_from + (index - owner_from) // 7 * 7)
    if kind == "far":  # a gap between the context and the range, other gaps in each row
        context = torch.full((len(lengths),), 2)
        low = index // 50 * 50 - 20 + (index % 3)
        return context.int(), torch.stack((low, low + 70 + index % 5), 1).int()
    assert kind == "clipped"  # bounds far outside; every third row sees the context alone
    low, high = -torch.randint(2**31, (T,), generator=generator), torch.randint(1, 2**31 - 1, (T,), generator=generator)
    empty = index % 3 == 1
    return torch.full((len(lengths),), 3).int(), torch.stack((low.where(~empty, 9), high.where(~empty, 4)), 1).int()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("prompt_length", [0, 5, 20])
@pytest.mark.parametrize("kind", ["window 0", "window 9", "window 1000", "causal", "candidates", "far", "clipped"])
def test_key_ranges(kind: str, prompt_length: int, dropout: float, dtype: torch.dtype) -> None:
    lengths = [64, 0, 1, 17, 127, 300]
    case = make_case(lengths, prompt_length, 32, dtype, dropout, num_prompts=3 if prompt_length == 20 else 1)
    case.ranges = random_ranges(lengths, kind)
    check_attention(case, run_native(case))
    native_checks.check_only_what_is_needed(case)


@pytest.mark.parametrize("prompt_length", [0, 5])
def test_hidden_keys_have_no_influence_and_no_gradient(prompt_length: int) -> None:
    """Tokens that nobody sees: their values change no bit, and their gradient is zero to the last."""
    case = make_case([40, 300], prompt_length, 32, torch.float32)
    context, key_range = key_ranges(cu_seqlens_of(case.lengths), 340, window=6)
    hidden = torch.cat((torch.arange(20, 25), torch.arange(140, 260)))
    key_range[20:32], key_range[8:20, 1] = torch.tensor([25, 40]), 20
    key_range[140:], key_range[126:140] = torch.tensor([220, 300]), torch.tensor([0, 100])
    key_range[40:140, 1] = key_range[40:140, 1].clamp(max=100)
    case.ranges = context, key_range
    expected = run_native(case)
    assert not expected["dqkv"][hidden, 1:].any() and expected["dqkv"][hidden, 0].any()
    case.qkv[hidden, 1:] *= 1e3
    actual = run_native(case)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_full_ranges_are_no_ranges() -> None:
    case = make_case([64, 17, 0, 127], 20, 64, torch.float32, dropout=0.1)
    plain = run_native(case)
    everything = torch.tensor([[0, 127]], dtype=torch.int32).repeat(208, 1)
    for context in (0, 127):
        case.ranges = torch.full((4,), context, dtype=torch.int32), everything
        actual = run_native(case)
        assert all(torch.equal(actual[name], plain[name]) for name in plain)


def test_row_strides_of_every_kind() -> None:
    """q, k, v as slices of one buffer, apart, and of a wider buffer give the same bits."""
    case = make_case([17, 40], 7, 32, torch.float32)
    wide = torch.randn(57, 5, 2, 32)
    wide[:, 1:4] = case.qkv
    pk, pv = case.prefix
    stack = torch.stack((pk, pv), 2)  # prefix rows with a stride of 2 N D
    expected = run_native(case)["out"]
    for q, k, v in (case.qkv.unbind(1), [x.contiguous() for x in case.qkv.unbind(1)], wide[:, 1:4].unbind(1)):
        out, _ = torch.ops.ptv2.prefix_attention_fwd(q, k, v, stack[:, :, 0], stack[:, :, 1], *case.tail)
        assert torch.equal(out, expected)


def test_probability_masks_are_the_references_bit_for_bit() -> None:
    """With the identity as values, the output is the masked probabilities themselves."""
    P, S, D = 37, 70, 128
    eye = torch.eye(D)[:, None].expand(D, 2, D)
    qkv = torch.stack((*torch.randn(2, S, 2, D), eye[P:P + S]), 1)
    prefix = torch.randn(1, P, 2, D), eye[None, :P].contiguous()
    case = Case(qkv, prefix, [S], torch.zeros(S, 2, D), dropout_p=0.3)
    out = run_native(case)["out"]
    for heads in range(2):
        for columns, stream, start in ((P, _philox.PREFIX_PROB, 0), (S, _philox.TOKEN_PROB, P)):
            keep = _philox.keep_scale(torch.arange(S), columns, heads, p=0.3, seed=SEED, site=5, stream=stream)
            assert torch.equal(out[:, heads, start:start + columns] != 0, keep != 0)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_only_what_is_needed(dropout: float) -> None:
    native_checks.check_only_what_is_needed(make_case([20, 65, 3], 20, 64, torch.float32, dropout, num_heads=3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_every_run_and_thread_count(dtype: torch.dtype) -> None:
    native_checks.check_same_bits_on_every_thread_count(
        make_case([64, 5, 17, 127, 0, 30] * 4, 20, 32, dtype, dropout=0.1, num_heads=3, num_prompts=3))


def test_log_sum_exp_and_rows_past_the_last_sequence() -> None:
    case = make_case([10, 20], 4, 32, torch.float32)
    case.qkv = torch.cat((case.qkv, torch.full((3, 3, 2, 32), float("nan"))))
    case.dout = torch.cat((case.dout, torch.full((3, 2, 32), float("nan"))))
    actual = run_native(case)
    for name in ("out", "dqkv"):
        assert not actual[name][30:].any(), name
        assert torch.isfinite(actual[name]).all(), name
    q, k, _ = case.qkv[:10].transpose(0, 1).unbind(0)
    keys = torch.cat((case.prefix[0][0], k)).double()
    lse = torch.einsum("ind,jnd->nij", q.double(), keys).mul(32**-0.5).logsumexp(-1)
    assert_error_within("lse", actual["lse"][:, :10], lse, roundings=4.0)
    assert not actual["lse"][:, 30:].any()


def test_no_tokens_at_all() -> None:
    actual = run_native(make_case([0, 0], 5, 32, torch.float32))
    assert actual["out"].shape == (0, 2, 32) and actual["dqkv"].shape == (0, 3, 2, 32)
    assert actual["dprefix_k"].shape == (1, 5, 2, 32) and not actual["dprefix_k"].any() and not actual["dprefix_v"].any()


def test_large_scores_stay_finite_and_nan_stays_in_its_sequence() -> None:
    case = make_case([17, 9], 5, 32, torch.float32)
    case.qkv[:, :2] *= 100
    assert all(torch.isfinite(x).all() for x in run_native(case).values())
    case.qkv[3, 0, 0, 0] = float("nan")
    out = run_native(case)["out"]
    assert out[3, 0].isnan().all() and torch.isfinite(out[17:]).all() and torch.isfinite(out[:3]).all()


@pytest.mark.parametrize("mutation", ["a row dropped", "another mask", "a sequence missing from the prefix's gradient",
                                      "keys one column off"])
def test_the_check_catches_wrong_results(mutation: str) -> None:
    case = make_case([17, 5, 30], 16, 32, torch.bfloat16, dropout=0.1)
    actual = run_native(case)
    if mutation == "a row dropped":
        actual["out"][-1] = 0
    elif mutation == "another mask":
        case.site += 1
        actual = run_native(case)
        case.site -= 1
    elif mutation == "keys one column off":
        actual["dqkv"][:, 1] = actual["dqkv"][:, 1].roll(1, 0)
    else:
        case.dout[17:22] = 0
        actual["dprefix_k"] = run_native(case)["dprefix_k"]
        case = make_case([17, 5, 30], 16, 32, torch.bfloat16, dropout=0.1)
    with pytest.raises(AssertionError, match="error .* > budget"):
        check_attention(case, actual)


def test_words_of_errors() -> None:
    case = make_case([4, 3], 2, 32, torch.float32)
    q, k, v = case.qkv.unbind(1)

    def call(*, q: Tensor = q, cu: tuple[int, ...] = (0, 4, 7), ids: Tensor | None = None, lengths: Tensor | None = None,
             ranges: tuple = (None, None)) -> None:
        torch.ops.ptv2.prefix_attention_fwd(q, k, v, *case.prefix, torch.tensor(cu, dtype=torch.int32), 4, ids, lengths, 1.0,
                                            0.0, 0.0, None, 0, *ranges)

    with pytest.raises(RuntimeError, match="cu_seqlens falls from 5 to 4 at sequence 1"):
        call(cu=(0, 5, 4))
    with pytest.raises(RuntimeError, match="runs from 0 to 9, but must start at 0 and end within the 7 tokens"):
        call(cu=(0, 4, 9))
    with pytest.raises(RuntimeError, match=r"prompt_ids\[1\] = 1 is outside \[0, 0\]"):
        call(ids=torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match=r"prompt_lengths\[0\] = 3 is outside \[0, 2\]"):
        call(lengths=torch.tensor([3]))
    with pytest.raises(RuntimeError, match="dtype Half has no native kernel"):
        call(q=q.half())
    with pytest.raises(RuntimeError, match=r"context and key_range must both be given, contiguous int32 \[2\] and \[7, 2\]"):
        call(ranges=(torch.zeros(2, dtype=torch.int32), None))


def check_all() -> None:
    """A short round through the kernel, for the libraries that this process did not load."""
    for dtype in DTYPES:
        for head_dim in (32, 80):
            case = make_case([17, 5, 0, 64, 1], 21, head_dim, dtype, dropout=0.1, num_prompts=3)
            check_attention(case, run_native(case))
            for kind in ("window 9", "candidates"):
                case.ranges = random_ranges(case.lengths, kind)
                check_attention(case, run_native(case))
    test_probability_masks_are_the_references_bit_for_bit()


@pytest.mark.parametrize("arch", ["avx512", "avx2", "default"])
def test_every_instruction_set(arch: str) -> None:
    native_checks.check_instruction_set(arch, __file__)
