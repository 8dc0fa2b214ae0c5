"""`ptv2 ablate`: a grid of training runs, each a process of its own, and what they say: results.json, table.md, figures.

    OUTPUT/results.json, table.md          written again after every run, so an interrupted grid has them too
    OUTPUT/{depth,length,...}.png          at the end
    OUTPUT/cells/<cell>/seed-<n>/          what ptv2 train wrote, with ablate.json (the settings), train.out and train.err
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptv2_engine.ablate_figures import better
from ptv2_engine.ablate_grid import Cell, Grid, check_data, parse, parser
from ptv2_engine.adapter import replace_file
from ptv2_engine.errors import ConfigError, RunFailed
from ptv2_engine.tasks.data import SUFFIXES
from ptv2_engine.trainer import check_writable

TRAIN = [sys.executable, "-m", "ptv2_engine.cli", "train"]
SETTINGS, RESULTS = "ablate.json", "results.json"


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

    def train(self, environment: dict[str, str], started: Callable[[subprocess.Popen[bytes]], None]) -> None:
        """Run ptv2 train and wait for it; a failure becomes `error`."""
        check_writable(self.folder)
        (self.folder / RESULTS).unlink(missing_ok=True)                 # of other settings: not this run's, should it fail
        settings = {"hash": self.cell.settings_hash(self.seed), "seed": self.seed, "flags": self.cell.flags}
        replace_file(self.folder / SETTINGS, json.dumps(settings, indent=2).encode())
        begin = time.perf_counter()
        with open(self.folder / "train.out", "wb") as out, open(self.folder / "train.err", "wb") as err:
            process = subprocess.Popen([*TRAIN, *self.cell.words(self.seed, self.folder)], stdout=out, stderr=err,
                                       stdin=subprocess.DEVNULL, env=environment)
            started(process)
            code = process.wait()
        if code == 0 and (found := read_json(self.folder / RESULTS)):
            self.results = {"seconds": time.perf_counter() - begin} | found
        elif code == 0:
            self.error = f"it wrote no {RESULTS}"
        elif code < 0:                                                  # what it printed last has nothing to do with that
            self.error = f"it was ended by {signal.Signals(-code).name}"
        else:
            lines = (self.folder / "train.err").read_text(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
            self.error = last.removeprefix("ptv2: ") or f"exit code {code}"


def read_json(file: Path) -> dict[str, Any]:
    """The object a JSON file holds; {} where the file is absent, half written or something else."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def find_runs(grid: Grid) -> list[Run]:
    """One a cell and seed, with its results where an earlier call finished it.

    Finished runs are known by their settings, wherever they lie in the output folder: a grid that gets more values, another flag
    or another order of --vary takes up those that it shares.
    """
    done: dict[str, tuple[Path, dict[str, Any]]] = {}
    for file in sorted(grid.output_dir.glob(f"cells/*/seed-*/{SETTINGS}")):
        if results := read_json(file.parent / RESULTS):
            done[str(read_json(file).get("hash"))] = (file.parent, results)
    runs = []
    for cell in grid.cells:
        for seed in grid.seeds:
            one = Run(cell, seed, grid.output_dir / "cells" / cell.name / f"seed-{seed}")
            if (there := done.get(cell.settings_hash(seed))) is not None:
                one.folder, one.results = there
            runs.append(one)
    return runs


def refuse_other_settings(waiting: Sequence[Run], output: Path) -> None:
    """Raises ConfigError where a run would be written over a finished one of other settings."""
    taken = [one for one in waiting if read_json(one.folder / RESULTS)]
    if not taken:
        return
    before, now = read_json(taken[0].folder / SETTINGS).get("flags"), taken[0].cell.flags
    differs = f"its {SETTINGS} does not say which"
    if isinstance(before, dict) and before != now:
        shown = [f"--{name} was {_given(before, name)}, and now is {_given(now, name)}"
                 for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        differs = "; ".join(shown[:3]) + ("; ..." if len(shown) > 3 else "")
    raise ConfigError(f"{output} holds finished runs of other settings, {len(taken)} of them in this grid ({taken[0].title}: "
                      f"{differs}); give another --output_dir to keep them, or --overwrite_output_dir to train them again.")


def _given(flags: dict[str, Any], name: str) -> str:
    return shlex.join(map(str, flags[name])) or "on" if name in flags else "not given"


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
    runs = find_runs(grid)
    waiting = [one for one in runs if one.results is None]
    if not grid.overwrite:
        refuse_other_settings(waiting, grid.output_dir)
    for one in runs:
        if one.results is not None:
            score(one.results, grid.metric, grid.at)                    # raises where it lacks what is asked for
    if grid.dry_run:
        for one in runs:
            done = "# done: " if one.results is not None else ""
            print(f"{done}ptv2 train {shlex.join(one.cell.words(one.seed, one.folder))}")
        print(f"# {len(grid.cells)} cells x {len(grid.seeds)} seeds = {len(runs)} runs, {len(runs) - len(waiting)} done")
        return
    check_data(grid, (one.cell for one in waiting))
    check_writable(grid.output_dir)
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already", file=sys.stderr)
    if waiting:
        print(f"{len(waiting)} runs to go, {grid.jobs} at a time; {grid.output_dir / 'cells'} has a folder for each, with what "
              "it prints in train.out and train.err", file=sys.stderr, flush=True)
    _train_all(waiting, grid, runs)
    rows = report(grid, runs)
    draw(grid, rows)
    print((grid.output_dir / "table.md").read_text(), end="")
    failed = sorted((one for one in runs if one.error), key=lambda one: one.results is not None)
    if failed:
        way = ("give the same command again to repeat only those" if failed[0].results is None else
               "it finished, and only its score is missing")
        raise RunFailed(f"{len(failed)} of {len(runs)} runs failed ({failed[0].title}: {failed[0].error}); see train.err in "
                        f"{failed[0].folder}; {way}.")


def _train_all(waiting: list[Run], grid: Grid, runs: list[Run]) -> None:
    """Train grid.jobs at a time. An interrupt or SIGTERM ends the runs that go on; those that are done stay done."""
    root = str(Path(__file__).resolve().parents[1])                     # the same package, wherever the command is given
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    if grid.jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // grid.jobs, 1)))
    processes: list[subprocess.Popen[bytes]] = []
    ending = threading.Event()

    def started(process: subprocess.Popen[bytes]) -> None:
        processes.append(process)
        if ending.is_set():                                             # it was being started when the others were ended
            process.terminate()

    main = threading.current_thread() is threading.main_thread()        # elsewhere there are no signal handlers
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    pool = ThreadPoolExecutor(grid.jobs)
    try:
        futures = {pool.submit(one.train, environment, started): one for one in waiting}
        for number, future in enumerate(as_completed(futures), start=len(runs) - len(waiting) + 1):
            future.result()
            one = futures[future]
            report(grid, runs)
            what = f"failed: {one.error}" if one.results is None else _said(one, grid)
            print(f"[{number}/{len(runs)}] {one.title}: {what}", file=sys.stderr, flush=True)
    except BaseException:
        ending.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(processes):
            process.terminate()
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
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


def table(grid: Grid, rows: list[Row], metric: str, failed: list[Run]) -> str:
    """Markdown: a row a cell, the best mean in bold."""
    where = {"best": "best epoch on validation data", "last": "last epoch, validation data", "test": "test data"}[grid.at]
    columns = list(dict.fromkeys(flag for row in rows for flag in row.cell.varied))
    best = better(metric)((row.mean for row in rows if row.mean is not None), default=None)
    base = {flag: words for flag, words in grid.base.items() if not all(flag in row.cell.varied for row in rows)}
    lines = [f"`{shlex.join(['ptv2', 'train', *(w for n, v in base.items() for w in (f'--{n}', *v))])}`, "
             f"seeds {', '.join(map(str, grid.seeds))}; {metric}: {where}; std: sample standard deviation over n seeds; "
             "time: mean of a run.", "",
             "| " + " | ".join([*columns, "trained parameters", metric, "std", "n", "time"]) + " |",
             "|" + "---|" * len(columns) + "---:|" * 5]
    for row in rows:
        mean = "-" if row.mean is None else f"{row.mean:.4f}"
        shown = [row.cell.varied.get(flag, " ".join(row.cell.flags.get(flag, []))) for flag in columns]
        cells = [*(" ".join(value.split()).replace("|", "\\|") for value in shown),
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

    metric = read_json(grid.output_dir / RESULTS)["metric"]
    points = [ablate_figures.Point(row.cell.varied, row.mean, row.std) for row in rows if row.mean is not None]
    where = {"best": "validation data, best epoch", "last": "validation data, last epoch", "test": "test data"}[grid.at]
    try:
        drawn = ablate_figures.draw(grid.output_dir, points, metric, grid.figures, of=_trained_on(grid), where=where)
    except ImportError:
        print("no figures: matplotlib is not installed; pip install 'ptv2_engine[train]', then give the same command again.",
              file=sys.stderr)
        return
    for file in drawn:
        print(f"drawn: {file}", file=sys.stderr)
    for name in sorted(set(grid.figures) - {"auto"} - {file.stem for file in drawn}):
        print(f"not drawn: {name}.png needs finished cells with two values on its axis", file=sys.stderr)


def _trained_on(grid: Grid) -> str:
    """Data set and backbone for the figures' titles, where all cells have the same: "rte, roberta-large"."""
    names = ({tuple(cell.flags.get("dataset_name") or cell.flags.get("train_file", [])) for cell in grid.cells},
             {tuple(cell.flags.get("model_name_or_path", [])) for cell in grid.cells})
    return ", ".join(_short(Path(next(iter(found))[0])) for found in names if len(found) == 1 and all(found))


def _short(path: Path) -> str:
    """A file's stem, but its folder for one that is called train."""
    if path.suffix.lower() not in SUFFIXES:
        return path.name
    return path.parent.name if path.stem == "train" and path.parent.name else path.stem
