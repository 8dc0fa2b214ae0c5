"""The generator on the device: the reference's words and masks, bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from kernel_checks import DEVICE
from ptv2_engine.kernels.philox import keep_tile, philox_words, threshold_arg

from ptv2_engine.ops import _philox


@triton.jit
def words_kernel(counters_4C, seed_ptr, words_4C, C: tl.constexpr):
    columns = tl.arange(0, C)
    w0, w1, w2, w3 = philox_words(tl.load(counters_4C + columns).to(tl.uint32), tl.load(counters_4C + C + columns).to(tl.uint32),
                                  tl.load(counters_4C + 2 * C + columns).to(tl.uint32),
                                  tl.load(counters_4C + 3 * C + columns).to(tl.uint32), tl.load(seed_ptr))
    tl.store(words_4C + columns, w0.to(tl.int64))
    tl.store(words_4C + C + columns, w1.to(tl.int64))
    tl.store(words_4C + 2 * C + columns, w2.to(tl.int64))
    tl.store(words_4C + 3 * C + columns, w3.to(tl.int64))


@triton.jit(do_not_specialize=["first_row", "first_column", "c2", "c3", "threshold"])
def mask_kernel(keep_RC, seed_ptr, first_row, first_column, c2, c3, threshold, R: tl.constexpr, C: tl.constexpr):
    keep = keep_tile(first_row, first_column, c2, c3, seed_ptr, threshold, R, C)
    tl.store(keep_RC + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :], keep.to(tl.int8))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**62 + 12345, -1])
def test_words_equal_the_reference(seed):
    generator = torch.Generator().manual_seed(3)
    counters = torch.randint(2**32, (4, 16), generator=generator)
    counters[:, :3] = torch.tensor([[0, 1, 2**32 - 1]] * 4)
    words = torch.empty_like(counters).to(DEVICE)
    words_kernel[(1,)](counters.to(DEVICE), torch.tensor([seed], device=DEVICE), words, C=16)
    assert torch.equal(words.cpu().T, _philox.philox_words(*counters, seed))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0 - 2**-33])
@pytest.mark.parametrize("rows, columns", [(16, 16), (32, 128), (1, 4)])
def test_mask_equals_the_reference(p, rows, columns):
    seed = torch.tensor([2**40 + 7], device=DEVICE)
    keep = torch.empty(rows, columns, dtype=torch.int8, device=DEVICE)
    mask_kernel[(1,)](keep, seed, 48, 64, 11, 3 * 8 + 2, threshold_arg(p), R=rows, C=columns)
    exact = _philox.keep_scale(torch.arange(48, 48 + rows), 64 + columns, 11, p=p, seed=seed.cpu(), site=3, stream=2)
    assert torch.equal(keep.cpu() != 0, exact[:, 64:] != 0)


@pytest.mark.parametrize("p", [0.0, 1e-12, 0.1, 0.4999999999, 0.5, 0.999999, 1.0 - 1e-16])
def test_threshold_is_the_reference_s_in_32_bits(p):
    assert threshold_arg(p) % 2**32 == _philox.threshold(p)
    assert -(2**31) <= threshold_arg(p) < 2**31
