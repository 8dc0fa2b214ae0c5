"""The row ops: add_norm, linear_gelu's elementwise part, embedding; and frozen_linear. Against stock PyTorch, weights frozen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.shapes import FFN, SHAPES, short
from ptv2_engine import ops

T = 2048


def devices():
    return [pytest.param("cpu", torch.float32, id="cpu-fp32"), pytest.param("cpu", torch.bfloat16, id="cpu-bf16"),
            pytest.param("cuda", torch.bfloat16, id="cuda-bf16", marks=pytest.mark.gpu)]


def rows(device, dtype, width, grad=True):
    return torch.randn(T, width, device=device).to(dtype).requires_grad_(grad)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("device, dtype", devices())
def test_add_norm(compare, device, dtype, dropout):
    H = SHAPES["bert-base"][0]
    x, residual, dy = rows(device, dtype, H), rows(device, dtype, H), rows(device, dtype, H, False)
    weight, bias = torch.rand(H, device=device).to(dtype), torch.randn(H, device=device).to(dtype)
    seed = torch.tensor([1], device=device)
    stock = lambda: F.layer_norm(F.dropout(x, dropout) + residual, (H,), weight, bias)
    ours = lambda: ops.add_norm(x, residual, weight, bias, 1e-5, dropout_p=dropout, seed=seed)
    passes = 4 + 3 + (dropout > 0)
    compare(
        f"add_norm forward+backward  T={T} H={H} p={dropout} {short(dtype)} {device}",
        {"ptv2": lambda: ours().backward(dy), "torch": lambda: stock().backward(dy)},
        rounds=20,
        bytes=passes * T * H * dtype.itemsize,
    )


@pytest.mark.parametrize("device, dtype", devices())
def test_linear_gelu(compare, device, dtype):
    H = SHAPES["bert-base"][0]
    x, dh = rows(device, dtype, H), rows(device, dtype, FFN * H, False)
    linear = ops.FrozenLinear(torch.randn(FFN * H, H, device=device).to(dtype), torch.randn(FFN * H, device=device).to(dtype))
    compare(f"linear_gelu forward+backward  T={T} H={H} {short(dtype)} {device}",
            {"ptv2": lambda: ops.linear_gelu(x, linear).backward(dh),
             "torch": lambda: F.gelu(F.linear(x, linear.weight, linear.bias)).backward(dh)}, rounds=8, flops=4 * T * FFN * H * H)


@pytest.mark.parametrize("device, dtype", devices())
def test_frozen_linear(compare, device, dtype):
    H = SHAPES["bert-base"][0]
    x, dy = rows(device, dtype, H), rows(device, dtype, 3 * H, False)
    linear = ops.FrozenLinear(torch.randn(3 * H, H, device=device).to(dtype), torch.randn(3 * H, device=device).to(dtype))
    compare(f"frozen_linear forward+backward  T={T} {H}->{3 * H} {short(dtype)} {device}",
            {"ptv2": lambda: linear(x).backward(dy), "torch": lambda: F.linear(x, linear.weight, linear.bias).backward(dy)},
            rounds=8, flops=4 * T * 3 * H * H)


@pytest.mark.parametrize("device, dtype", devices())
def test_embedding(compare, device, dtype):
    H = SHAPES["bert-base"][0]
    word, position, types = (torch.randn(n, H, device=device).to(dtype) for n in (30522, 512, 2))
    weight, bias = torch.rand(H, device=device).to(dtype), torch.randn(H, device=device).to(dtype)
    ids, positions = torch.randint(0, 30522, (T,), device=device), torch.arange(T, device=device) % 128
    stock = lambda: F.layer_norm(word[ids] + position[positions] + types[0], (H,), weight, bias)
    compare(f"embedding forward  T={T} H={H} {short(dtype)} {device}",
            {"ptv2": lambda: ops.embedding(ids, positions, None, word, position, types, weight, bias, 1e-5), "torch": stock},
            rounds=20, bytes=2 * T * H * dtype.itemsize)
