"""ptv2 tune: what is tried, what is left out, what wins, what the table says; one dry run and one run on a fake GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from ptv2_engine.kernels import tile_table
from ptv2_engine.kernels.tuning import TileConfig, choose, choose_rows

from ptv2_engine import cli, tune, tune_cases
from ptv2_engine.tune_candidates import Candidate, Compiler, Target, by_promise, candidates, dropped_for, label, resident_warps

ROOT = Path(__file__).parent.parent
SHAPE = tune_cases.named("S128-P16-D64-bf16-dropout")
VALUES = (2, 64, 128, 16, 1)


def target(kernel: str = "forward") -> Target:
    plan = choose(128, 16, 64, 2, dropout=True)
    return Target(SHAPE, "forward" if kernel == "forward" else "backward", kernel, VALUES, getattr(plan, kernel))


def test_shapes_have_names():
    for shape in [*tune_cases.short(), *tune_cases.full()]:
        assert tune_cases.named(str(shape)) == shape
    assert len(set(tune_cases.full())) == len(tune_cases.full()) and set(tune_cases.short()) <= set(tune_cases.full())
    lengths = tune_cases.lengths_of(SHAPE)
    assert max(lengths) == 128 and lengths[:4] == [128, 64, 32, 32] and 16384 - 128 < sum(lengths) <= 16384
    assert set(tune_cases.lengths_of(tune_cases.named("S1-P0-D64-bf16"))) == {1}


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv", "prefix"])
def test_candidates_are_near_the_heuristic_and_can_be_launched(kernel):
    near, far = candidates(target(kernel), 1), candidates(target(kernel), 2)
    names = [label(kernel, config) for config in far]
    assert len(names) == len(set(names)) and label(kernel, target(kernel).heuristic) not in names
    assert {label(kernel, config) for config in near} < set(names)
    for config in far:
        tiles = {name: getattr(config, name) for name in tile_table.TILES[kernel]}
        assert tile_table.problem(kernel, target(kernel).fields, tiles) is None
        assert config.block_p <= 16 and config.warps <= 16 and (config.registers or 0) * 32 * config.warps <= 65536


def test_candidates_of_a_sweep_hold_all_keys_and_those_of_rows_whole_rows():
    plan = choose(64, 16, 64, 2, 100, 6400)
    sweep = Target(tune_cases.named("S64-P16-D64-bf16"), "backward", "sweep", (2, 64, 64, 16, 0, 1), plan.sweep)
    assert {(c.block_n, c.block_p) for c in candidates(sweep, 2)} == {(64, 16)}
    rows = Target(tune_cases.named("H768"), "both", "rows", (768,), choose_rows(768))
    assert {c.block for c in candidates(rows, 2)} == {1024}


def test_what_does_not_fit_is_left_out_with_the_reason():
    good = {"stack": 0, "local": 0, "shared": 40960, "registers": 168, "warps": 4}
    assert dropped_for(good, 90) is None
    assert dropped_for(good | {"stack": 8}, 90) == "spills 8 bytes a thread"
    assert "233000 bytes of shared memory" in dropped_for(good | {"shared": 233000}, 90)
    assert dropped_for(good | {"shared": 120000}, 90) is None and dropped_for(good | {"shared": 120000}, 89)
    assert "registers for 512 threads" in dropped_for(good | {"registers": 255, "warps": 16}, 90)


def test_a_compiler_that_dies_takes_nothing_else_along():
    with Compiler(90, 2) as compiler:
        assert compiler.each(eval, [("__import__('os').abort()",), ("2",)]) == [None, 2]


def test_the_most_promising_come_first():
    def made(m, n, warps, registers, shared=20000, dropped=None):
        return Candidate(TileConfig(m, n, 16, warps, 2, ""), registers, shared, dropped)

    few, many, wide, spills = made(64, 64, 4, 255, 200000), made(64, 64, 4, 128), made(128, 64, 8, 168), made(16, 16, 1, 1,
                                                                                                          dropped="spills")
    assert resident_warps(many, 90) == (16, "registers") and resident_warps(few, 90) == (4, "shared memory")
    assert by_promise(target(), [few, spills, many, wide], 90) == [wide, many, few]


HEURISTIC = 100e-6


def contest(medians: dict[str, float], results: dict[str, torch.Tensor] | None = None, a_a: float = 1.0, noise: float = 0.0,
            elsewhere: dict[str, str] | None = None, alone: dict[str, float] | None = None) -> tune.Row:
    """fastest() on configs by name with these medians, and these results where they are not the heuristic's."""
    asked = []

    def prepare(config):
        if config.why == "broken":
            raise RuntimeError("out of resources")
        result = (results or {}).get(config.why, torch.ones(4))
        return [lambda: None], [result, torch.empty(0)]

    def timer(functions):
        asked.append(list(functions))
        given = (alone or medians) if len(asked) > 1 else medians
        center = {label("forward", configs[name]): value for name, value in given.items()}
        of = lambda median: [median * (1 + noise * d) for d in (-1, -1, 0, 1, 1)]
        return {name: of(center.get(name, HEURISTIC)) for name in functions} | {"A/A": of(HEURISTIC * a_a)}

    configs = {name: TileConfig(16 << i, 64, 16, 4, 2, name) for i, name in enumerate(medians)}
    mine = Target(SHAPE, "forward", "forward", VALUES, TileConfig(16, 16, 16, 1, 1, "heuristic"))
    return tune.fastest(mine, list(configs.values()), prepare, timer, lambda config: (elsewhere or {}).get(config.why))


def test_a_faster_candidate_is_picked():
    row = contest({"slow": 120e-6, "best": 80e-6, "good": 90e-6})
    assert row.config.why == "best" and row.seconds == 80e-6 and row.heuristic_seconds == HEURISTIC and not row.notes
    entry = row.entry()
    assert entry["tiles"] == {"block_m": 32, "block_n": 64, "block_p": 16, "warps": 4, "stages": 2, "registers": None}
    assert (entry["us"], entry["heuristic_us"], entry["a_a"], entry["dropout"]) == (80.0, 100.0, 1.0, True)


@pytest.mark.parametrize("median, options", [(0.995, {}), (0.97, {"a_a": 0.96}), (0.97, {"noise": 0.05}), (1.2, {})])
def test_one_within_the_noise_of_the_same_function_is_not(median, options):
    row = contest({"candidate": median * HEURISTIC}, **options)
    assert row.config is None and row.entry()["tiles"] is None and row.seconds == row.heuristic_seconds


@pytest.mark.parametrize("wrong", [torch.tensor([1.0, 1, 1, 1.05]), torch.full((4,), float("nan"))])
def test_one_with_wrong_numbers_is_not_and_the_next_is(wrong):
    row = contest({"wrong": 50e-6, "right": 80e-6}, {"wrong": wrong, "right": torch.tensor([1.0, 1, 1, 1.01])})
    assert row.config.why == "right" and "computes something else: result 0" in row.notes[0]


def test_one_that_fails_or_cannot_be_launched_in_all_calls_or_wins_once_is_not():
    assert contest({"broken": 50e-6, "right": 80e-6}).config.why == "right"
    row = contest({"limited": 50e-6, "right": 80e-6}, elsewhere={"limited": "spills 8 bytes a thread"})
    assert row.config.why == "right" and "in other calls of the class spills" in row.notes[0]
    row = contest({"lucky": 50e-6}, alone={"lucky": 100e-6})
    assert row.config is None and "not alone" in row.notes[0]


def test_a_table_keeps_other_classes_and_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(tile_table, "triton_version", lambda: "3.6.0")
    path = tmp_path / "tables" / tile_table.file_name("NVIDIA H100 PCIe")
    first, second = contest({"best": 80e-6}), contest({"other": 70e-6})
    kept = tune.Row(target("dq"), None, 1e-4, 1e-4, 1.0)
    tune.write(path, "NVIDIA H100 PCIe", "ptv2 tune", [first, kept])
    tune.write(path, "NVIDIA H100 PCIe", "ptv2 tune --kernels forward", [second])
    record = json.loads(path.read_text())
    assert record["command"] == "ptv2 tune; ptv2 tune --kernels forward" and record["torch"] == torch.__version__
    assert [row["us"] for row in record["kernels"]["forward"]] == [70.0] and record["kernels"]["dq"][0]["tiles"] is None
    found = tile_table.read(path, "NVIDIA H100 PCIe", "3.6.0")
    assert list(found) == [("forward", VALUES)] and found["forward", VALUES]["block_m"] == 16
    monkeypatch.setattr(tile_table, "triton_version", lambda: "3.7.0")
    tune.write(path, "NVIDIA H100 PCIe", "ptv2 tune --kernels dq", [kept])
    assert list(json.loads(path.read_text())["kernels"]) == ["dq"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("flags, sentence", [
    ("", "torch sees no CUDA device here; run it on a machine with the GPU"),
    ("--dry-run", "--dry-run needs --arch"),
    ("--kernels forwrd", "--kernels 'forwrd' does not exist; did you mean forward?"),
    ("--shapes S12", "--shapes 'S12' is neither short nor full nor a shape like"),
    ("--shapes S0-P1-D64-bf16", "S and H must be 1 to 16384"),
    ("--shapes S8-P1-D63-bf16", "D one of 16, 32"),
    ("--arch 90", "goes with --dry-run only"),
    ("--dry-run --arch 75", "--arch 75 is unknown; choose one of 80"),
    ("--jobs 0", "--jobs 0 is below 1"),
])
def test_mistakes_are_one_sentence(flags, sentence, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_interpreted_kernels_and_a_folder_that_cannot_be_made_are_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["tune"]) == 2 and "TRITON_INTERPRET=1 is set" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "file").write_text("")
    assert cli.main(["tune", "--output", str(tmp_path / "file" / "folder")]) == 2
    assert "cannot be made: Not a directory" in capsys.readouterr().err


def run_python(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_dry_run_shows_what_would_be_measured():
    out = run_python("-m", "ptv2_engine.cli", "tune", "--kernels", "prefix", "--shapes", "S512-P16-D64-bf16", "--dry-run",
                     "--arch", "90", "--jobs", "1")
    lines = out.splitlines()
    assert lines[0].startswith("Left to measure on sm_90, the most promising first: 8 warps resident")
    assert "prefix, S512-P16-D64-bf16" in lines and any("= 32x16, 1 warps, 1 stages" in line for line in lines)
    assert any(line.startswith("   1 ") for line in lines)
    assert any("left out: spills" in line for line in lines)


FAKE_GPU = """
import json, sys
from pathlib import Path
import torch
from triton.runtime.jit import JITFunction
from ptv2_engine import tune, tune_cases
from ptv2_engine.kernels import tile_table, tuning
from ptv2_engine.tune_candidates import Compiler, label, targets
if __name__ == "__main__":
    names = ("S32-P16-D64-bf16-dropout", "S32-P64-D64-bf16", "S128-P32-D64-bf16", "S128-P32-D128-bf16", "H768",
             "relative-S32-P16-D64-bf16")
    every = {target.kernel for name in names for target in targets(tune_cases.named(name), list(tile_table.FIELDS))}
    assert every == set(tile_table.FIELDS), every
    ran, tune_cases.TOKENS = [], 256
    JITFunction.run = lambda self, *args, grid, warmup, **options: ran.append((self.__name__, options["num_warps"]))
    torch.Tensor.new_empty = torch.Tensor.new_zeros
    shape = tune_cases.named("S32-P16-D64-bf16")

    def timer(functions):
        for sets in functions.values():
            for function in sets:
                function()
        return {name: [1e-4 if "8 warps" not in name else 5e-5] * 3 for name in functions} | {"A/A": [1e-4] * 3}

    found = targets(shape, ["forward"])
    with Compiler(90, 1) as compiler:
        rows = list(tune.tuned(shape, found, 1, compiler, "cpu", timer))
    path = Path(sys.argv[1]) / "table.json"
    tune.write(path, "a GPU", "ptv2 tune", rows)
    (place, tiles), = tile_table.read(path, "a GPU", tile_table.triton_version()).items()
    print(json.dumps({"place": place, "tiles": tiles, "sentence": tune.sentence(rows[0]),
                      "ran": sorted({name for name, _ in ran}), "warps": sorted({warps for _, warps in ran})}))
"""


def test_a_run_from_candidates_to_the_table(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE_GPU)
    found = json.loads(run_python(str(tmp_path / "fake.py"), str(tmp_path)))
    assert found["place"] == ["forward", [2, 64, 32, 16, 0]] and found["tiles"]["warps"] == 8
    assert "forward_kernel" in found["ran"] and {2, 4, 8} <= set(found["warps"])
    assert "8 warps, 2 stages takes 50.00 us, 0.500 of it" in found["sentence"]
