"""`ptv2 data check`: what training would make of a file, printed for people or as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ptv2_engine.encoder import FAMILIES
from ptv2_engine.encoder.checkpoints import model_config
from ptv2_engine.errors import ConfigError, DataError
from ptv2_engine.tasks.base import Task
from ptv2_engine.tasks.check import Report, check
from ptv2_engine.tasks.custom import TASKS
from ptv2_engine.tasks.data import Table

_MOST_LABELS = 20


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see ptv2 data check --help.")


def parser() -> argparse.ArgumentParser:
    made = _Parser(prog="ptv2 data check", allow_abbrev=False, description="What training would make of a file: its task, "
                   "labels, problems by row number, lengths, what would be cut, examples as the model reads them, and a prompt "
                   "length to start from. Exits with 2 where there are problems.")
    made.add_argument("file", nargs="?", help="csv, tsv, json, jsonl, parquet or CoNLL columns; or a data set by name, below")

    def add(flag: str, **options: Any) -> None:
        made.add_argument(*dict.fromkeys((f"--{flag}", f"--{flag.replace('_', '-')}")), **options)

    add("validation_file", help="checked as well, and looked for in the first file")
    add("model_name_or_path", help="backbone: its tokenizer counts, its positions limit the prompt")
    add("tokenizer_name", help="a tokenizer alone")
    add("task", choices=TASKS, help="default: what the columns say")
    add("head", default="classifier", choices=["classifier", "cloze"])
    add("pattern", help="cloze, own data: as of ptv2 train")
    add("verbalizers", nargs="+")
    add("pattern_id", type=int, default=0)
    add("text_columns", nargs="+")
    add("label_column")
    add("choice_columns", nargs="+")
    add("max_seq_length", type=int, default=128)
    add("doc_stride", type=int, default=128)
    add("task_name", help="glue, superglue, ner, srl or qa, with --dataset_name")
    add("dataset_name")
    add("data_dir", help="folder with the data set's files instead of the hub")
    add("template_id", type=int, default=0)
    add("most", type=int, default=20, help="problems that are printed; --json has all")
    add("json", action="store_true")
    return made


def run(argv: Sequence[str]) -> None:
    """Check what the command line names. Raises ConfigError or DataError; also DataError, after printing, where there are
    problems."""
    argv = list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        parser().print_help()
        return
    if argv[0] != "check":
        raise ConfigError(f"ptv2 data {argv[0]} is not a command; write ptv2 data check FILE.")
    args = parser().parse_args(argv[1:])
    if args.max_seq_length < 3:
        raise ConfigError(f"--max_seq_length {args.max_seq_length} leaves no room for text; use 3 or more.")
    tables, task = load(args)
    table, validation = tables["train"], tables.get("validation")
    name = args.tokenizer_name or args.model_name_or_path
    tokenizer = None
    if name is not None:
        from ptv2_engine.cli_train import load_tokenizer

        tokenizer = load_tokenizer(name, task.kind == "tags")
    positions = None if args.model_name_or_path is None else positions_of(args.model_name_or_path)
    limit = args.max_seq_length if positions is None else min(args.max_seq_length, positions)
    found = check(table, task, tokenizer, limit, validation, positions)
    if args.json:
        print(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
    else:
        show(found, args.most)
    if found.problems:
        wrong = dict.fromkeys(problem.source for problem in found.problems)
        raise DataError(f"{len(found.problems)} rows or files with problems in {' and '.join(wrong)}; correct them.")


def load(args: argparse.Namespace) -> tuple[dict[str, Table], Task]:
    """Tables and task of a file or of a data set by name. Raises ConfigError, DataError."""
    from ptv2_engine.cli_args import DataArguments
    from ptv2_engine.cli_tables import read_data

    if args.file is None and not args.dataset_name:
        raise ConfigError("which file? Write ptv2 data check FILE, or give --task_name and --dataset_name.")
    names = {f.name for f in dataclasses.fields(DataArguments)} & set(vars(args))
    return read_data(DataArguments(train_file=args.file, **{name: getattr(args, name) for name in names}))


def positions_of(model: str) -> int | None:
    """Tokens and prompt together that a backbone has positions for; None where there is no such limit. Raises ConfigError."""
    config = model_config(model)
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        raise ConfigError(f"--model_name_or_path {model}: model_type {config.get('model_type')!r} has no encoder here; give "
                          "--tokenizer_name alone.")
    read = family.read_config(config)
    return read.max_length() if read.absolute_positions and read.shifts_positions else None


def show(found: Report, most: int) -> None:
    """Print a report. Texts are printed as they are: [CLS] is no markup."""
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 120
    grid = Grid.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()

    def line(name: str, value: str, style: str = "") -> None:
        grid.add_row(Text(name), Text(value, style=style))

    line("file", Path(found.source).name if len(found.source) > 80 else found.source)
    line("rows", f"{found.rows:,}")
    line("columns", ", ".join(found.columns))
    line("task", f"{found.model_task} of {', '.join(found.text_columns)} -> {found.label_column}")
    total = max(sum(found.labels.values()), 1)
    for i, (name, count) in enumerate(list(found.labels.items())[:_MOST_LABELS]):
        line("" if i else "entities" if found.kind == "tags" else "labels", f"{name}  {count:,}  ({count / total:.1%})")
    if len(found.labels) > _MOST_LABELS:
        line("", f"... and {len(found.labels) - _MOST_LABELS} more")
    if found.label_values is not None:
        line("values", ", ".join(f"{name} {value:g}" for name, value in found.label_values.items()))
    if found.lengths:
        line(f"length ({found.unit})", ", ".join(f"{name} {value:,}" for name, value in found.lengths.items()))
    if found.truncated is not None:
        pieces = f"; {found.split:,} rows become {found.pieces:,} pieces, and nothing is lost"
        line(f"at {found.max_seq_length} tokens", f"{found.truncated:,} rows lose their end"
             + (pieces if found.kind in ("tags", "span") else ""))
    line("repeated texts", f"{found.duplicates:,} rows" + (f"; {found.conflicts:,} rows with different labels"
                                                           if found.conflicts else ""))
    if found.overlap is not None:
        line("in both files", f"{found.overlap:,} rows")
    span = "none fits" if found.prompt_length is None else f"{found.prompt_length[0]} to {found.prompt_length[1]}"
    line("prompt length", f"{span}: {found.prompt_reason}")
    for i, text in enumerate(found.examples):
        line("" if i else "examples", text)
    for i, warning in enumerate(found.warnings):
        line("" if i else "warnings", warning, "yellow")
    for i, problem in enumerate(found.problems[:most]):
        other = "" if problem.source == found.source else f"{problem.source}, "
        where = f"row {problem.row}: " if problem.row else ": " if other else ""
        line("" if i else "problems", (other + where).replace(", : ", ": ") + problem.what, "red")
    if len(found.problems) > most:
        line("", f"... and {len(found.problems) - most} more (--most, --json)", "red")
    console.print(grid)
