"""The C++ CPU kernels against the references in fp64: values, exact dropout masks, determinism, every instruction set built.

Shapes are awkward on purpose: lengths 0 and 1 (an empty and a lone sequence), 5, 17 (just over a vector), 64, 127 (prime),
300 and 900 (several blocks of query rows); prompts of 0, 1, 5, 16, 100, 200 rows; head dims
32, 64, 80 (an odd number of vectors), 128.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ptv2_engine
from ptv2_engine import _native, ops
from ptv2_engine.ops import _philox
from ptv2_engine.ops.add_norm import reference as add_norm_reference
from ptv2_engine.ops.embedding import reference as embedding_reference
from ptv2_engine.testing import assert_error_within, cu_seqlens_of, random_prefix, random_qkv

DTYPES = [torch.float32, torch.bfloat16]
SEED = 2**61 + 12345  # both halves of the key matter


@pytest.fixture(autouse=True)
def _native_with_poisoned_memory():  # type: ignore[no-untyped-def]
    if reason := _native.load():
        pytest.skip(reason)  # a run that must have the kernels says so: pytest --expect native
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN, also what C++ allocates
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Case:
    """One call of prefix_attention with everything its backward needs."""

    qkv: Tensor
    prefix: tuple[Tensor, Tensor] | None
    lengths: list[int]
    dout: Tensor
    prompt_ids: Tensor | None = None
    prompt_lengths: Tensor | None = None
    dropout_p: float = 0.0
    prefix_dropout_p: float = 0.0
    site: int = 5

    @property
    def tail(self) -> tuple:
        return (cu_seqlens_of(self.lengths), max(self.lengths), self.prompt_ids, self.prompt_lengths, self.qkv.shape[-1] ** -0.5,
                self.dropout_p, self.prefix_dropout_p, torch.tensor([SEED]), self.site)


def make_case(lengths: list[int], prompt_length: int, head_dim: int, dtype: torch.dtype, dropout: float = 0.0,
              num_heads: int = 2, num_prompts: int = 1) -> Case:
    prefix = random_prefix(num_prompts, prompt_length, num_heads, head_dim, dtype) if prompt_length else None
    case = Case(random_qkv(lengths, num_heads, head_dim, dtype), prefix, lengths,
                torch.randn(sum(lengths), num_heads, head_dim, generator=torch.Generator().manual_seed(9)).to(dtype),
                dropout_p=dropout, prefix_dropout_p=dropout)
    if num_prompts > 1:
        case.prompt_ids = torch.arange(len(lengths)).mul(7) % num_prompts
        case.prompt_lengths = torch.tensor([prompt_length, 0, *[max(prompt_length - 3, 0)] * (num_prompts - 2)])
    return case


def run_native(case: Case, need_tokens: bool = True, need_prefix: bool = True) -> dict[str, Tensor]:
    q, k, v = case.qkv.unbind(1)
    pk, pv = case.prefix or (None, None)
    out, lse = torch.ops.ptv2.prefix_attention_fwd(q, k, v, pk, pv, *case.tail)
    dqkv, dpk, dpv = torch.ops.ptv2.prefix_attention_bwd(case.dout, q, k, v, pk, pv, None, lse, *case.tail, need_tokens,
                                                         need_prefix)
    return {"out": out, "dqkv": dqkv, "dprefix_k": dpk, "dprefix_v": dpv, "lse": lse}


def run_reference(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = [x.detach().to(dtype).requires_grad_() for x in (case.qkv, *(case.prefix or ()))]
    cu_seqlens, longest, ids, lengths, scale, p, prefix_p, seed, site = case.tail
    with ops.use_backend("reference"):
        out = ops.prefix_attention_qkv(*(tensors if case.prefix else [*tensors, None, None]), cu_seqlens, longest,
                                       prompt_ids=ids, prompt_lengths=lengths, scale=scale, dropout_p=p,
                                       prefix_dropout_p=prefix_p, seed=seed, site=site)
    grads = torch.autograd.grad(out, tensors, case.dout.to(dtype), allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(tensors, grads, strict=True)]
    return dict(zip(("out", "dqkv", "dprefix_k", "dprefix_v"), (out, *grads), strict=False))


def check_attention(case: Case, actual: dict[str, Tensor]) -> None:
    exact, stock = run_reference(case, torch.float64), run_reference(case, case.qkv.dtype)
    for name in exact:
        assert_error_within(name, actual[name], exact[name], stock[name], roundings=4.0)


RAGGED = [5, 0, 17, 1, 64]


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
    """Without the tokens' gradients the prefix's are the same bits; without the prefix's the tokens' are."""
    case = make_case([20, 65, 3], 20, 64, torch.float32, dropout, num_heads=3)
    both, prefix, tokens = run_native(case), run_native(case, need_tokens=False), run_native(case, need_prefix=False)
    assert prefix["dqkv"].shape == (0,) and tokens["dprefix_k"].shape == tokens["dprefix_v"].shape == (0,)
    assert torch.equal(both["dqkv"], tokens["dqkv"])
    assert torch.equal(both["dprefix_k"], prefix["dprefix_k"]) and torch.equal(both["dprefix_v"], prefix["dprefix_v"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_every_run_and_thread_count(dtype: torch.dtype) -> None:
    case = make_case([64, 5, 17, 127, 0, 30] * 4, 20, 32, dtype, dropout=0.1, num_heads=3, num_prompts=3)
    before, runs = torch.get_num_threads(), []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        runs.append(run_native(case))
    torch.set_num_threads(before)
    for other in runs[1:]:
        for name in other:
            assert torch.equal(runs[0][name], other[name]), name


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("size", [7, 64, 100, 768])
def test_add_norm(size: int, dropout: float, dtype: torch.dtype) -> None:
    x, residual, dy = torch.randn(3, 37, size).to(dtype)
    weight, bias = torch.rand(size).add(0.5).to(dtype), torch.randn(size).to(dtype)
    seed = torch.tensor([SEED])
    y, xhat, rstd = torch.ops.ptv2.add_norm_fwd(x, residual, weight, bias, 1e-5, dropout, seed, 3, True)
    dresidual, dx = torch.ops.ptv2.add_norm_bwd(dy, xhat, rstd, weight, dropout, seed, 3)

    def run(kind: torch.dtype) -> list[Tensor]:
        leaves = [t.to(kind).requires_grad_() for t in (x, residual)]
        out = add_norm_reference(*leaves, weight.to(kind), bias.to(kind), 1e-5, dropout_p=dropout, seed=seed, site=3)
        return [out, *torch.autograd.grad(out, leaves, dy.to(kind))]

    actual = y, dx if dropout else dresidual, dresidual
    for name, *values in zip(("y", "dx", "dresidual"), actual, run(torch.float64), run(dtype), strict=True):
        assert_error_within(name, *values)
    if dropout:
        keep = _philox.keep_scale(torch.arange(37), size, 0, p=dropout, seed=SEED, site=3, stream=_philox.HIDDEN)
        assert torch.equal(dx != 0, (keep != 0) & (dresidual != 0))
    else:
        assert dx.shape == (0,)
    bare, empty, no_rstd = torch.ops.ptv2.add_norm_fwd(x, residual, weight, bias, 1e-5, dropout, seed, 3, False)
    assert torch.equal(bare, y) and empty.shape == no_rstd.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("count", [0, 1, 17, 20001])
def test_gelu(count: int, approximate: str, dtype: torch.dtype) -> None:
    z = torch.linspace(12, -12, count).to(dtype)[None]
    dh = torch.randn(z.shape).to(dtype)
    h, unsaved = z.clone(), z.clone()
    derivative = torch.ops.ptv2.gelu_(h, approximate, True)
    assert torch.ops.ptv2.gelu_(unsaved, approximate, False).shape == (0,) and torch.equal(h, unsaved)
    dz = torch.ops.ptv2.gelu_bwd(dh, derivative)

    def run(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = z.to(kind).requires_grad_()
        out = F.gelu(leaf, approximate=approximate)
        return out, torch.autograd.grad(out, leaf, dh.to(kind))[0]

    (exact, exact_dz), (stock, stock_dz) = run(torch.float64), run(dtype)
    assert_error_within("h", h, exact, stock)
    if dtype == torch.bfloat16:  # half a code step more than the rounding of the result
        bound = dh.double().abs() * 0.0026 + exact_dz.abs() * 2**-8
        assert derivative.dtype == torch.uint8 and bool(((dz.double() - exact_dz).abs() <= bound).all())
    else:
        assert_error_within("dz", dz, exact_dz, stock_dz, roundings=8.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tables", ["all", "no types given", "no type table", "no positions"])
def test_embedding(tables: str, dtype: torch.dtype) -> None:
    word, position, kind = (torch.randn(rows, 50).to(dtype) for rows in (30, 20, 2))
    weight, bias = torch.randn(2, 50).to(dtype)
    ids, positions, kinds = torch.randint(30, (41,)), torch.randint(20, (41,)), torch.randint(2, (41,))
    args = [ids, positions, None if tables == "no types given" else kinds, word, None if tables == "no positions" else position,
            None if tables == "no type table" else kind, weight, bias]

    def run(as_dtype: torch.dtype) -> Tensor:
        cast = [t.to(as_dtype) if t is not None and t.is_floating_point() else t for t in args]
        return embedding_reference(*cast, 1e-5, dropout_p=0.2, seed=torch.tensor([SEED]), site=8)

    actual = torch.ops.ptv2.embedding(*args, 1e-5, 0.2, torch.tensor([SEED]), 8)
    assert_error_within("x", actual, run(torch.float64), run(dtype))


def test_words_of_errors() -> None:
    word, weight = torch.randn(30, 8), torch.ones(8)
    ids = torch.tensor([3, 30])
    with pytest.raises(IndexError, match="token 1 has word id 30 of 30, position 0 of 0"):
        torch.ops.ptv2.embedding(ids, ids, None, word, None, None, weight, weight, 1e-5, 0.0, None, 0)
    case = make_case([4, 3], 2, 32, torch.float32)
    q, k, v = case.qkv.unbind(1)

    def call(*, q: Tensor = q, cu: tuple[int, ...] = (0, 4, 7), ids: Tensor | None = None, lengths: Tensor | None = None) -> None:
        torch.ops.ptv2.prefix_attention_fwd(q, k, v, *case.prefix, torch.tensor(cu, dtype=torch.int32), 4, ids, lengths, 1.0,
                                            0.0, 0.0, None, 0)

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
    with pytest.raises(RuntimeError, match="approximate 'sigmoid' must be 'none' or 'tanh'"):
        torch.ops.ptv2.gelu_(torch.zeros(1, 4), "sigmoid", True)


def check_all() -> None:
    """A short round through every kernel, for the libraries that this process did not load."""
    torch.use_deterministic_algorithms(True)
    for dtype in DTYPES:
        for head_dim in (32, 80):
            case = make_case([17, 5, 0, 64, 1], 21, head_dim, dtype, dropout=0.1, num_prompts=3)
            check_attention(case, run_native(case))
        test_add_norm(100, 0.3, dtype)
        test_embedding("all", dtype)
        for approximate in ("none", "tanh"):
            test_gelu(20001, approximate, dtype)
    test_probability_masks_are_the_references_bit_for_bit()


@pytest.mark.parametrize("arch", ["avx512", "avx2", "default"])
def test_every_instruction_set(arch: str) -> None:
    if arch not in _native.runnable_archs() or arch == _native.loaded_arch():
        pytest.skip(f"loaded already, not built or not for this CPU: {_native.runnable_archs()}")
    code = (f"import runpy, torch; from ptv2_engine import _native; assert _native.load({arch!r}) is None; "
            f"assert _native.loaded_arch() == {arch!r}; runpy.run_path({__file__!r})['check_all']()")
    environment = os.environ | {"PYTHONPATH": str(Path(ptv2_engine.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
