"""The kernels on a CUDA device: the interpreter's checks in 16 bits, larger shapes, determinism, the registered ops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_checks import (
    Attention,
    attention_inputs,
    check_add_norm,
    check_attention,
    check_dequantise,
    check_dropout,
    check_embedding,
    check_gelu,
    mixed_prompts,
    run_attention,
)
from test_disentangled_attention_kernel import Case as Disentangled
from test_disentangled_attention_kernel import check as check_disentangled

from ptv2_engine import ops
from ptv2_engine.testing import assert_error_within

pytestmark = pytest.mark.gpu
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [bf16, fp16, fp32]
# Each compiles kernels of its own, for seconds: every size in bf16, some in fp32, and fp16, which is bf16's code, in one
HEADS = [*((D, bf16) for D in (16, 32, 64, 80, 96, 128)), (32, fp32), (64, fp32), (128, fp32), (64, fp16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("T, H", [(1, 64), (1000, 768), (333, 1024), (65, 4096), (7, 8192)])
def test_row_ops(T, H, p, dtype):
    check_add_norm(T, H, dtype, p)
    check_add_norm(T, H, dtype, p, with_sum=True)
    check_embedding(T, H, dtype, p)
    check_dropout(T, H, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate, dtype):
    check_gelu(513, 3072, dtype, approximate)


@pytest.mark.parametrize("D, dtype", HEADS)
@pytest.mark.parametrize("P", [0, 1, 20, 100, 200])
def test_attention_shapes(P, D, dtype):
    check_attention(Attention((127, 0, 1, 64, 17, 5), P, N=3, D=D, dtype=dtype, spare_rows=3))
    check_attention(Attention((60, 0, 1, 17), P, N=3, D=D, dtype=dtype))


SHORT = tuple(int(n) for n in torch.randint(0, 45, (60,), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("D, dtype", [case for case in HEADS if case[0] != 96])
@pytest.mark.parametrize("P", [0, 5, 20, 100])
def test_several_short_sequences_a_program(P, D, dtype):
    for dropout_p in (0.0, 0.1):
        check_attention(Attention(SHORT, P, N=2, D=D, dtype=dtype, spare_rows=100, dropout_p=dropout_p, packed=True))
    check_attention(Attention((64, 0, 64, 1, 3, *(9,) * 12), P, N=3, D=D, dtype=dtype, dropout_p=0.1, packed=True))


@pytest.mark.parametrize("dtype", [bf16, fp16])
def test_windows_of_several_groups(dtype):
    check_attention(Attention(SHORT * 20, 20, N=16, D=64, dtype=dtype, dropout_p=0.1, packed=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths, P", [((40, 7, 64), 16), ((127, 30, 1), 20), ((300, 513), 128)])
def test_attention_dropout(lengths, P, dtype):
    case = Attention(lengths, P, N=4, D=64, dtype=dtype, dropout_p=0.1, prefix_dropout_p=0.2)
    check_attention(case)
    check_attention(mixed_prompts(case))


@pytest.mark.parametrize("dtype", [bf16, fp16])
def test_one_long_sequence_among_short_ones(dtype):
    """Tiles come from a list, by choice for the second batch, and because its lengths say so for the first."""
    check_attention(Attention((*(9,) * 90, 1200, *(70,) * 20), 64, N=4, D=64, dtype=dtype, spare_rows=300, dropout_p=0.1))
    case = Attention((3, 700, 0, 130, 700), 20, N=2, D=80, dtype=dtype, spare_rows=70, listed=True)
    check_attention(case)
    check_attention(mixed_prompts(replace(case, dropout_p=0.1, prefix_dropout_p=0.1, seen="causal", keep_out=True)))


@pytest.mark.parametrize("dtype", [bf16, fp16])
def test_attention_of_long_rows(dtype):
    check_attention(Attention((1500, 33, 2048), 128, N=2, D=64, dtype=dtype, keep_out=True))
    check_attention(Attention((1024,), 200, N=2, D=128, dtype=dtype, keep_out=True, dropout_p=0.1, prefix_dropout_p=0.1))


@pytest.mark.parametrize("dtype", [bf16, fp32])
@pytest.mark.parametrize("seen", ["causal", "candidates", "window"])
@pytest.mark.parametrize("lengths, P, keep_out", [((127, 0, 1, 64), 20, False), ((1500, 33), 16, True)])
def test_queries_that_do_not_see_every_token(lengths, P, keep_out, seen, dtype):
    case = Attention(lengths, P, N=2, D=64, dtype=dtype, seen=seen, keep_out=keep_out, spare_rows=3)
    check_attention(case)
    check_attention(mixed_prompts(replace(case, dropout_p=0.1, prefix_dropout_p=0.1)))


@pytest.mark.parametrize("D, dtype", [case for case in HEADS if case[0] != 96])
@pytest.mark.parametrize("P, buckets", [(0, 0), (20, 0), (100, 24)])
def test_disentangled_attention(P, buckets, D, dtype):
    check_disentangled(Disentangled((127, 0, 1, 64, 17), P, N=3, D=D, dtype=dtype, buckets=buckets, spare_rows=3))
    check_disentangled(Disentangled((300, 65), P, N=2, D=D, dtype=dtype, span=256, dropout_p=0.1, prefix_dropout_p=0.1 * (P > 0)))


@pytest.mark.parametrize("terms", ["c2p", "p2c"])
def test_one_relative_table(terms):
    check_disentangled(Disentangled((127, 64), 20, N=2, D=64, dtype=bf16, terms=terms))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_and_geglu(dtype):
    table = ops.cos_sin_table(700, 64, 10000.0, "cuda")
    qkv = torch.randn(1000, 3 * 12 * 64, device="cuda").to(dtype)
    z, dh = torch.randn(513, 2304, device="cuda").to(dtype), torch.randn(513, 1152, device="cuda").to(dtype)
    positions, results = torch.arange(1000, device="cuda") % 700, []
    for backend, precision in (("triton", dtype), ("reference", torch.float64), ("reference", dtype)):
        x, y = qkv.to(precision).requires_grad_(), z.to(precision).requires_grad_()
        with ops.use_backend(backend):
            turned = ops.rotary(x * 1, 12, table, positions)
            h = ops.linear_geglu(y, torch.eye(2304, device="cuda", dtype=precision))
        grads = (torch.autograd.grad(turned.square().sum(), x)[0], torch.autograd.grad(h, y, dh.to(precision))[0])
        results.append((turned, grads[0], h, grads[1]))
    for name, actual, exact, stock in zip(("rotary", "dqkv", "geglu", "dz"), *results, strict=True):
        assert_error_within(name, actual, exact, stock, 2.0, 4.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
@pytest.mark.parametrize("rows, columns", [(1024, 4096), (3072, 768), (77, 320), (64, 5001)])
def test_dequantise(rows, columns, kind, dtype):
    check_dequantise(rows, columns, kind, dtype)


def test_many_sequences():
    lengths = tuple(int(n) for n in torch.randint(1, 128, (200,), generator=torch.Generator().manual_seed(0)))
    check_attention(Attention(lengths, 20, N=12, D=64, dtype=bf16))
    check_attention(mixed_prompts(Attention(lengths, 48, N=4, D=64, dtype=bf16, prefix_dropout_p=0.1)))


@pytest.mark.parametrize("case", [Attention((64,) * 40, 16, N=8, D=64, dtype=bf16),
                                  Attention((128, 100, 7) * 12, 64, N=8, D=64, dtype=bf16),
                                  Attention((900, 40), 128, N=8, D=64, dtype=bf16, keep_out=True),
                                  Attention(SHORT * 4, 20, N=8, D=64, dtype=bf16, packed=True),
                                  Attention((900, 40, 17, 300, 1), 64, N=8, D=64, dtype=bf16, listed=True)])
def test_bitwise_determinism(case):
    case = replace(case, dropout_p=0.1, prefix_dropout_p=0.0 if case.packed else 0.1)
    given = attention_inputs(case)
    first = run_attention(case, given)
    for value in (0.0, 1e30):
        again = run_attention(case, given, poison=value)
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one, other)


def test_the_registered_ops_run_on_cuda_and_reach_the_prefix():
    case = Attention((30, 64, 5), 20, N=4, D=64, dtype=bf16)
    given = attention_inputs(case)
    results = []
    for backend, dtype in (("triton", bf16), ("reference", torch.float64), ("reference", bf16)):
        qkv = given["qkv"].to(dtype).requires_grad_()
        pk, pv = (p.to(dtype).requires_grad_() for p in given["prefix"])
        with ops.use_backend(backend):
            out = ops.prefix_attention_qkv(qkv, pk, pv, given["cu_seqlens"], given["max_seqlen"])
        results.append((out, *torch.autograd.grad(out, (qkv, pk, pv), given["dout"].to(dtype))))
    for name, actual, exact, stock in zip(("out", "dqkv", "dpk", "dpv"), *results, strict=True):
        assert_error_within(name, actual, exact, stock, 2.0, 4.0)
