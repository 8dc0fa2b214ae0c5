"""The C++ CPU kernels that work on rows against their references in fp64; widths around and between whole vectors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ptv2_engine.ops import _philox, cos_sin_table
from ptv2_engine.ops.add_norm import reference_sum
from ptv2_engine.ops.dropout import reference as dropout_reference
from ptv2_engine.ops.embedding import reference as embedding_reference
from ptv2_engine.ops.quantised import quantise
from ptv2_engine.ops.quantised import reference as dequantise_reference
from ptv2_engine.ops.rotary import reference as rotary_reference
from ptv2_engine.testing import assert_error_within

sys.path.insert(0, str(Path(__file__).parent))
import native_checks
from native_checks import DTYPES, SEED


@pytest.fixture(autouse=True)
def _native_with_poisoned_memory():  # type: ignore[no-untyped-def]
    with native_checks.native_with_poisoned_memory():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_sum", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("size", [7, 64, 100, 768])
def test_add_norm(size: int, dropout: float, with_sum: bool, dtype: torch.dtype) -> None:
    x, residual, dy, dsum = torch.randn(4, 37, size).to(dtype)
    weight, bias = torch.rand(size).add(0.5).to(dtype), torch.randn(size).to(dtype)
    seed = torch.tensor([SEED])
    y, xhat, rstd, _, total = torch.ops.ptv2.add_norm_fwd(x, residual, weight, bias, 1e-5, dropout, seed, 3, "full", with_sum)
    dresidual, dx = torch.ops.ptv2.add_norm_bwd(dy, dsum if with_sum else None, xhat, None, rstd, weight, dropout, seed, 3)

    def run(kind: torch.dtype) -> list[Tensor]:
        leaves = [t.to(kind).requires_grad_() for t in (x, residual)]
        out = reference_sum(*leaves, weight.to(kind), bias.to(kind), 1e-5, dropout_p=dropout, seed=seed, site=3)
        grads = torch.autograd.grad(out[:1 + with_sum], leaves, (dy.to(kind), dsum.to(kind))[:1 + with_sum])
        return [*out, *grads]

    actual = y, total, dx if dropout else dresidual, dresidual
    for name, *values in zip(("y", "sum", "dx", "dresidual"), actual, run(torch.float64), run(dtype), strict=True):
        if name != "sum" or with_sum:
            assert_error_within(name, *values)
    if dropout:
        keep = _philox.keep_scale(torch.arange(37), size, 0, p=dropout, seed=SEED, site=3, stream=_philox.HIDDEN)
        assert torch.equal(dx != 0, (keep != 0) & (dresidual != 0))
    else:
        assert dx.shape == (0,)
    assert total.shape == (x.shape if with_sum else (0,))
    bare, *empty, unsaved = torch.ops.ptv2.add_norm_fwd(x, residual, weight, bias, 1e-5, dropout, seed, 3, "none", with_sum)
    assert torch.equal(bare, y) and torch.equal(unsaved, total) and all(t.shape == (0,) for t in empty)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("count", [0, 1, 17, 20001])
def test_gelu(count: int, approximate: str, dtype: torch.dtype) -> None:
    z = torch.linspace(12, -12, count).to(dtype)[None]
    dh = torch.randn(z.shape).to(dtype)
    h, unsaved = z.clone(), z.clone()
    derivative = torch.ops.ptv2.gelu_(h, approximate, True, 8)
    assert torch.ops.ptv2.gelu_(unsaved, approximate, False, 8).shape == (0,) and torch.equal(h, unsaved)
    dz = torch.ops.ptv2.gelu_bwd(dh, derivative, 8)

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
@pytest.mark.parametrize(("rows", "size"), [(0, 8), (1, 1), (3, 17), (37, 96), (5, 4500)])
def test_geglu(rows: int, size: int, dtype: torch.dtype) -> None:
    z, dh = torch.randn(rows, 2 * size).mul(3).to(dtype), torch.randn(rows, size).to(dtype)
    # gelu(-40) is 0 in double precision: where there is nothing else to be measured against, every tiny number is too large
    z[:, 0], z[:, -1] = -40.0 if size > 1 else 1.5, 30.0
    before = z.clone()
    h, dz = torch.ops.ptv2.geglu_fwd(z), torch.ops.ptv2.geglu_bwd(dh, z)
    assert torch.equal(z, before)

    def run(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = z.to(kind).requires_grad_()
        a, gate = leaf.chunk(2, -1)
        out = F.gelu(a) * gate
        return out, torch.autograd.grad(out, leaf, dh.to(kind))[0]

    for name, *values in zip(("h", "dz"), (h, dz), run(torch.float64), run(dtype), strict=True):
        assert_error_within(name, *values, roundings=8.0 if dtype == torch.float32 else 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(0, 2, 32), (1, 1, 2), (29, 3, 64), (70, 2, 80), (5, 12, 36)])
def test_rotary(tokens: int, heads: int, head_dim: int, inverse: bool, dtype: torch.dtype) -> None:
    qkv, table = torch.randn(tokens, 3, heads, head_dim).to(dtype), cos_sin_table(50, head_dim, 1e4)
    positions = torch.randint(50, (tokens,))
    actual = qkv.clone()
    assert torch.ops.ptv2.rotary_(actual, table, positions, inverse) is None
    assert torch.equal(actual[:, 2], qkv[:, 2])
    assert_error_within("qkv", actual, rotary_reference(qkv.double(), table.double(), positions, inverse),
                        rotary_reference(qkv, table, positions, inverse))
    if inverse and dtype == torch.float32:
        torch.ops.ptv2.rotary_(actual, table, positions, False)
        assert_error_within("there and back", actual, qkv, roundings=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(0, 8), (1, 1), (5, 67), (300, 768)])
def test_dropout(tokens: int, width: int, dtype: torch.dtype) -> None:
    """Forward and backward, and rows behind the last that change nothing."""
    x, seed = torch.randn(tokens + 3, width).to(dtype), torch.tensor([SEED])
    actual = torch.ops.ptv2.dropout(x[:tokens], 0.3, seed, 40)
    exact = dropout_reference(x[:tokens].double(), 0.3, seed, 40)
    assert_error_within("y", actual, exact, roundings=1.0)
    assert torch.equal(actual != 0, exact != 0) and torch.equal(torch.ops.ptv2.dropout(x, 0.3, seed, 40)[:tokens], actual)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (64, 1), (3, 320), (32, 1030), (700, 96)])
def test_dequantise(rows: int, columns: int, kind: str, dtype: torch.dtype) -> None:
    q = quantise(torch.randn(rows, columns), kind)
    every = torch.arange(q.codes.numel()).to(torch.uint8).view(q.codes.shape)    # the codes of NaN and -128 too
    for codes in (q.codes, every if kind == "nf4" else every.view(q.codes.dtype)):
        actual = torch.ops.ptv2.dequantise(codes, q.scales, kind, rows, columns, dtype)
        expected = dequantise_reference(q._replace(codes=codes), dtype)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_words_of_errors() -> None:
    word, weight, ids = torch.randn(30, 8), torch.ones(8), torch.tensor([3, 30])
    with pytest.raises(IndexError, match="token 1 has word id 30 of 30, position 0 of 0"):
        torch.ops.ptv2.embedding(ids, ids, None, word, None, None, weight, weight, 1e-5, 0.0, None, 0)
    with pytest.raises(RuntimeError, match="approximate 'sigmoid' must be 'none' or 'tanh'"):
        torch.ops.ptv2.gelu_(torch.zeros(1, 4), "sigmoid", True, 8)
    with pytest.raises(RuntimeError, match=r"z \[2, 7\] must be \[T, 2F\]"):
        torch.ops.ptv2.geglu_fwd(torch.zeros(2, 7))
    with pytest.raises(IndexError, match="token 1 has position 30 of 20"):
        torch.ops.ptv2.rotary_(torch.zeros(2, 3, 1, 8), cos_sin_table(20, 8, 1e4), ids, False)
    codes = torch.zeros(3, 64, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="kind 'int4' must be"):
        torch.ops.ptv2.dequantise(codes, torch.ones(3), "int4", 3, 64, torch.float32)
    with pytest.raises(RuntimeError, match=r"must be contiguous .* of a fp8 weight \[3, 64\]"):
        torch.ops.ptv2.dequantise(codes, torch.ones(3), "fp8", 3, 64, torch.float32)
    with pytest.raises(RuntimeError, match=r"scales \[2\] must be \[3\]"):
        torch.ops.ptv2.dequantise(codes, torch.ones(2), "int8", 3, 64, torch.float32)
    with pytest.raises(RuntimeError, match="not a multiple of 64"):
        torch.ops.ptv2.dequantise(torch.zeros(15, dtype=torch.uint8), torch.ones(0), "nf4", 3, 10, torch.float32)


def check_all() -> None:
    """A short round through every kernel, for the libraries that this process did not load."""
    for dtype in DTYPES:
        test_add_norm(100, 0.3, True, dtype)
        test_embedding("all", dtype)
        test_dropout(5, 67, dtype)
        test_geglu(37, 96, dtype)
        for kind in ("int8", "fp8", "nf4"):
            test_dequantise(32, 1030, kind, dtype)
        test_rotary(29, 3, 80, False, dtype)
        for approximate in ("none", "tanh"):
            test_gelu(20001, approximate, dtype)


@pytest.mark.parametrize("arch", ["avx512", "avx2", "default"])
def test_every_instruction_set(arch: str) -> None:
    native_checks.check_instruction_set(arch, __file__)
