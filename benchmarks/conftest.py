"""The benchmarks' options, and `compare`, which measures a case, prints its line and keeps its row for the JSON.

pytest-benchmark runs the cases and shows our side; ratios come from timing.side_by_side, which takes turns.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attention_peers import forget_compiled
from benchmarks.measure import commit, cpu_name, limits
from ptv2_engine import __version__
from ptv2_engine.timing import Functions, side_by_side, summary

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_rows: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", default=None, help="folder for <device>/<date>-<commit>.json (default: print only)")
    parser.addoption("--rounds", type=int, default=None, help="interleaved rounds a case (default: by the case)")
    parser.addoption("--grid", choices=["short", "full"], default="short", help="how many shapes (short: minutes)")
    parser.addoption("--require-gpu", action="store_true", help="fail when no CUDA device is there")
    parser.addoption("--once", action="store_true", help="one round of each case: what has to be compiled is on the disk then")
    parser.addoption("--shard", default=None, help="i/n: every n-th case from the i-th on, for n processes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    if config.getoption("--require-gpu") and not torch.cuda.is_available():
        raise pytest.UsageError("--require-gpu: torch sees no CUDA device")


@pytest.hookimpl(trylast=True)                              # of those that -m and -k left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--grid") == "short" and (larger := [item for item in items if "full" in item.keywords]):
        config.hook.pytest_deselected(items=larger)
        items[:] = [item for item in items if "full" not in item.keywords]
    if shard := config.getoption("--shard"):
        first, count = map(int, shard.split("/"))
        items[:] = items[first::count]
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _room_for_the_next() -> Iterator[None]:
    """A case leaves nothing on the GPU, and no compiled variants that count against the next one's."""
    yield
    if torch.cuda.is_available():
        forget_compiled()
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., dict[str, dict[str, float]]]:
    """compare(case, {"ptv2": f, "peer": g}, **facts): interleave, print a line, keep the row, let pytest-benchmark run ours."""

    def run(case: str, functions: Functions, rounds: int = 10, warmup: int = 2, device: str = "cpu", capture: bool = False,
            skipped: dict[str, str] | None = None, **facts: Any) -> dict[str, dict[str, float]]:
        rounds = request.config.getoption("--rounds") or rounds
        if request.config.getoption("--once"):
            rounds, warmup = 1, 0
        times, eager = side_by_side(functions, device, rounds, warmup, capture)
        found, ours = summary(times), next(iter(functions))
        seconds, low, high = (found[ours][key] for key in ("median_s", "p20_s", "p80_s"))
        line, limit = [f"{case} | {ours} {1000 * seconds:.3f} ms ({1000 * low:.3f} to {1000 * high:.3f})"], limits(device)
        rate = limit["matmul_flops_per_s"].get(DTYPES.get(facts.get("dtype", ""), ""), torch.inf)
        floors = {"bytes": facts.get("bytes", 0) / limit["copy_bytes_per_s"], "flops": facts.get("flops", 0) / rate}
        if max(floors.values()):
            facts["of_limit"], facts["limited_by"] = max(floors.values()) / seconds, max(floors, key=floors.__getitem__)
            line.append(f"{100 * facts['of_limit']:.0f} % of the machine's {facts['limited_by']}")
        if "tokens" in facts:
            facts["tokens_per_s"] = facts["tokens"] / seconds
            line.append(f"{facts['tokens_per_s']:.0f} tokens/s")
        line += [f"{name} {values['times_ours']:.2f}x" for name, values in found.items() if name != ours]
        line += [f"{name} skipped ({reason})" for name, reason in (skipped or {}).items()]
        print("\n" + " | ".join(line), file=sys.stderr)
        facts |= ({"skipped": skipped} if skipped else {}) | ({"not_captured": eager} if eager else {})
        _rows.append({"case": case, "device": device, "times": found, "rounds": rounds} | facts)
        benchmark.extra_info |= {"case": case} | {f"{n} times ours": v["times_ours"] for n, v in found.items()}
        first = functions[ours]
        benchmark.pedantic(first if callable(first) else first[0], rounds=1, warmup_rounds=0)
        return found

    return run


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-")
    return f"{cpu_name()}-{torch.get_num_threads()}threads".lower().replace(" ", "-")


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
    now = datetime.datetime.now()
    record = {"device": device_name(), "date": now.date().isoformat(), "time": now.isoformat(timespec="seconds"),
              "commit": commit(), "ptv2_engine": __version__,
              "limits": {device: limits(device) for device in sorted({row["device"] for row in _rows})},
              "threads": torch.get_num_threads(), "python": platform.python_version(), "versions": versions,
              "command": os.environ.get("PTV2_BENCH_COMMAND") or " ".join(["pytest", *session.config.invocation_params.args]),
              "rows": _rows}
    target = Path(folder) / record["device"] / f"{record['date']}-{record['commit']}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        old, mine = json.loads(target.read_text()), {row["case"] for row in _rows}
        record["rows"] = [row for row in old["rows"] if row["case"] not in mine] + _rows
        record["limits"] = old.get("limits", {}) | record["limits"]
        record["command"] = "; ".join(dict.fromkeys([*old["command"].split("; "), record["command"]]))
    target.write_text(json.dumps(record, indent=1))
    print(f"\nresults: {target}", file=sys.stderr)
