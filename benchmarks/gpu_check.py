"""Everything that needs a GPU, in one call of minutes: python benchmarks/gpu_check.py --results FOLDER [--only STAGE ...]

Builds csrc, runs the GPU tests (in shards: compiling kernels takes the CPUs), compute-sanitizer over a few small ones, the short
grid of the benchmarks, the memory profile and a tuning of two kernels, whose table in FOLDER/tuned a person may commit to
kernels/tuned, and writes gpu-check.json and the report with its roofline into FOLDER. A stage that fails or outlives its limit
does not stop the next (a benchmark or tuning run that is ended keeps its rows); the exit code says whether all passed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--require-gpu"]
BENCHES = ("prefix_attention", "rows", "linear", "scaling", "disentangled_attention", "deberta_step")         # beside train_step
TOOLS = ("memcheck", "racecheck", "initcheck")
SMALL = [f"tests/gpu/test_kernels_on_gpu.py::test_{name}" for name in (
    "row_ops[333-1024-0.1-dtype0]", "gelu[none-dtype0]", "attention_dropout[lengths0-16-dtype0]",
    "disentangled_attention[20-0-64-dtype0]", "dequantise[77-320-nf4-dtype0]")]
SMALL += [f"tests/gpu/test_cuda_on_gpu.py::test_{name}" for name in ("dropout[lengths0-16-dtype0]", "long_rows[case0]")]


def run(command: list[str], log: Path, limit: float, **variables: str) -> int:
    """The exit code, or 124 where the command outlived its limit; its output goes to the log. variables: of its environment."""
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=os.environ | variables,
                                   start_new_session=True)
        for end, patience in ((signal.SIGINT, limit), (signal.SIGKILL, 15)):         # at the first, pytest still writes its rows
            try:
                code = process.wait(patience)
                return code if end == signal.SIGINT else 124
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, end)
        process.wait()
        return 124


def together(commands: dict[str, list[str]], log: Path, limit: float, **variables: str) -> list[int]:
    """The exit codes of commands that run at the same time, each with a log of its own, whose ends go to the stage's."""
    logs = [log.with_suffix(f".{name}.log") for name in commands]
    with ThreadPoolExecutor(len(commands)) as pool:
        codes = list(pool.map(lambda command, own: run(command, own, limit, **variables), commands.values(), logs))
    ends = [f"== {name}: exit code {code}\n{own.read_text(errors='replace')[-2000:]}"
            for name, code, own in zip(commands, codes, logs, strict=True)]
    log.write_text("\n".join(ends))
    return codes


def sharded(log: Path, limit: float) -> int:
    """The GPU tests dealt out to processes; the worst exit code (5, a shard without tests, is fine)."""
    shards = max(1, min(8, (os.cpu_count() or 2) - 2))
    codes = together({str(i): [*PYTEST, "tests", "--shard", f"{i}/{shards}"] for i in range(shards)}, log, limit)
    return max((code for code in codes if code != 5), default=0)


def sanitizers(log: Path, limit: float) -> int:
    """compute-sanitizer's tools at the same time: most of their minute is torch's start under instrumentation."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).exists():
        log.write_text("compute-sanitizer is not installed")
        return 127
    commands = {tool: [found, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *PYTEST, *SMALL]
                for tool in TOOLS}
    # torch's cached blocks would hide what is written behind a tensor's end
    return max(together(commands, log, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))


def stages(results: Path) -> dict[str, tuple[Any, float]]:
    """Name -> (what runs it, given a log and a limit; the limit in seconds). Together at most eight minutes."""
    bench = [*PYTEST, "-s", "--benchmark-only", "--results", str(results)]
    kernels = [*bench, *(f"benchmarks/bench_{name}.py" for name in BENCHES)]
    profile = [sys.executable, "benchmarks/memory_profile.py", "--results", str(results), "measure", "--memory", "exact",
               "minimal", "--rounds", "2"]
    tune = [sys.executable, "-m", "ptv2_engine.cli", "tune", "--kernels", "forward", "dkdv", "--shapes",
            "S128-P16-D64-bf16-dropout", "--output", str(results / "tuned")]
    return {
        "build": (lambda log, limit: run([sys.executable, "setup.py", "build_ext", "--inplace"], log, limit), 60),
        "tests": (sharded, 100),
        "sanitizer": (sanitizers, 60),
        "train_step": (lambda log, limit: run([*bench, "-k", "not compiled", "benchmarks/bench_train_step.py"], log, limit), 100),
        "kernels": (lambda log, limit: run(kernels, log, limit), 90),
        "memory": (lambda log, limit: run(profile, log, limit), 35),
        "tune": (lambda log, limit: run(tune, log, limit), 35),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", nargs="+", help="some of the stages")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device, so there is nothing to check; run it on a machine with a GPU.")
        return 2
    if missing := [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]:
        print(f"gpu_check: {', '.join(missing)} is not installed for {sys.executable}; pip install pytest pytest-benchmark.")
        return 2
    results = args.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name, (stage, limit) in stages(results).items():
        if args.only and name not in args.only:
            continue
        started, log = time.perf_counter(), results / f"gpu-check-{name}.log"
        code = stage(log, limit)
        tail = log.read_text(errors="replace").strip().splitlines()[-1:] if log.is_file() else []
        found[name] = {"exit_code": code, "seconds": round(time.perf_counter() - started, 1), "last_line": "".join(tail)[-200:]}
        print(f"{name}: {'passed' if code == 0 else 'ended by its limit' if code == 124 else f'failed ({code})'} in "
              f"{found[name]['seconds']} s  {found[name]['last_line']}", flush=True)
    record = {"what": "gpu-check", "device": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat(),
              "torch": torch.__version__, "command": " ".join(sys.argv), "stages": found}
    (results / "gpu-check.json").write_text(json.dumps(record, indent=1) + "\n")
    rows = sorted(results.glob("*/20*.json"), key=lambda f: f.stat().st_mtime)[-1:]
    if rows:
        report = [sys.executable, "benchmarks/report.py", "show", *map(str, rows), "--output", str(results)]
        subprocess.run(report, cwd=ROOT, check=False)
    return 0 if all(stage["exit_code"] == 0 for stage in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
