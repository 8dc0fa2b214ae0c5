"""Which tiles are faster than the heuristic's, measured, and the table of them (kernels/tile_table.py).

What compiles well (tune_candidates.py) takes turns with the heuristic's tiles (timing.py), and replaces them only where it
computes the same and is faster by more than two rows of the same function differ.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptv2_engine import tune_cases
from ptv2_engine.compiled import Launch, recorded
from ptv2_engine.kernels import tile_table
from ptv2_engine.kernels.tuning import forced
from ptv2_engine.timing import Function, Functions, input_sets, side_by_side, summary
from ptv2_engine.tune_candidates import Compiler, Config, Target, by_promise, candidates, label
from ptv2_engine.tune_cases import LAUNCHES, Call, Shape

Timer = Callable[[Functions], Mapping[str, Sequence[float]]]
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 4e-3}       # of the largest magnitude
LEAST = 0.01                                                 # a gain below this is not worth a line in a table
ROUNDS = 20


@dataclass
class Row:
    """What the table gets: the best tiles, or None where the heuristic stays; seconds; the A/A ratio."""

    target: Target
    config: Config | None
    seconds: float
    heuristic_seconds: float
    a_a: float
    notes: list[str] = field(default_factory=list)

    def entry(self) -> dict[str, Any]:
        names = tile_table.TILES[self.target.kernel]
        tiles = None if self.config is None else {name: getattr(self.config, name) for name in names}
        micro = lambda seconds: round(seconds * 1e6, 2)
        fields = {name: bool(n) if name in ("dropout", "fused") else n for name, n in self.target.fields.items()}
        return fields | {"tiles": tiles, "us": micro(self.seconds), "heuristic_us": micro(self.heuristic_seconds),
                         "a_a": round(self.a_a, 4), "shape": str(self.target.shape),
                         "sources": tile_table.sources(self.target.kernel)}


def prepared(target: Target, inputs: Sequence[Mapping[str, Call]], config: Config) -> tuple[list[Function], list[Tensor]]:
    """For each set of inputs a function that launches the kernel alone; and what the whole call returns for the first set."""
    functions: list[Function] = []
    results: list[list[Tensor]] = []
    for calls in inputs:
        with forced({target.place: config}):
            launches = recorded(lambda: results.append(list(calls[target.call]())), run=True)  # noqa: B023 (called at once)
        mine = [launch for launch in launches if launch.name in LAUNCHES[target.kernel]]
        functions.append(functools.partial(_again, mine))
    return functions, [result.clone() for result in results[0]]


def _again(launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch.again()


def disagreement(results: Sequence[Tensor], truth: Sequence[Tensor], dtype: str) -> str | None:
    """Where results are further from the heuristic's than the dtype's roundings, or None."""
    for i, (x, y) in enumerate(zip(results, truth, strict=True)):
        if y.numel() == 0:
            continue
        error, budget = float((x.float() - y.float()).abs().max()), TOLERANCE[dtype] * float(y.float().abs().max())
        if not error <= max(budget, 1e-6):
            return f"computes something else: result {i} is {error:.2e} off, at most {budget:.2e} was expected"
    return None


def beats(times: Mapping[str, Sequence[float]], name: str) -> bool:
    """Whether a median lies below what the same function, timed twice, reaches in one run of five, and by LEAST at all."""
    found = summary(times)
    first = next(iter(times))
    same = min(found[first]["p20_s"], found["A/A"]["p20_s"], (1 - LEAST) * found[first]["median_s"])
    return found[name]["median_s"] < same


def fastest(target: Target, configs: Sequence[Config], prepare: Callable[[Config], tuple[list[Function], list[Tensor]]],
            timer: Timer, elsewhere: Callable[[Config], str | None]) -> Row:
    """The tiles that beat the heuristic's twice: among all that agree with it, and once more alone against it.

    prepare: `prepared` for some tiles. timer: seconds of functions that take turns, the first one's again as "A/A". elsewhere:
    `Compiler.elsewhere`.
    """
    functions, truth = prepare(target.heuristic)
    contest: dict[str, list[Function]] = {"heuristic": functions}
    known, notes = {}, []
    for config in configs:
        try:
            mine, results = prepare(config)
            wrong = disagreement(results, truth, target.shape.dtype)
        except Exception as error:                           # a candidate never stops the run
            wrong = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
        if wrong:
            notes.append(f"{label(target.kernel, config)}: {wrong}")
        else:
            contest[label(target.kernel, config)], known[label(target.kernel, config)] = mine, config
    times = timer(contest)
    found = summary(times)
    for name in sorted(known, key=lambda name: found[name]["median_s"]):
        if not beats(times, name):
            break
        if reason := elsewhere(known[name]):
            notes.append(f"{name}: in other calls of the class {reason}")
            continue
        again = timer({"heuristic": contest["heuristic"], name: contest[name]})
        if beats(again, name):
            alone = summary(again)
            return Row(target, known[name], alone[name]["median_s"], alone["heuristic"]["median_s"], alone["A/A"]["times_ours"],
                       notes)
        notes.append(f"{name}: faster among the others and not alone")
    seconds = found["heuristic"]["median_s"]
    return Row(target, None, seconds, seconds, found["A/A"]["times_ours"], notes)


def on_gpu(functions: Functions) -> Mapping[str, Sequence[float]]:
    """Seconds of functions that take turns as CUDA graphs, or without where one of them cannot be captured."""
    times, eager = side_by_side(functions, "cuda", ROUNDS, capture=True)
    return side_by_side(functions, "cuda", ROUNDS)[0] if eager else times


def tuned(shape: Shape, targets: Sequence[Target], changes: int, compiler: Compiler, device: str = "cuda",
          timer: Timer = on_gpu) -> Iterator[Row]:
    """Compile and measure the candidates of a shape's kernels, one row after the other."""
    survivors = [by_promise(target, compiler.candidates(target, candidates(target, changes)), compiler.sm) for target in targets]
    width = shape.H or tune_cases.HIDDEN
    sets = input_sets(4 * tune_cases.TOKENS * width * tune_cases.DTYPES[shape.dtype].itemsize, device)
    with forced({}):
        inputs = [tune_cases.calls(shape, device, seed) for seed in range(sets)]
    for target, found in zip(targets, survivors, strict=True):
        yield fastest(target, [candidate.config for candidate in found], functools.partial(prepared, target, inputs), timer,
                      functools.partial(compiler.elsewhere, target))


def commit() -> str | None:
    """Of the checkout that this package is, or None where it is installed."""
    git = ["git", "-C", str(tile_table.FOLDER)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", "README.md"], capture_output=True, check=True)
        done = subprocess.run([*git, "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True,
                              check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write(path: Path, device: str, command: str, rows: Sequence[Row]) -> None:
    """Put rows into the device's table, beside those of other classes that the same Triton version made."""
    record: dict[str, Any] = {"device": device, "date": datetime.date.today().isoformat(), "command": command,
                              "torch": torch.__version__, "triton": tile_table.triton_version(), "commit": commit(),
                              "kernels": {}}
    try:
        old = json.loads(path.read_text())
    except (OSError, ValueError):                            # none yet, or one that no process could read
        old = {}
    if old.get("device") == device and old.get("triton") == record["triton"]:
        record["kernels"] = old["kernels"]
        record["command"] = "; ".join(dict.fromkeys([*old["command"].split("; "), command]))
    for row in rows:
        kernel, entry = row.target.kernel, row.entry() | {name: record[name] for name in ("date", "commit")}
        same = lambda other, entry=entry, kernel=kernel: all(other[name] == entry[name] for name in tile_table.FIELDS[kernel])
        kept = [other for other in record["kernels"].get(kernel, []) if not same(other)]
        record["kernels"][kernel] = [*kept, entry]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(scratch, path)


def sentence(row: Row) -> str:
    """forward, S128-P16-D64-bf16-dropout: 64x64x16, 4 warps, 2 stages 41.20 us; ..."""
    target, micro = row.target, lambda seconds: f"{seconds * 1e6:.2f} us"
    found = (f"{label(target.kernel, row.config)} takes {micro(row.seconds)}, {row.seconds / row.heuristic_seconds:.3f} of it"
             if row.config is not None else "nothing tried is faster")
    return (f"{target.kernel}, {target.shape}: the heuristic's {label(target.kernel, target.heuristic)} takes "
            f"{micro(row.heuristic_seconds)} (A/A {row.a_a:.3f}); {found}" + "".join(f"\n    {note}" for note in row.notes))
