"""The public ops on the Triton kernels, with autograd: what the launchers return is what the ops save and hand back."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, randn

from ptv2_engine import ops
from ptv2_engine.testing import assert_error_within, cu_seqlens_of, random_prefix, random_qkv


def both(run, *leaves):
    """(outputs and gradients on Triton, on the fp64 reference) of `run` for the same leaves."""
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        inputs = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        with ops.use_backend(backend):
            out = run(*inputs)
        upstream = torch.linspace(-1, 1, out.numel(), dtype=dtype, device=out.device).view(out.shape)
        results.append([out, *torch.autograd.grad(out, inputs, upstream)])
    return zip(*results, strict=True)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_prefix_attention(dropout):
    lengths = [5, 17, 0]
    qkv, prefix = random_qkv(lengths, 2, 32, device=DEVICE), random_prefix(2, 5, 2, 32, device=DEVICE)
    ids, used = torch.tensor([1, 0, 1], device=DEVICE), torch.tensor([3, 5], device=DEVICE)

    def run(qkv, pk, pv):
        return ops.prefix_attention_qkv(qkv, pk, pv, cu_seqlens_of(lengths, DEVICE), 17, prompt_ids=ids, prompt_lengths=used,
                                        dropout_p=dropout, prefix_dropout_p=dropout, seed=7, site=3)

    for mine, exact in both(run, qkv, *prefix):
        assert_error_within("prefix_attention", mine, exact, None, 32.0)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_add_norm(dropout):
    weight, bias = randn(48, seed=1), randn(48, seed=2)

    def run(x, residual):
        return ops.add_norm(x, residual, weight.to(x.dtype), bias.to(x.dtype), 1e-5, dropout_p=dropout, seed=7, site=1)

    for mine, exact in both(run, randn(5, 48, seed=3), randn(5, 48, seed=4)):
        assert_error_within("add_norm", mine, exact, None, 32.0)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_add_norm_sum(dropout):
    weight, bias = randn(48, seed=1), randn(48, seed=2)

    def run(x, residual):
        return torch.stack(ops.add_norm_sum(x, residual, weight.to(x.dtype), bias.to(x.dtype), 1e-5, dropout_p=dropout, seed=7,
                                            site=1))

    for mine, exact in both(run, randn(5, 48, seed=3), randn(5, 48, seed=4)):
        assert_error_within("add_norm_sum", mine, exact, None, 32.0)


@pytest.mark.parametrize("head_dim", [32, 24])
def test_rotary(head_dim):
    table, positions = ops.cos_sin_table(50, head_dim, 100.0, DEVICE), torch.arange(70, device=DEVICE) % 50

    def run(qkv):
        return ops.rotary(qkv * 1, 2, table, positions)         # in place on the product's output, as in the encoder

    for mine, exact in both(run, randn(70, 3 * 2 * head_dim, seed=3)):
        assert_error_within("rotary", mine, exact, None, 8.0)


def test_linear_geglu():
    weight, bias = randn(40, 24, seed=1), randn(40, seed=2)
    for mine, exact in both(lambda x: ops.linear_geglu(x, weight.to(x.dtype), bias.to(x.dtype)), randn(5, 24, seed=3)):
        assert_error_within("linear_geglu", mine, exact, None, 32.0)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_linear_gelu(approximate):
    weight, bias = randn(40, 24, seed=1), randn(40, seed=2)
    for mine, exact in both(lambda x: ops.linear_gelu(x, weight.to(x.dtype), bias.to(x.dtype), approximate=approximate),
                            randn(5, 24, seed=3)):
        assert_error_within("linear_gelu", mine, exact, None, 32.0)
