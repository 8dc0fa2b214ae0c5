"""`ptv2 ablate`: a grid of training runs, each a process of its own, and what they say: results.json, table.md, figures.

    OUTPUT/results.json, table.md          written again after every run, so an interrupted grid has them too
    OUTPUT/{depth,length,...}.png          at the end
    OUTPUT/cells/<cell>/seed-<n>/          what ptv2 train wrote, with ablate.json (the settings), train.out and train.err
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptv2_engine.ablate_grid import Cell, Grid, parse, parser
from ptv2_engine.adapter import replace_file
from ptv2_engine.errors import ConfigError, RunFailed
from ptv2_engine.trainer import check_writable

TRAIN = [sys.executable, "-m", "ptv2_engine.cli", "train"]
SETTINGS = "ablate.json"


@dataclass
class Run:
    """One seed of one cell. results: its results.json once it is done. error: the last line that a failed one printed."""

    cell: Cell
    seed: int
    folder: Path
    results: dict[str, Any] | None = None
    error: str | None = None

    @property
    def title(self) -> str:
        return f"{self.cell.name}, seed {self.seed}"

    def load(self) -> bool:
        """Take over what an earlier call finished with the same settings."""
        try:
            settings = json.loads((self.folder / SETTINGS).read_text())
            if settings["hash"] == self.cell.settings_hash(self.seed):
                self.results = json.loads((self.folder / "results.json").read_text())
        except (OSError, ValueError, KeyError, TypeError):
            self.results = None
        return self.results is not None

    def train(self, environment: dict[str, str], started: Callable[[subprocess.Popen[bytes]], None]) -> None:
        """Run ptv2 train and wait for it; a failure becomes `error`."""
        check_writable(self.folder)
        (self.folder / "results.json").unlink(missing_ok=True)          # of other settings: not this run's, should it fail
        settings = {"hash": self.cell.settings_hash(self.seed), "seed": self.seed, "flags": self.cell.flags}
        replace_file(self.folder / SETTINGS, json.dumps(settings, indent=2).encode())
        begin = time.perf_counter()
        with open(self.folder / "train.out", "wb") as out, open(self.folder / "train.err", "wb") as err:
            process = subprocess.Popen([*TRAIN, *self.cell.words(self.seed, self.folder)], stdout=out, stderr=err,
                                       stdin=subprocess.DEVNULL, env=environment)
            started(process)
            code = process.wait()
        if code == 0 and self.load():
            assert self.results is not None
            self.results.setdefault("seconds", time.perf_counter() - begin)
            return
        lines = (self.folder / "train.err").read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        self.error = last.removeprefix("ptv2: ") or (f"exit code {code}" if code else "it wrote no results.json")


@dataclass
class Row:
    """A cell over its seeds. values: of the metric, one a finished run. seconds: mean of a run."""

    cell: Cell
    values: list[float] = field(default_factory=list)
    seconds: float | None = None
    trained_parameters: int | None = None

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds (n - 1); None below two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def run(argv: Sequence[str]) -> None:
    """Run what the command line asks for. Raises ConfigError before anything starts, RunFailed at the end where runs failed."""
    argv = list(argv)
    if {"-h", "--help"} & set(argv):
        parser().print_help()
        return
    grid = parse(argv)
    for note in grid.notes:
        print(f"note: {note}", file=sys.stderr)
    runs = [Run(cell, seed, grid.output_dir / "cells" / cell.name / f"seed-{seed}") for cell in grid.cells for seed in grid.seeds]
    waiting = [one for one in runs if not one.load()]
    if grid.dry_run:
        for one in runs:
            done = "# done: " if one.results is not None else ""
            print(f"{done}ptv2 train {shlex.join(one.cell.words(one.seed, one.folder))}")
        print(f"# {len(grid.cells)} cells x {len(grid.seeds)} seeds = {len(runs)} runs, {len(runs) - len(waiting)} done")
        return
    check_writable(grid.output_dir)
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already", file=sys.stderr)
    _train_all(waiting, grid, runs)
    rows = report(grid, runs)
    draw(grid, rows)
    print((grid.output_dir / "table.md").read_text(), end="")
    failed = [one for one in runs if one.error]
    if failed:
        raise RunFailed(f"{len(failed)} of {len(runs)} runs failed ({failed[0].title}: {failed[0].error}); see train.err in "
                        f"{failed[0].folder}, and give the same command again to repeat only those.")


def _train_all(waiting: list[Run], grid: Grid, runs: list[Run]) -> None:
    """Train grid.jobs at a time. Ending this process ends its children; those that are done stay done."""
    root = str(Path(__file__).resolve().parents[1])                     # the same package, wherever the command is given
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    if grid.jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // grid.jobs, 1)))
    processes: list[subprocess.Popen[bytes]] = []
    pool = ThreadPoolExecutor(grid.jobs)
    try:
        futures = {pool.submit(one.train, environment, processes.append): one for one in waiting}
        for number, future in enumerate(as_completed(futures), start=len(runs) - len(waiting) + 1):
            future.result()
            one = futures[future]
            report(grid, runs)
            what = f"failed: {one.error}" if one.results is None else _said(one, grid)
            print(f"[{number}/{len(runs)}] {one.title}: {what}", file=sys.stderr, flush=True)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        raise
    pool.shutdown()


def _said(one: Run, grid: Grid) -> str:
    assert one.results is not None
    try:
        name, value = score(one.results, grid.metric, grid.at)
    except ConfigError as error:
        return str(error)
    return f"{name} {value:.4f} ({one.results.get('seconds', 0.0):.0f} s)"


def score(results: dict[str, Any], metric: str | None, at: str) -> tuple[str, float]:
    """(metric name, value) of one run's results.json. Raises ConfigError where they do not have it."""
    found = results.get({"best": "best_evaluation", "last": "last_evaluation", "test": "test"}[at])
    if at == "best" and not found:
        found = results.get("last_evaluation")
    if not found:
        raise ConfigError("the run was not scored on test data; give --test_file, or another --at." if at == "test" else
                          "the run evaluated nothing; give --validation_file, or --at test.")
    prefix = "test_" if at == "test" else "eval_"
    name = metric or results.get("metric")
    if name is None:
        raise ConfigError("results.json does not say which metric counts; give --metric.")
    name = str(name).removeprefix("eval_").removeprefix("test_")
    value = found.get(prefix + name)
    if not isinstance(value, (int, float)):
        there = ", ".join(k.removeprefix(prefix) for k in found if k.startswith(prefix))
        raise ConfigError(f"--metric {name} is not among what the run measured ({there}); choose one of them.")
    return name, float(value)


def report(grid: Grid, runs: list[Run]) -> list[Row]:
    """Write results.json and table.md of what is done so far."""
    rows, name, entries = [], grid.metric or "metric", []
    for cell in grid.cells:
        row, seconds = Row(cell), []
        for one in (r for r in runs if r.cell is cell):
            entry: dict[str, Any] = {"seed": one.seed, "output_dir": str(one.folder)}
            if one.results is not None:
                try:
                    name, value = score(one.results, grid.metric, grid.at)
                except ConfigError as error:
                    one.error = str(error)
                else:
                    row.values.append(value)
                    entry["value"] = value
                seconds.append(float(one.results.get("seconds", 0.0)))
                row.trained_parameters = one.results.get("trained_parameters", row.trained_parameters)
                entry["results"] = one.results
            if one.error:
                entry["error"] = one.error
            entries.append((cell, entry))
        row.seconds = statistics.fmean(seconds) if seconds else None
        rows.append(row)
    cells = [{"name": row.cell.name, "varied": row.cell.varied, "flags": row.cell.flags, "mean": row.mean, "std": row.std,
              "n": len(row.values), "seconds": row.seconds, "trained_parameters": row.trained_parameters,
              "runs": [entry for cell, entry in entries if cell is row.cell]} for row in rows]
    written = {"metric": name, "at": grid.at, "base": grid.base, "seeds": grid.seeds, "cells": cells}
    replace_file(grid.output_dir / "results.json", json.dumps(written, indent=2).encode())
    replace_file(grid.output_dir / "table.md", table(grid, rows, name, [one for one in runs if one.error]).encode())
    return rows


def better(metric: str) -> Callable[..., Any]:
    return min if metric in ("loss", "mse") else max


def table(grid: Grid, rows: list[Row], metric: str, failed: list[Run]) -> str:
    """Markdown: a row a cell, the best mean in bold."""
    where = {"best": "best epoch on validation data", "last": "last epoch, validation data", "test": "test data"}[grid.at]
    columns = list(dict.fromkeys(flag for row in rows for flag in row.cell.varied))
    best = better(metric)((row.mean for row in rows if row.mean is not None), default=None)
    lines = [f"`{shlex.join(['ptv2', 'train', *(w for n, v in grid.base.items() for w in (f'--{n}', *v))])}`, "
             f"seeds {', '.join(map(str, grid.seeds))}; {metric}: {where}; std: sample standard deviation over n seeds; "
             "time: mean of a run.", "",
             "| " + " | ".join([*columns, "trained parameters", metric, "std", "n", "time"]) + " |",
             "|" + "---|" * len(columns) + "---:|" * 5]
    for row in rows:
        mean = "-" if row.mean is None else f"{row.mean:.4f}"
        cells = [*(row.cell.varied.get(flag, "").replace("|", "\\|") for flag in columns),
                 "-" if row.trained_parameters is None else f"{row.trained_parameters:,}",
                 f"**{mean}**" if row.mean is not None and row.mean == best and len(rows) > 1 else mean,
                 "-" if row.std is None else f"{row.std:.4f}", str(len(row.values)),
                 "-" if row.seconds is None else f"{row.seconds:.0f} s"]
        lines.append("| " + " | ".join(cells) + " |")
    if failed:
        lines += ["", "Failed:", "", *(f"- {one.title}: {one.error}" for one in failed)]
    return "\n".join(lines) + "\n"


def draw(grid: Grid, rows: list[Row]) -> None:
    """The figures of what varied. Without matplotlib there are none, and a line that says so."""
    if "none" in grid.figures or not any(row.values for row in rows):
        return
    from ptv2_engine import ablate_figures

    metric = json.loads((grid.output_dir / "results.json").read_text())["metric"]
    points = [ablate_figures.Point(row.cell.varied, row.mean, row.std) for row in rows if row.mean is not None]
    try:
        for file in ablate_figures.draw(grid.output_dir, points, metric, grid.figures):
            print(f"drawn: {file}", file=sys.stderr)
    except ImportError:
        print("no figures: matplotlib is not installed; pip install 'ptv2_engine[train]', then give the same command again.",
              file=sys.stderr)
