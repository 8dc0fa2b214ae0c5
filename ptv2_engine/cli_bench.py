"""`ptv2 bench`: the benchmarks of the source tree, and their table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ptv2_engine.errors import ConfigError

FOLDER = Path(__file__).parent.parent / "benchmarks"
OPS = ("prefix_attention", "disentangled_attention", "rows", "linear", "train_step", "deberta_step", "scaling", "autotuned")


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="ptv2 bench", description="Measure the kernels and training steps here beside what else there is: in turns, with "
        "the same function twice (A/A), against this machine's measured copy bandwidth and matrix products.")
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS, help="some of the benchmarks (default: all)")
    parser.add_argument("--grid", choices=["short", "full"], default="short", help="short: minutes; full: every shape, hours")
    parser.add_argument("--results", type=Path, help="folder for <device>/<date>-<commit>.json (default: printed only)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds of a case (default: by the case)")
    args = parser.parse_args(argv)
    if args.rounds is not None and args.rounds < 1:
        raise ConfigError(f"--rounds {args.rounds} is below 1; use 1 or more.")
    check_installed()
    with tempfile.TemporaryDirectory() as scratch:
        results = (args.results or Path(scratch)).resolve()
        command = [sys.executable, "-m", "pytest", "-q", "-s", "--benchmark-only", "--benchmark-columns=median,rounds", "--grid",
                   args.grid, "--results", str(results), *(str(FOLDER / f"bench_{op}.py") for op in args.op)]
        if args.rounds is not None:
            command += ["--rounds", str(args.rounds)]
        environment = os.environ | {"PTV2_BENCH_COMMAND": " ".join(["ptv2 bench", *argv])}
        code = subprocess.run(command, cwd=FOLDER.parent, env=environment, check=False).returncode    # imported from there too
        written = sorted(results.glob("*/20*.json"), key=lambda file: file.stat().st_mtime)
        if written:
            print(_report(json.loads(written[-1].read_text())))
    if code:
        raise SystemExit(code)


def check_installed() -> None:
    """Raises ConfigError where the benchmarks or what they need are not there."""
    if not (FOLDER / "bench_train_step.py").is_file():
        raise ConfigError(f"the benchmarks are not beside this installation ({FOLDER}); run ptv2 bench from a checkout of the "
                          "sources (pip install -e '.[test]').")
    try:
        import pytest_benchmark  # noqa: F401
    except ImportError:
        raise ConfigError("ptv2 bench needs pytest-benchmark, which is not installed; pip install -e '.[test]'.") from None


def _report(record: dict) -> str:
    sys.path.insert(0, str(FOLDER.parent))
    from benchmarks.report import table

    return table(record)
