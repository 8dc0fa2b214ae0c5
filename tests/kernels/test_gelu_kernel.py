"""GELU in place, its code and the backward product, against fp64."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, check_gelu, kernel


# 2048 elements are one program: below, exactly, and one more.
@pytest.mark.parametrize("T, F", [(0, 8), (1, 1), (3, 50), (2, 1024), (1, 2049)])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gelu(T, F, approximate, dtype):
    check_gelu(T, F, dtype, approximate)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_infinities_do_not_become_nan(approximate):
    z = torch.tensor([[3e38, -3e38, 1e13, -1e13, 1e20]], device=DEVICE)
    derivative = kernel("linear_gelu").gelu_(z, approximate, True, 8)
    assert torch.equal(derivative, torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]], device=DEVICE))
    assert torch.isfinite(z).all()
