"""add_norm's kernels against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import check_add_norm
from ptv2_engine.kernels.tuning import choose_rows


# H: a power of two, one above, far below a tile; T: none, one, a part of a tile of rows, more than one tile.
@pytest.mark.parametrize("T, H", [(0, 64), (1, 1), (3, 100), (5, 768), (17, 64), (7, 1025)])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("with_sum", [False, True])
def test_add_norm(T, H, p, with_sum):
    check_add_norm(T, H, torch.float32, p, with_sum=with_sum)


@pytest.mark.parametrize("T, H", [(5, 100), (2, 4096)])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("with_sum", [False, True])
def test_add_norm_fp16(T, H, p, with_sum):
    check_add_norm(T, H, torch.float16, p, with_sum=with_sum)


def test_rows_wider_than_4096():
    check_add_norm(2, 5120, torch.float32, 0.1)


def test_a_tile_fits_any_width():
    for width in (1, 16, 64, 768, 1024, 4096, 8192):
        config = choose_rows(width)
        assert config.block >= width and config.rows >= 1
        assert 1 <= config.warps <= 16 and config.why
