"""Everything that needs a GPU, in one call of minutes: python benchmarks/gpu_check.py --results FOLDER [--only STAGE ...]

Builds csrc; runs the GPU tests; runs every benchmark once in many processes, so that what they compile lies on the disk before
anything is timed; then compute-sanitizer over a few small tests, the benchmarks' short grid, the memory profile, and a tuning of
two kernels, whose table in FOLDER/tuned a person may commit to kernels/tuned.

FOLDER gets gpu-check.json (what passed, with the ends of the logs), gpu-check.log, report.md with its roofline, and the rows and
the profile that benchmarks/report.py reads: eight files at most. A stage that fails or outlives its limit does not stop the next
(a benchmark or tuning run that is ended keeps its rows); the exit code says whether all passed. PTV2_COMMIT names the commit
where there is no git.
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
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--require-gpu"]
BENCHES = ("prefix_attention", "rows", "linear", "scaling", "disentangled_attention", "deberta_step")    # beside train_step
HELPS = ("compile",)                     # stages that only spare others time: they may fail
TOTAL = 465.0                            # seconds of all stages; ending the last one and the report take the rest of 480
TOOLS = ("memcheck", "racecheck", "initcheck")
SMALL = [f"tests/gpu/test_kernels_on_gpu.py::test_{name}" for name in (
    "row_ops[333-1024-0.1-dtype0]", "gelu[none-dtype0]", "attention_dropout[lengths0-16-dtype0]",
    "disentangled_attention[20-0-64-dtype2]", "dequantise[77-320-nf4-dtype0]")]
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


def sharded(command: list[str], log: Path, limit: float, **variables: str) -> int:
    """pytest dealt out to as many processes as there are CPUs but one; 0, or the exit code of one that failed."""
    shards = max(1, min(15, (os.cpu_count() or 2) - 1))
    commands = {str(i): [*command, "--shard", f"{i}/{shards}"] for i in range(shards)}
    return failure(together(commands, log, limit, **variables))


def failure(codes: list[int]) -> int:
    """0, or the first exit code that is not success; those of signals are negative. 5: a shard without tests."""
    return next((code for code in codes if code not in (0, 5)), 0)


def sanitizers(log: Path, limit: float) -> int:
    """compute-sanitizer's tools at the same time: most of their minute is torch's start under instrumentation."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).exists():
        log.write_text("compute-sanitizer is not installed")
        return 127
    commands = {tool: [found, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *PYTEST, *SMALL]
                for tool in TOOLS}
    # torch's cached blocks would hide what is written behind a tensor's end
    return failure(together(commands, log, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))


def stages(results: Path) -> dict[str, tuple[Any, float]]:
    """Name -> (what runs it, given a log and a limit; the limit in seconds), in order of weight. Together they get TOTAL."""
    bench, files = [*PYTEST, "-s", "--benchmark-only"], [f"benchmarks/bench_{name}.py" for name in BENCHES]
    train = ["-k", "not compiled", "benchmarks/bench_train_step.py"]
    kept = ["--results", str(results)]
    profile = [sys.executable, "benchmarks/memory_profile.py", *kept, "measure", "--frozen", "int8", "--stream", "none",
               "--memory", "minimal", "exact", "--rounds", "2", "--no-peers"]
    tune = [sys.executable, "-m", "ptv2_engine.cli", "tune", "--kernels", "forward", "dkdv", "--shapes",
            "S128-P16-D64-bf16-dropout", "--output", str(results / "tuned")]
    built = {"PTV2_BUILD_NATIVE": "1", "PTV2_BUILD_CUDA": "1"}             # else a failure is a warning
    return {
        "build": (lambda log, limit: run([sys.executable, "setup.py", "build_ext", "--inplace"], log, limit, **built), 70),
        "tests": (lambda log, limit: sharded([*PYTEST, "tests/gpu"], log, limit), 95),
        # not what tunes by timing, as it would time beside others
        "compile": (lambda log, limit: sharded([*bench, "--once", *files, "benchmarks/bench_train_step.py", "-k",
                                                "not compiled and not GLM and not overhead"], log, limit,
                                               TORCHINDUCTOR_COMPILE_THREADS="2"), 60),
        "sanitizer": (sanitizers, 50),
        "train_step": (lambda log, limit: run([*bench, *kept, *train], log, limit), 80),
        "kernels": (lambda log, limit: run([*bench, *kept, *files], log, limit), 80),
        "autotuned": (lambda log, limit: run([*bench, *kept, "benchmarks/bench_autotuned.py"], log, limit), 80),
        "memory": (lambda log, limit: run(profile, log, limit), 40),
        "tune": (lambda log, limit: run(tune, log, limit), 40),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", nargs="+", choices=list(stages(Path())), help="some of the stages")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device, so there is nothing to check; run it on a machine with a GPU.")
        return 2
    if missing := [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]:
        print(f"gpu_check: {', '.join(missing)} is not installed for {sys.executable}; pip install pytest pytest-benchmark.")
        return 2
    from benchmarks.measure import commit

    results, started = args.results.resolve(), time.time()
    results.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"what": "gpu-check", "device": torch.cuda.get_device_name(), "torch": torch.__version__,
                              "date": datetime.date.today().isoformat(), "commit": commit(), "command": " ".join(sys.argv)}

    def keep(found: dict[str, Any]) -> None:
        record["stages"] = found
        (results / "gpu-check.json").write_text(json.dumps(record, indent=1) + "\n")

    chosen = {name: stage for name, stage in stages(results).items() if name in (args.only or (name,))}
    with tempfile.TemporaryDirectory() as scratch:
        found, logs = run_stages(chosen, Path(scratch), keep=keep)
    (results / "gpu-check.log").write_text(logs)
    reported = report(record, results, started)
    return 0 if reported and all(stage["exit_code"] == 0 for name, stage in found.items() if name not in HELPS) else 1


def run_stages(chosen: dict[str, tuple[Any, float]], scratch: Path, total: float = TOTAL,
               keep: Any = lambda found: None) -> tuple[dict[str, Any], str]:
    """What became of each stage, and their logs, of long ones the end. total: seconds for all; what others left, a stage gets.
    keep: called with what is known behind each stage."""
    found: dict[str, Any] = {}
    logs, end = [], time.perf_counter() + total
    for name, (stage, limit) in chosen.items():
        started, log = time.perf_counter(), scratch / f"{name}.log"
        limit = min(limit, round(end - started))
        code = stage(log, limit) if limit > 0 else 124
        text = log.read_text(errors="replace") if log.is_file() else "" if limit > 0 else "no time was left"
        lines = text.strip().splitlines()
        found[name] = {"exit_code": code, "seconds": round(time.perf_counter() - started, 1), "limit": limit,
                       "last_line": "".join(lines[-1:])[-200:], "log_end": [] if code == 0 else lines[-40:]}
        keep(found)
        logs.append(f"==== {name}\n{text[-200_000:]}")
        print(f"{name}: {outcome(code)} in {found[name]['seconds']} s  {found[name]['last_line']}", flush=True)
    return found, "\n".join(logs)


def outcome(code: int) -> str:
    return "passed" if code == 0 else "ended by its limit" if code == 124 else f"failed ({code})"


def report(record: dict[str, Any], results: Path, started: float) -> bool:
    """report.md: the stages, and the tables of the rows that this run wrote. Whether it could be made."""
    said = ", ".join(record[key] for key in ("device", "date")) + f", commit {record['commit']}, torch {record['torch']}"
    lines = [f"{said}; `{record['command']}`", "", "| stage | | seconds | limit | last line |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {outcome(stage['exit_code'])} | {stage['seconds']} | {stage['limit']} | {stage['last_line']} |"
              for name, stage in record["stages"].items()]
    rows = [file for file in results.glob("*/20*.json") if file.stat().st_mtime >= started]
    code = 0
    if rows:
        command = [sys.executable, "benchmarks/report.py", "show", *map(str, rows), "--output", str(results)]
        code = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL).returncode
    file = results / "report.md"
    made = file.read_text() if rows and code == 0 else ""
    file.write_text("\n".join(lines) + "\n\n" + made)
    return code == 0


if __name__ == "__main__":
    sys.exit(main())
