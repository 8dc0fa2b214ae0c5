"""The C++ kernels of memory policy lean."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ptv2_engine import ops
from ptv2_engine.errors import InputError
from ptv2_engine.ops import _dispatch
from ptv2_engine.ops.add_norm import add_norm_kept

sys.path.insert(0, str(Path(__file__).parents[0]))
from lean_checks import check_int8_norm, check_packed_gelu

pytestmark = pytest.mark.skipif(_dispatch.native_unavailable() is not None, reason="the C++ kernels are not built")
FUNCTIONS = torch.ops.ptv2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T,H", [(0, 64), (1, 64), (5, 80), (3, 312), (37, 768), (2, 8), (4, 129)])
@pytest.mark.parametrize("p,with_sum", [(0.0, False), (0.3, True)])
def test_int8_norm(T, H, dtype, p, with_sum):
    check_int8_norm(FUNCTIONS, T, H, dtype, p, with_sum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T,F", [(0, 8), (1, 4), (3, 100), (17, 512), (2, 4096)])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_packed_gelu(T, F, dtype, approximate):
    check_packed_gelu(FUNCTIONS, T, F, dtype, approximate)


@pytest.mark.parametrize("keep", ["full", "int8"])
def test_kept_is_the_memory_that_backward_reads(keep):
    x = torch.randn(5, 96, requires_grad=True)
    weight, bias = torch.rand(96), torch.rand(96)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y, total, kept = add_norm_kept(x, torch.zeros(5, 96), weight, bias, 1e-5, keep=keep, with_sum=True)
    saved = {t.data_ptr() for t in packed}
    assert kept.xhat_TH.data_ptr() in saved and (kept.scales is None or kept.scales.data_ptr() in saved)
    assert (kept.scales is None) == (keep == "full") and not kept.xhat_TH.requires_grad
    assert (kept.y(weight, bias, torch.float32) - y).abs().max() < (1e-5 if keep == "full" else 0.02)
    torch.testing.assert_close(total, x.detach())
    with torch.no_grad():
        assert add_norm_kept(x, torch.zeros(5, 96), weight, bias, 1e-5, keep=keep)[2] is None
    with ops.use_backend("reference"):
        assert add_norm_kept(x, torch.zeros(5, 96), weight, bias, 1e-5, keep=keep)[2] is None


def test_what_cannot_be_kept_is_refused():
    x = torch.randn(2, 8)
    with pytest.raises(InputError, match="keep 'int4'"):
        add_norm_kept(x, x, x[0], x[0], 1e-5, keep="int4")
    with pytest.raises(InputError, match="3 columns"):
        ops.linear_gelu(x, torch.randn(3, 8), bits=6)
