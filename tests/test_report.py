"""Records of several runs, peers of whole steps, and what gpu-check runs under compute-sanitizer."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import conftest as bench_conftest
from benchmarks import gpu_check, models, report
from ptv2_engine import PromptConfig, PromptedModel
from ptv2_engine.testing import tiny_config

TIMES = {name: {"median_s": 2.0, "p20_s": 2.0, "p80_s": 2.0, "times_ours": 1.0} for name in ("ptv2", "A/A")}


def row(case, device="cpu", seconds=2.0, **facts):
    times = copy.deepcopy(TIMES)
    times["ptv2"]["median_s"] = seconds
    return {"case": case, "device": device, "times": times} | facts


def rates(**found):
    return {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": found}


def finish(monkeypatch, folder, command, device, rows):
    """What a benchmark session writes at its end."""
    monkeypatch.setattr(bench_conftest, "_rows", rows)
    monkeypatch.setattr(bench_conftest, "limits", lambda device: rates(float32=1e11))
    config = SimpleNamespace(getoption=lambda name: str(folder), invocation_params=SimpleNamespace(args=[command]))
    bench_conftest.pytest_sessionfinish(SimpleNamespace(config=config))


def test_a_second_run_adds_to_the_first_one_s_record(tmp_path, monkeypatch):
    finish(monkeypatch, tmp_path, "first", "cuda", [row("a", "cuda"), row("b", "cuda")])
    for _ in range(2):                                       # the same command again is named once
        finish(monkeypatch, tmp_path, "second", "cpu", [row("b", seconds=7.0)])
    (file,) = tmp_path.glob("*/20*.json")
    record = json.loads(file.read_text())
    assert [(r["case"], r["times"]["ptv2"]["median_s"]) for r in record["rows"]] == [("a", 2.0), ("b", 7.0)]
    assert record["command"] == "pytest first; pytest second" and set(record["limits"]) == {"cpu", "cuda"}


def test_of_two_records_of_a_day_the_later_one_wins():
    records = [{"date": "2026-01-02", "time": f"2026-01-02T{hour}:00:00", "rows": [row("a", seconds=int(hour))]}
               for hour in ("11", "12", "10")]
    (kept,) = report.newest([{"date": "2026-01-02", "rows": [row("a", seconds=99)]}, *records])
    assert kept["rows"][0]["times"]["ptv2"]["median_s"] == 12


def test_steps_are_set_against_the_products_of_their_own_dtype():
    step = row("train step  X", op="train_step", tokens_per_s=1000.0, matrix_parameters=10**7, dtype="fp32",
               peak_memory_bytes={"ptv2": 2**30, "PEFT padded": 3 * 2**30})
    record = {"device": "box", "date": "2026-01-02", "commit": "a", "versions": {}, "command": "pytest",
              "limits": {"cpu": rates(float32=1e11, bfloat16=4e11)}, "rows": [step]}
    assert "1,000 tokens/s, 40% of matmul, peak GiB: ptv2 1.0, PEFT padded 3.0" in report.table(record)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_peers_of_a_step_compute_our_loss_before_they_are_timed(family):
    base = models.stock_model(tiny_config(family).to_dict(), torch.float32, "cpu")
    ours = PromptedModel.from_pretrained(base, num_labels=2, prompt=PromptConfig(4)).train()
    packed, padded = models.batch_of([7, 12, 3], 1010)
    for batch in (packed, padded):
        batch["input_ids"] %= 90
    models.peft_step(base, ours, packed, padded)()           # a whole step of theirs
    models.flex_step(ours, packed, compiled=False)           # torch has no backward of flex_attention on the CPU
    assert ours.training
    other = copy.deepcopy(base)
    with torch.no_grad():
        for layer in getattr(other, family).encoder.layer:
            layer.output.dense.weight.mul_(-30)
    with pytest.raises(AssertionError, match="the peer's loss is"):
        models.peft_step(other, ours, packed, padded)


def test_what_runs_under_compute_sanitizer_exists():
    done = subprocess.run([*gpu_check.PYTEST[:3], "-q", "-m", "gpu", "--collect-only", *gpu_check.SMALL], cwd=gpu_check.ROOT,
                          capture_output=True, text=True, check=False)
    assert f"{len(gpu_check.SMALL)} tests collected" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
