"""The CUDA C++ kernels on a device: the emulator's checks, larger batches, determinism, CUDA graphs, the backend."""

from __future__ import annotations

from dataclasses import replace

import emulated
import pytest
import torch
from kernel_checks import Attention, attention_inputs, check_attention, mixed_prompts, run_attention

from ptv2_engine import _cuda, ops
from ptv2_engine.ops.prefix_attention import prefix_attention_qkv
from ptv2_engine.testing import assert_error_within

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.is_available() and _cuda.unavailable() is not None,
                                                  reason=f"CUDA kernels: {torch.cuda.is_available() and _cuda.unavailable()}")]
bf16, fp16 = torch.bfloat16, torch.float16
PACKAGE = emulated.as_package(None)


@pytest.mark.parametrize("dtype", [bf16, fp16])
@pytest.mark.parametrize("D", sorted(_cuda.MAX_STRIPS))
@pytest.mark.parametrize("P", [0, 1, 20, 48])
def test_shapes(P, D, dtype):
    check_attention(Attention((80, 0, 1, 64, 17, 5), P, N=3, D=D, dtype=dtype, spare_rows=3), PACKAGE)
    check_attention(Attention((16 * _cuda.MAX_STRIPS[D] - 48, 33), P, N=3, D=D, dtype=dtype), PACKAGE)
    check_attention(Attention((20, 64, 0, 3, 17, 1) * 20, P, N=3, D=D, dtype=dtype, spare_rows=3), PACKAGE)


@pytest.mark.parametrize("dtype", [bf16, fp16])
@pytest.mark.parametrize("lengths, P", [((40, 7, 64), 16), ((127, 30, 1), 20), ((200, 13), 33)])
def test_dropout(lengths, P, dtype):
    case = Attention(lengths, P, N=4, D=64, dtype=dtype, dropout_p=0.1, prefix_dropout_p=0.2)
    check_attention(case, PACKAGE)
    check_attention(mixed_prompts(case), PACKAGE)


@pytest.mark.parametrize("case", [
    Attention((300, 0, 70), 20, N=2, D=64, dtype=bf16, spare_rows=3), Attention((1000, 513), 128, N=4, D=64, dtype=bf16),
    Attention((1500, 33, 2048), 100, N=2, D=128, dtype=fp16, keep_out=True), Attention((700, 300), 200, N=2, D=32, dtype=bf16),
    mixed_prompts(Attention((700, 0, 150, 20), 70, N=3, D=80, dtype=bf16, dropout_p=0.1, prefix_dropout_p=0.1)),
    mixed_prompts(Attention((700, 0, 150, 20), 70, N=3, D=64, dtype=fp16, dropout_p=0.1, prefix_dropout_p=0.1))])
def test_long_rows(case):
    """On Hopper D = 64 and 128 take the forward on warpgroup products."""
    check_attention(case, PACKAGE)


def many(**changes: object) -> Attention:
    """200 sequences of 1 to 127 tokens: a block sweeps several."""
    lengths = tuple(int(n) for n in torch.randint(1, 128, (200,), generator=torch.Generator().manual_seed(0)))
    return replace(Attention(lengths, 20, N=12, D=64, dtype=bf16), **changes)


@pytest.mark.parametrize("changes", [{}, {"prefix_dropout_p": 0.1}, {"P": 48, "dropout_p": 0.1}])
def test_many_sequences(changes):
    check_attention(many(**changes), PACKAGE)
    check_attention(mixed_prompts(many(N=4, **changes)), PACKAGE)
    shorter = tuple(length // 2 for length in many().lengths)
    check_attention(many(lengths=shorter, **changes), PACKAGE)


def test_the_same_bits_in_two_runs_and_the_masks_of_triton():
    case = many(dropout_p=0.1, prefix_dropout_p=0.1)
    given = attention_inputs(case)
    first = run_attention(case, given, PACKAGE)
    for value in (0.0, 1e30):
        again = run_attention(case, given, PACKAGE, poison=value)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    for name, mine, theirs in zip(("out", "lse", "dqkv", "dpk", "dpv"), first, run_attention(case, given), strict=True):
        assert_error_within(name, mine.to(bf16), theirs.double(), None, 8.0)


def test_the_backend_under_a_cuda_graph():
    case = many(N=4)
    given = attention_inputs(case)
    qkv = given["qkv"].requires_grad_()
    pk, pv = (p.requires_grad_() for p in given["prefix"])

    def step() -> tuple[torch.Tensor, ...]:
        with ops.use_backend("cuda"):
            out = prefix_attention_qkv(qkv, pk, pv, given["cu_seqlens"], given["max_seqlen"])
        return out, *torch.autograd.grad(out, (qkv, pk, pv), given["dout"])

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(expected, captured, strict=True))
