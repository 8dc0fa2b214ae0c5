"""The choice of tiles: pure Python, says why, follows what the kernels need; what was measured comes before the heuristic."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from kernel_checks import Attention, check_attention
from ptv2_engine.kernels import tile_table, tuning
from ptv2_engine.kernels.tuning import (
    PACKED_PROGRAMS,
    choose,
    choose_packed,
    choose_relative,
    choose_rows,
    choose_splits,
    listed_tiles,
)


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


@pytest.mark.parametrize("itemsize", [2, 4])
def test_packed_tiles_are_what_the_kernels_can_take(itemsize):
    for S, P, D, dropout in product((1, 17, 32, 64), (0, 1, 20, 32, 33, 200), (16, 64, 80, 128), (False, True)):
        plan = choose_packed(S, P, D, itemsize, 2048, 2048 * S // 2, 12, dropout)
        sizes = [n for n in (plan.forward.block_m, plan.forward.block_n, plan.forward.block_p) if n]
        assert all(n >= 16 and n & (n - 1) == 0 for n in sizes) and (plan.forward.block_p > 0) == (P > 0)
        assert S <= plan.longest <= 64 and plan.why
        if plan.sweep:
            assert plan.sweep.block_n >= S and plan.sweep.block_p >= P and plan.window in (64, 128)


def test_rows_are_packed_where_most_of_a_tile_would_be_empty():
    def packed(S, sequences, tokens, heads=12):
        return choose_packed(S, 16, 64, 2, sequences, tokens, heads) is not None

    assert packed(64, 64, 64 * 32) and packed(40, 512, 512 * 12)
    assert not packed(65, 64, 64 * 32) and not packed(64, 64, 64 * 33) and not packed(0, 64, 0)
    assert not packed(64, 8, 8 * 20), "so few programs run side by side anyway"


def test_tiles_are_listed_where_lengths_are_far_apart():
    assert listed_tiles(128, 128, 128 * 128, 16, 64) is None, "one length: every tile of the grid is there"
    assert listed_tiles(512, 4, 700, 12, 64) is None, "a launch more than it saves"
    assert listed_tiles(512, 128, 128 * 128, 16, 64) == (128 * 128 + 128 * 63) // 64 + 1
    for lengths in ((1,) * 100, (64,) * 100, (65,) * 100, (63, 129, 0)):
        entries = listed_tiles(10**6, len(lengths), sum(lengths), 16, 64)
        assert sum(-(-n // 64) for n in lengths) < entries, "no entry left for the rows past the last sequence"


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


DEVICE, RUNNING = "NVIDIA H100 80GB HBM3", "3.6.0"
SHAPE = {"itemsize": 2, "head_dim": 64, "tokens": 128, "prompt": 16, "dropout": True}
TILES = {"block_m": 128, "block_n": 64, "block_p": 16, "warps": 8, "stages": 3, "registers": None}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """table(kernel=rows, ...): what is found on an H100 that has this table; returns its folder."""
    def write(device=DEVICE, triton=RUNNING, **kernels):
        for kernel, rows in kernels.items():
            for row in rows if kernel in tile_table.FIELDS else ():
                row.setdefault("sources", tile_table.sources(kernel))
        (tmp_path / tile_table.file_name(DEVICE)).write_text(json.dumps({"device": device, "triton": triton, "kernels": kernels}))
        forget()
        return tmp_path

    def forget():
        tile_table.table.cache_clear()
        with tuning.forced({}):                              # forgets the plans
            pass

    monkeypatch.setattr(tile_table, "FOLDER", tmp_path)
    monkeypatch.setattr(tile_table, "device_name", lambda: DEVICE)
    monkeypatch.setattr(tile_table, "triton_version", lambda: RUNNING)
    monkeypatch.delenv("PTV2_TUNING", raising=False)
    forget()
    yield write
    forget()


def entry(shape=SHAPE, tiles=TILES, **changes):
    return shape | {"tiles": tiles, "us": 40.0, "heuristic_us": 50.0, "a_a": 1.0} | changes


def test_measured_tiles_come_before_the_heuristic_kernel_by_kernel(table):
    heuristic = choose(128, 16, 64, 2, dropout=True)
    table(forward=[entry()], dq=[entry(tiles=None)], rows=[entry({"width": 768}, {"rows": 4, "warps": 8})],
          relative_dkdv=[entry(tiles=TILES | {"block_p": 0})], kernel_of_another_version=[{"anything": 1}])
    for longest in (65, 100, 128):
        plan = choose(longest, 9, 64, 2, dropout=True)
        assert {name: getattr(plan.forward, name) for name in TILES} == TILES
        assert "measured: 40.0 us, 50.0 with the heuristic's tiles" in plan.forward.why
    assert (plan.dq, plan.dkdv, plan.prefix) == (heuristic.dq, heuristic.dkdv, heuristic.prefix)
    for other in ((129, 16, 64, 2), (128, 17, 64, 2), (128, 0, 64, 2), (128, 16, 32, 2), (128, 16, 64, 4)):
        assert "measured" not in choose(*other, dropout=True).forward.why
    assert "measured" not in choose(128, 16, 64, 2).forward.why
    assert (choose_rows(768).rows, choose_rows(768).warps, choose_rows(768).block) == (4, 8, 1024)
    assert "measured" not in choose_rows(1024).why
    relative = choose_relative(128, 16, 64, 2, dropout=True)
    assert relative.dkdv.block_m == 128 and "measured" not in relative.forward.why and relative.prefix == plan.prefix


def test_a_plan_is_looked_up_and_not_made_again(table):
    table(forward=[entry()])
    assert choose(128, 16, 64, 2, 128, 16384, True) is choose(128, 16, 64, 2, 120, 16000, True)
    assert choose_rows(768) is choose_rows(768)


def test_forced_tiles_come_before_both_and_say_what_was_asked_for(table):
    table(forward=[entry()])
    shape = ("forward", (2, 64, 128, 16, 1))
    mine = tuning.TileConfig(16, 16, 16, 1, 1, "mine")
    with tuning.forced({shape: mine}) as asked:
        assert choose(128, 16, 64, 2, dropout=True).forward is mine
    assert asked[shape].why.startswith("a warp keeps 16 whole rows") and len(asked) == 4
    assert "measured" in choose(128, 16, 64, 2, dropout=True).forward.why


@pytest.mark.parametrize("change, reason", [
    ({"triton": "3.5.1"}, "made with Triton 3.5.1, and 3.6.0 runs here"),
    ({"device": "NVIDIA H100 PCIe"}, "made on NVIDIA H100 PCIe"),
    ({"forward": [{"itemsize": 2}]}, "it has no 'head_dim'"),
    ({"forward": [entry(tiles=TILES | {"block_m": 96})]}, "powers of two"),
    ({"dq": [entry(tiles=TILES | {"block_p": 0})]}, "must be 16 or more"),
    ({"dq": [entry(SHAPE | {"prompt": 0})]}, "without a prefix"),
    ({"sweep": [entry(fused=False, tiles=TILES)]}, "holds all keys"),
    ({"rows": [entry({"width": 8}, {"rows": 2})]}, "called rows, warps"),
])
def test_a_table_that_is_not_for_here_is_ignored_in_one_line(table, change, reason, caplog):
    table(**{"forward": [entry()]} | change)
    for _ in range(2):
        assert "measured" not in choose(128, 16, 64, 2, dropout=True).forward.why
    assert len(caplog.records) == 1 and reason in caplog.text and "are ignored" in caplog.text


def test_rows_of_kernels_that_changed_are_ignored_in_one_line(table, caplog):
    table(forward=[entry(sources="other code")], dq=[entry(), entry(SHAPE | {"prompt": 32}, sources="other code")])
    plan = choose(128, 16, 64, 2, dropout=True)
    assert "measured" not in plan.forward.why and "measured" in plan.dq.why
    assert len(caplog.records) == 1 and "kernels have changed since (dq, forward)" in caplog.text


def test_a_kernels_sources_are_its_code_and_that_of_what_it_imports(tmp_path, monkeypatch):
    for path in Path(tile_table.__file__).parent.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(tile_table, "__file__", str(tmp_path / "tile_table.py"))
    found = lambda: {kernel: tile_table.sources.__wrapped__(kernel) for kernel in tile_table.FIELDS}
    before = found()
    for name, old, new, changed in (
            ("philox", "import", "import  # a comment\n", set()), ("tuning", "import", "no code", set()),
            ("prefix_grad", "tl.zeros", "tl.ones", {"forward", "sweep", "prefix", "relative_forward"}),
            ("attention_tile", "tl.exp2", "tl.exp", set(before) - {"rows"}), ("add_norm", "tl.rsqrt", "tl.sqrt", {"rows"})):
        text = (tmp_path / f"{name}.py").read_text()
        assert old in text
        (tmp_path / f"{name}.py").write_text(text.replace(old, new))
        assert {kernel for kernel, code in found().items() if code != before[kernel]} == changed, name
        (tmp_path / f"{name}.py").write_text(text)


def test_the_variable_switches_tables_off_and_names_another_folder(table, monkeypatch, tmp_path_factory, caplog):
    folder = table(forward=[entry()])
    for setting, found in (("off", 0), (str(folder), 1), (str(tmp_path_factory.mktemp("none")), 0)):
        tile_table.table.cache_clear()
        monkeypatch.setenv("PTV2_TUNING", setting)
        assert len(tile_table.table()) == found
    assert len(caplog.records) == 1 and "holds no nvidia-h100-80gb-hbm3.json" in caplog.text


def test_without_a_gpu_no_table_is_asked(monkeypatch):
    tile_table.table.cache_clear()
    monkeypatch.setattr(tile_table, "device_name", lambda: None)
    assert tile_table.table() == {}


def test_tables_in_the_package_are_ones_that_can_be_read():
    for path in tile_table.FOLDER.glob("*.json"):
        record = json.loads(path.read_text())
        assert path.name == tile_table.file_name(record["device"])
        tile_table.read(path, record["device"], record["triton"])


@pytest.mark.parametrize("case", [Attention((17, 40), 5, N=1, dtype=torch.float16, spare_rows=3),
                                  Attention((17, 5, 30, 9), 5, N=1, dtype=torch.float16, packed=True),
                                  Attention((20, 5), 33, N=1, dtype=torch.float16, dropout_p=0.2)])
def test_kernels_compute_the_same_with_other_tiles(case):
    """Each side half of the heuristic's, as a table might say."""
    numbers = (max(case.lengths), case.P, case.D, 2, len(case.lengths), sum(case.lengths))
    with tuning.forced({}) as asked:
        choose(*numbers, case.dropout_p > 0)
        if case.packed:
            choose_packed(*numbers, PACKED_PROGRAMS, case.dropout_p > 0)
    other = {}
    for (kernel, shape), config in asked.items():
        held = kernel.endswith("sweep")                      # all keys of a row
        other[kernel, shape] = replace(config, block_m=max(16, config.block_m // 2), warps=2 * config.warps,
                                       block_n=config.block_n if held else max(16, config.block_n // 2),
                                       block_p=config.block_p if held else 16)
    with tuning.forced(other) as asked:
        check_attention(case)
    assert set(other) <= set(asked) and case.packed == any(kernel == "packed_sweep" for kernel, _ in asked)
