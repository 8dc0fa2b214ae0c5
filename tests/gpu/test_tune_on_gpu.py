"""ptv2 tune on a CUDA device: a table is measured, written and used."""

from __future__ import annotations

import json

import pytest
import torch
from kernel_checks import Attention, check_attention
from ptv2_engine.kernels import tile_table, tuning

from ptv2_engine import cli

pytestmark = pytest.mark.gpu


@pytest.fixture
def forget():
    """Tables and plans are made anew behind the test too."""
    def forgotten() -> None:
        tile_table.table.cache_clear()
        with tuning.forced({}):
            pass

    yield forgotten
    forgotten()


def test_a_table_is_measured_and_used(tmp_path, monkeypatch, forget, capsys):
    shape = "S128-P32-D64-bf16"
    assert cli.main(["tune", "--kernels", "sweep", "--shapes", shape, "--jobs", "4", "--output", str(tmp_path)]) == 0
    path = tmp_path / tile_table.file_name(torch.cuda.get_device_name())
    row, = json.loads(path.read_text())["kernels"]["sweep"]
    assert row["shape"] == shape and 1 < row["us"] <= row["heuristic_us"] < 1e5 and 0.5 < row["a_a"] < 2
    assert f"sweep, {shape}: the heuristic's" in capsys.readouterr().out
    # whatever was faster, tiles of a table are used, and compute the same
    row |= {"tiles": {"block_m": 16, "block_n": 128, "block_p": 32, "warps": 8, "stages": 1, "registers": None}}
    record = json.loads(path.read_text()) | {"kernels": {"sweep": [row]}}
    path.write_text(json.dumps(record))
    monkeypatch.setenv("PTV2_TUNING", str(tmp_path))
    forget()
    assert tuning.choose(128, 32, 64, 2, 2, 228).sweep.block_m == 16
    check_attention(Attention((128, 100), 32, D=64, dtype=torch.bfloat16))
