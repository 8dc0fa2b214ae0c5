"""How benchmarks measure: peers interleaved call by call, an A/A row in every table, one JSON row a case.

pytest-benchmark runs the cases and keeps its own statistics of our side; ratios come from `side_by_side`, because one after
the other even the same function against itself comes out up to 1.3 apart.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ptv2_engine import __version__

_rows: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", default=None, help="folder for <device>/<date>-<commit>.json (default: print only)")
    parser.addoption("--rounds", type=int, default=None, help="interleaved rounds a case (default: by the case)")
    parser.addoption("--require-gpu", action="store_true", help="fail when no CUDA device is there")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    if config.getoption("--require-gpu") and not torch.cuda.is_available():
        raise pytest.UsageError("--require-gpu: torch sees no CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def side_by_side(functions: dict[str, Callable[[], Any]], rounds: int = 10, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call of each function, taken in turns; the order turns round every round. The first function also runs as
    "A/A", whose ratio to itself says how far a ratio can be trusted."""
    names = list(functions)
    calls = functions | {"A/A": functions[names[0]]}
    order = [*names, "A/A"]
    times: dict[str, list[float]] = {name: [] for name in order}
    for turn in range(warmup + rounds):
        for name in order if turn % 2 == 0 else reversed(order):
            synchronise()
            started = time.perf_counter()
            calls[name]()
            synchronise()
            if turn >= warmup:
                times[name].append(time.perf_counter() - started)
    return times


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median, 20th and 80th percentile in seconds, and each median as a multiple of the first one's."""
    first = statistics.median(next(iter(times.values())))
    found = {}
    for name, values in times.items():
        ordered = sorted(values)
        median = statistics.median(ordered)
        found[name] = {"median_s": median, "p20_s": ordered[len(ordered) // 5], "p80_s": ordered[-1 - len(ordered) // 5],
                       "times_ours": median / first}
    return found


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., dict[str, dict[str, float]]]:
    """compare(case, {"ptv2": f, "peer": g}, **facts): interleave, print a line, keep the row, let pytest-benchmark run ours."""

    def run(case: str, functions: dict[str, Callable[[], Any]], rounds: int = 10, warmup: int = 2,
            **facts: Any) -> dict[str, dict[str, float]]:
        rounds = request.config.getoption("--rounds") or rounds
        found = summary(side_by_side(functions, rounds, warmup))
        ours = next(iter(functions))
        parts = [f"{case} | {ours} {1000 * found[ours]['median_s']:.2f} ms"]
        if "bytes" in facts:
            facts["gb_per_s"] = facts["bytes"] / found[ours]["median_s"] / 1e9
            parts.append(f"{facts['gb_per_s']:.1f} GB/s")
        if "flops" in facts:
            facts["gflop_per_s"] = facts["flops"] / found[ours]["median_s"] / 1e9
            parts.append(f"{facts['gflop_per_s']:.0f} GFLOP/s")
        if "tokens" in facts:
            facts["tokens_per_s"] = facts["tokens"] / found[ours]["median_s"]
            parts.append(f"{facts['tokens_per_s']:.0f} tokens/s")
        parts += [f"{name} {values['times_ours']:.2f}x" for name, values in found.items() if name != ours]
        print("\n" + " | ".join(parts), file=sys.stderr)
        _rows.append({"case": case, "times": found} | facts)
        benchmark.extra_info |= {"case": case, **facts, **{f"{n} times ours": v["times_ours"] for n, v in found.items()}}
        benchmark.pedantic(functions[ours], rounds=max(rounds // 4, 1), warmup_rounds=0)
        return found

    return run


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-")
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
        platform.machine(),
    )
    return f"{model}-{torch.get_num_threads()}threads".lower().replace(" ", "-")


def _commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True,
                              cwd=Path(__file__).parent)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def pytest_sessionfinish(session: pytest.Session) -> None:
    folder = session.config.getoption("--results")
    if folder is None or not _rows:
        return
    import importlib.metadata as metadata

    versions = {}
    for name in ("torch", "triton", "transformers", "peft"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    record = {"device": device_name(), "date": datetime.date.today().isoformat(), "commit": _commit(), "ptv2_engine": __version__,
              "threads": torch.get_num_threads(), "python": platform.python_version(), "versions": versions,
              "command": " ".join(["pytest", *session.config.invocation_params.args]), "rows": _rows}
    target = Path(folder) / record["device"] / f"{record['date']}-{record['commit']}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        old = json.loads(target.read_text())["rows"]
        mine = {row["case"] for row in _rows}
        record["rows"] = [row for row in old if row["case"] not in mine] + _rows
    target.write_text(json.dumps(record, indent=1))
    print(f"\nresults: {target}", file=sys.stderr)
