"""The Triton kernels of memory policy lean, in the interpreter (fp32, fp16)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from lean_checks import check_int8_norm, check_packed_gelu, triton_functions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("T,H", [(0, 64), (1, 64), (5, 80), (3, 312), (2, 8), (4, 129)])
@pytest.mark.parametrize("p,with_sum", [(0.0, False), (0.3, True)])
def test_int8_norm(T, H, dtype, p, with_sum):
    check_int8_norm(triton_functions(), T, H, dtype, p, with_sum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("T,F", [(0, 8), (1, 4), (3, 100), (17, 512), (2, 4096)])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_packed_gelu(T, F, dtype, approximate):
    check_packed_gelu(triton_functions(), T, F, dtype, approximate)
