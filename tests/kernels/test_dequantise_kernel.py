"""Quantised weights back to fp32 and fp16: the reference's bits, on shapes around and between whole tiles."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, check_dequantise

from ptv2_engine import ops


# a program writes 4096 weights, of rows no more than 2048 columns at a time: below, exactly, and more
@pytest.mark.parametrize("rows, columns", [(1, 64), (64, 1), (7, 320), (2, 2048), (64, 65), (3, 4160)])
@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dequantise(rows, columns, kind, dtype):
    check_dequantise(rows, columns, kind, dtype)


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_the_public_function_runs_it(kind):
    q = ops.quantise(torch.randn(6, 96, device=DEVICE), kind)
    with ops.use_backend("reference"):
        expected = ops.dequantise(q, torch.float16)
    with ops.use_backend("triton"):
        assert torch.equal(ops.dequantise(q, torch.float16), expected)
