"""What `ptv2 ablate` runs: from a grid file and flags to cells, each a set of ptv2 train flags that has been parsed once."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ptv2_engine import cli_args, presets
from ptv2_engine.cli_tables import load_data
from ptv2_engine.encoder import FAMILIES
from ptv2_engine.encoder.checkpoints import model_config
from ptv2_engine.errors import ConfigError

Flags = dict[str, list[str]]           # a flag of ptv2 train -> its values as words
DEPTHS, FIGURES, AT = ("ascending", "descending"), ("depth", "length", "reparameterization", "cells"), ("best", "last", "test")
_OWN = ("vary", "cells", "seeds", "depth", "depth_steps", "metric", "at", "figure", "jobs")
_STEPS = 6                             # prompted depths a figure has unless --depth_steps says which
_SIZES = {"max_seq_length", "max_train_samples", "max_eval_samples", "max_predict_samples"}      # of the same data
_ALWAYS = ("loss", "runtime", "samples_per_second", "steps_per_second")       # what transformers measures beside the metrics


@dataclass(frozen=True)
class Cell:
    """One setting of the grid. name: also its folder's. varied: what differs between cells, flag -> value as it is shown.
    flags: of ptv2 train, without seed and output_dir."""

    name: str
    varied: dict[str, str]
    flags: Flags

    def settings_hash(self, seed: int) -> str:
        """Says whether a finished run is of these settings; the order of flags does not matter."""
        return hashlib.sha256(json.dumps([sorted(self.flags.items()), seed]).encode()).hexdigest()[:16]

    def words(self, seed: int, output_dir: Path) -> list[str]:
        """The command line of one run, behind `ptv2 train`."""
        flags = self.flags | {"seed": [str(seed)], "output_dir": [str(output_dir)]}
        return [word for name, values in flags.items() for word in (f"--{name}", *values)]


@dataclass(frozen=True)
class Grid:
    """Everything one call of `ptv2 ablate` is asked for. base: the flags all cells start from."""

    cells: list[Cell]
    seeds: list[int]
    base: Flags
    output_dir: Path
    metric: str | None
    at: str
    figures: list[str]
    jobs: int
    dry_run: bool
    overwrite: bool
    notes: list[str]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see ptv2 ablate --help.")


def parser() -> argparse.ArgumentParser:
    made = _Parser(
        prog="ptv2 ablate", allow_abbrev=False, usage="ptv2 ablate [--grid FILE] [--vary FLAG=A,B,...] --output_dir DIR "
        "[any flag of ptv2 train ...]", description="Run ptv2 train over a grid of settings and seeds, and draw its metric by "
        "depth, by length and by reparameterization. Runs that are done are kept: an interrupted grid goes on where it was.")

    def add(flag: str, **options: Any) -> None:
        made.add_argument(*dict.fromkeys((f"--{flag}", f"--{flag.replace('_', '-')}")), **options)

    add("grid", help="YAML: flags of ptv2 train, vary: {flag: [values]}, cells: [{flag: value}], seeds: [...]; or the name of a "
        f"packaged grid ({', '.join(name for name, _ in presets.list_grids())})")
    add("output_dir", help="results.json, table.md, figures, and cells/<cell>/seed-<n> for each run")
    add("vary", nargs="+", action="extend", default=[], metavar="FLAG=A,B", help="such as prompt_length=4,8,16 "
        "reparameterization=none,mlp; values with a comma, and flags that take several, go into a --grid file")
    add("seeds", help="such as 1,2,3; default: the one seed of ptv2 train")
    add("depth", nargs="+", help="prompts in layers 1..k (ascending), in layers L-k+1..L (descending); both words for both")
    add("depth_steps", help=f"which k, such as 4,8,12; default: {_STEPS} even steps")
    add("metric", help="default: the task's own")
    add("at", choices=AT, help="the value that counts: of the best epoch (default), of the last one, or on the test file")
    add("figure", nargs="+", choices=("auto", "none", *FIGURES), help="default: auto, what the varied flags allow")
    add("jobs", type=int, help="runs at a time; default 1")
    add("dry_run", action="store_true", help="print the runs and stop")
    add("overwrite_output_dir", action="store_true", help="train again where the output folder holds runs of other settings")
    return made


def parse(argv: Sequence[str]) -> Grid:
    """The grid that a command line asks for, with every cell's flags parsed. Raises ConfigError before anything runs."""
    argv = list(argv)
    own, behind = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    args, rest = parser().parse_known_args(own)
    notes: list[str] = []
    file = {} if args.grid is None else presets.read_yaml(presets.find_grid(args.grid), "--grid")
    ask = {name: file.pop(name) for name in _OWN if file.get(name) is not None}
    ask |= {name: getattr(args, name) for name in _OWN if getattr(args, name, None) not in (None, [])}
    given = presets.flags_of(file, f"--grid {args.grid}") | cli_args.split_flags([*rest, *behind])
    base = cli_args.over_files(given, notes)
    base.pop("output_dir", None)                # a preset's or config file's is for a run of its own
    output_dir = args.output_dir or given.get("output_dir", [None])[0]
    if output_dir is None:
        raise ConfigError("where to? Give --output_dir FOLDER.")
    seed = base.pop("seed", ["42"])[0]
    seeds = _numbers("seeds", ask.get("seeds", [seed]), least=0)
    vary = _vary(ask.get("vary", []))
    if "depth_steps" in ask and "depth" not in ask:
        raise ConfigError(f"--depth_steps {ask['depth_steps']} says which k --depth has; add --depth ascending or descending.")
    if "depth" in ask:
        vary |= _depths(ask["depth"], ask.get("depth_steps"), base, vary)
    cells = _cells(base, vary, ask.get("cells", []))
    figures = [str(f) for f in _listed(ask.get("figure", "auto"))]
    jobs, at = ask.get("jobs", 1), ask.get("at", "best")
    for fine, sentence in (
            (isinstance(jobs, int) and jobs >= 1, f"--jobs {jobs} is below 1; it is how many runs go on at a time"),
            (at in AT, f"--at {at!r} does not exist; choose {', '.join(AT)}"),
            (set(figures) <= {"auto", "none", *FIGURES}, f"--figure {' '.join(figures)} is not understood; choose auto, none, "
             f"{', '.join(FIGURES)}")):
        if not fine:
            raise ConfigError(f"{sentence}.")
    grid = Grid(cells, seeds, base, Path(output_dir), ask.get("metric"), at, figures, jobs, args.dry_run,
                args.overwrite_output_dir, notes)
    _check(grid)
    return grid


def _vary(asked: Any) -> dict[str, list[list[str]]]:
    """{flag: its values, each a list of words} of FLAG=A,B words or of a grid file's mapping."""
    if isinstance(asked, dict):
        pairs = [(str(name), [presets.words_of(v) for v in _listed(values)]) for name, values in asked.items()]
    else:
        split = [str(word).partition("=") for word in _listed(asked)]
        for name, equals, _ in split:
            if not equals:
                raise ConfigError(f"--vary {name} is not understood; write FLAG=A,B,..., such as prompt_length=4,8,16.")
        pairs = [(name, [[v] for v in values.split(",") if v]) for name, _, values in split]
    vary: dict[str, list[list[str]]] = {}
    for name, chosen in pairs:
        flag = name.lstrip("-").replace("-", "_")
        flag = cli_args.ALIASES.get(flag, flag)
        if flag in ("seed", "output_dir"):
            raise ConfigError(f"--vary {flag} is not possible; "
                              + ("use --seeds 1,2,3." if flag == "seed" else "each run has a folder of its own."))
        if not chosen:
            raise ConfigError(f"--vary {flag} has 0 values; give at least one.")
        if flag in vary:
            raise ConfigError(f"--vary {flag} is there twice; give all its values at once, as {flag}=A,B,...")
        vary[flag] = chosen
    return vary


def _depths(asked: Any, steps: Any, base: Flags, vary: dict[str, list[list[str]]]) -> dict[str, list[list[str]]]:
    """Values of prompt_layers, counted from 1 at the bottom: 1-k for ascending, (L-k+1)-L for descending."""
    ways = [way for word in _listed(asked) for way in str(word).split(",")]
    if not ways or set(ways) - set(DEPTHS):
        raise ConfigError(f"--depth {' '.join(ways)} is not understood; write ascending, descending, or the two with a space "
                          "between.")
    if "prompt_layers" in vary or "prompt_layers" in base:
        raise ConfigError("--depth and --prompt_layers both say which layers have a prompt; leave one out.")
    if "model_name_or_path" not in base:
        raise ConfigError("--depth needs to know how many layers there are; give --model_name_or_path.")
    config = model_config(base["model_name_or_path"][0])
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        raise ConfigError(f"--depth: model_type {config.get('model_type')!r} has no encoder here; vary prompt_layers by name.")
    layers = family.read_config(config).num_layers
    chosen = (_numbers("depth_steps", steps, least=1) if steps is not None else
              sorted({max(round(layers * i / _STEPS), 1) for i in range(1, _STEPS + 1)}))
    if max(chosen) > layers:
        raise ConfigError(f"--depth_steps {max(chosen)} is more than the {layers} layers there are; use 1 to {layers}.")
    spans = [f"1-{k}" if way == "ascending" else f"{layers - k + 1}-{layers}" for way in ways for k in chosen]
    return {"prompt_layers": [[span] for span in dict.fromkeys(spans)]}       # all layers are in both directions


def _cells(base: Flags, vary: dict[str, list[list[str]]], listed: Any) -> list[Cell]:
    """The product of what varies, then the cells that are listed one by one; the same settings make one cell."""
    if not isinstance(listed, list) or not all(isinstance(cell, dict) for cell in listed):
        raise ConfigError("cells: must be a list of mappings, such as '- {method: head-only, learning_rate: 1e-3}'.")
    combined: list[Flags] = []
    if vary or not listed:
        combined += [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]
    combined += [cli_args.translate(presets.flags_of({k.replace("-", "_"): v for k, v in cell.items()}, "cells:"), [])
                 for cell in listed]
    # a flag whose default is None is left out for "none": reparameterization=none,mlp
    optional = {f.name for group in cli_args.GROUPS for f in dataclasses.fields(group) if f.default is None}
    cells: dict[str, Cell] = {}
    for values in combined:
        off = {name for name, words in values.items() if name in optional and words in (["none"], ["None"], ["null"])}
        flags = {name: words for name, words in (base | values).items() if name not in off}
        varied = {name: "none" if name in off else " ".join(words) for name, words in values.items()}
        cells.setdefault(json.dumps(sorted(flags.items())), Cell(_folder_name(values), varied, flags))
    return list(cells.values())


def _folder_name(values: Flags) -> str:
    """A cell's, whatever other cells there are; where it cannot spell the values it ends in a digest of them."""
    name = ",".join(f"{flag}={re.sub(r'[^A-Za-z0-9_.+-]+', '_', ' '.join(words))}" for flag, words in values.items()) or "base"
    if len(name) <= 120 and all(re.fullmatch(r"[A-Za-z0-9_.+-]+", word) and len(words) == 1
                                for words in values.values() for word in words):
        return name
    return f"{name[:100]}~{hashlib.sha256(json.dumps(list(values.items())).encode()).hexdigest()[:10]}"


def _check(grid: Grid) -> None:
    """Parse every cell's flags as its run will, and refuse figures that nothing varied for."""
    for cell in grid.cells:
        try:
            _, _, prompt, _, notes = cli_args.parse_train(cell.words(grid.seeds[0], grid.output_dir))
            prompt.prompt_config()
        except ConfigError as error:
            raise ConfigError(f"cell {cell.name}: {error}") from error
        grid.notes.extend(note for note in notes if note not in grid.notes)
    for figure, flag in (("depth", "prompt_layers"), ("length", "prompt_length"), ("reparameterization", "reparameterization")):
        if figure in grid.figures and len({cell.varied.get(flag) for cell in grid.cells}) < 2:
            raise ConfigError(f"--figure {figure} needs cells that differ in {flag}; add --vary {flag}=A,B.")


def check_data(grid: Grid, cells: Iterable[Cell]) -> None:
    """Read the data of cells that are to run, each data set once: that it can be trained on, and that it is scored as asked.

    Raises ConfigError, DataError.
    """
    named = {f.name for f in dataclasses.fields(cli_args.DataArguments)} - _SIZES | {"eval_strategy", "config", "preset"}
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(json.dumps(sorted((flag, words) for flag, words in cell.flags.items() if flag in named)), cell)
    split = "test" if grid.at == "test" else "validation"
    for cell in first.values():
        _, data, _, training, _ = cli_args.parse_train(cell.words(grid.seeds[0], grid.output_dir))
        if data.multi_task is not None:
            raise ConfigError(f"--multi_task {data.multi_task} has a metric for each data set, but a grid compares one; give the "
                              "data set alone, or run ptv2 train for each setting.")
        if split == "validation" and training.eval_strategy == "no":
            raise ConfigError("--eval_strategy no measures nothing on validation data; leave it out, or use --at test.")
        tables, task = load_data(data)
        if split not in tables or not task.has_labels(tables[split]):
            of = data.dataset_name or tables["train"].source
            what = f"there is no {split} data" if split not in tables else f"the {split} data has no labels"
            way = (f"use --at {'best' if split == 'test' else 'test'}" if data.dataset_name else
                   "give --test_file with labels, or use --at best" if split == "test" else
                   "give --validation_file with labels, or --test_file with --at test")
            raise ConfigError(f"--at {grid.at} is a score on {split} data, but {what} beside the training data of {of}; {way}.")
        known = (*task.metric_names(), *_ALWAYS)
        if grid.metric is not None and _bare(grid.metric) not in known:
            raise ConfigError(f"--metric {grid.metric} is not among what the runs measure ({', '.join(known)}); choose one of "
                              "them.")


def _bare(metric: Any) -> str:
    return str(metric).removeprefix("eval_").removeprefix("test_")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _numbers(flag: str, given: Any, least: int) -> list[int]:
    """Integers of "1,2,3", of a list or of one number, without repeats. Raises ConfigError."""
    words: Iterable[str] = (part for v in _listed(given) for part in str(v).split(","))
    try:
        found = list(dict.fromkeys(int(word) for word in words if word.strip()))
    except ValueError:
        found = []
    if not found or min(found) < least:
        raise ConfigError(f"--{flag} {given} is not understood; write whole numbers from {least}, such as 1,2,3.")
    return found
