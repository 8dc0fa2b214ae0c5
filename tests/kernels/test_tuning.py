"""The choice of tiles: pure Python, says why, follows what the kernels need."""

from __future__ import annotations

from itertools import product

import pytest
from ptv2_engine.kernels.tuning import choose, choose_splits


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_are_what_the_kernels_can_take(itemsize):
    for S, P, D in product((0, 1, 17, 64, 65, 127, 512, 4096), (0, 1, 5, 16, 100, 200), (16, 32, 64, 80, 96, 128)):
        plan = choose(S, P, D, itemsize, 4, 4 * S, dropout=P == 5)
        tiles = [plan.forward, plan.dq, plan.dkdv, plan.prefix] + ([plan.sweep] if plan.sweep else [])
        for tile in tiles:
            sizes = [n for n in (tile.block_m, tile.block_n, tile.block_p) if n]
            assert all(n >= 16 and n & (n - 1) == 0 for n in sizes), tile       # tl.dot's smallest side, and powers of two
            assert (tile.block_p > 0) == (P > 0) or tile is plan.prefix
            assert tile.why
        if plan.sweep:
            assert plan.sweep.block_n >= S and plan.sweep.block_p >= P
        assert plan.why and (not plan.fuse_prefix or plan.sweep)


def test_long_rows_never_take_the_sweep():
    assert choose(1024, 16, 64, 2).sweep is None
    assert choose(64, 16, 64, 2).sweep is not None


@pytest.mark.parametrize("sequences, tiles, programs", [(1, 128, 16), (1, 1, 1), (2048, 1, 16), (4, 8, 16), (3, 2, 5000),
                                                        (0, 0, 1)])
def test_the_prefix_gradient_is_cut_evenly(sequences, tiles, programs):
    groups, query_groups = choose_splits(sequences, tiles, programs)
    assert 1 <= groups <= max(sequences, 1) and 1 <= query_groups <= max(tiles, 1)
    if sequences * tiles * programs >= 528:
        assert groups * query_groups * programs >= 132, "fewer programs than multiprocessors though there is work for them"
