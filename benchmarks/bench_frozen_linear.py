"""A frozen linear layer on the CPU, forward and dX: packed for oneDNN, or in fp32 where it has no bf16, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ptv2_engine.ops import FrozenLinear, quantise
from ptv2_engine.ops.frozen_linear import multiplies_bf16


@pytest.mark.parametrize("kind", ["plain", "int8", "nf4"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cpu_frozen_linear(compare, dtype, kind):
    torch.manual_seed(0)
    wide = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    T, H, width = 1024, 768, 3072
    x, weight, dy = torch.randn(T, H).to(wide), (torch.randn(width, H) / 28).to(wide), torch.randn(T, width).to(wide)
    linear = FrozenLinear(weight)
    if kind != "plain":
        linear.hold(quantise(weight, kind))
        weight = linear.dense(wide)
    packed = linear.packs(x)

    def ours():
        return linear.matmul(x, packed), linear.matmul_transposed(dy, packed)

    def stock():
        return F.linear(x, weight), dy @ weight

    for mine, theirs in zip(ours(), stock(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2 if dtype == "bf16" else 1e-3)
    compare(f"frozen_linear forward and dX  T={T} I={H} O={width} {kind} {dtype}",
            {"ptv2": ours, "torch on the plain weight": stock},
            rounds=4 if dtype == "fp32" or multiplies_bf16() else 1, warmup=1 if dtype == "fp32" else 0, flops=4 * T * H * width,
            op="frozen_linear", tokens=T, dtype=dtype, backend="native", **{"pass": "both"})
