"""Predictions as rows and as files: a table's own columns, and beside them what the model says of each row."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptv2_engine.adapter import replace_file
from ptv2_engine.batches import PackedCollator
from ptv2_engine.errors import ConfigError, OutputError
from ptv2_engine.tasks.base import Feature, Task, as_features
from ptv2_engine.tasks.data import Table

Logits = np.ndarray | tuple[np.ndarray, np.ndarray]
FORMS = {".jsonl": "jsonl", ".csv": "csv", ".txt": "table", "": "table"}         # by the suffix of --output
_LABELS = ("labels", "label", "start_positions", "end_positions")
_SHOWN = 200             # characters of a cell of the drawn table


@torch.no_grad()
def logits_of(model: Any, task: Task, features: Sequence[Feature], batch_size: int) -> Iterator[Logits]:
    """Each feature's: [C], [its tokens, C], (start, end) of its tokens, or [its choices]; model: in evaluation mode."""
    collate = PackedCollator()
    for start in range(0, len(features), batch_size):
        part = features[start:start + batch_size]
        batch = collate(as_features(part, _LABELS))
        inputs = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        output = model(**inputs)
        scores = (output.start_logits, output.end_logits) if task.kind == "span" else (output.logits,)
        rows = zip(*(s.float().cpu().numpy() for s in scores), strict=True)
        for feature, row in zip(part, rows, strict=True):
            whole = task.kind in ("span", "tags", "choice")       # what belongs to the feature; the rest is padding
            found = tuple(s[:len(feature["input_ids"])] if whole else s for s in row)
            yield found if len(found) > 1 else found[0]


def own_rows(given: Table, table: Table) -> list[dict[str, Any]]:
    """The rows that predictions stand beside: those of the file as it is, or, where one of them holds several examples or some
    are left out, those that were made of it."""
    nested = any("paragraphs" in row or isinstance(row.get("passage"), Mapping) for row in given.rows)
    return table.rows if nested or len(given) != len(table) else given.rows


def beside(rows: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every row with its answer. Columns of the same name, as in a file of earlier predictions, are replaced, which is said."""
    replaced = dict.fromkeys(name for row, answer in zip(rows, answers, strict=True) for name in answer if name in row)
    if replaced:
        print(f"note: columns of the input that predictions replace in the output: {', '.join(replaced)}", file=sys.stderr)
    return [{**row, **answer} for row, answer in zip(rows, answers, strict=True)]


def form_of(output: str | None, form: str | None) -> str:
    """"table", "jsonl" or "csv": what --format says, or else --output's name. Raises ConfigError, OutputError."""
    if output is None:
        return form or "table"
    suffix = Path(output).suffix.lower()
    if form is None and suffix not in FORMS:
        raise ConfigError(f"--output {output} has the suffix {suffix!r}, but predictions are written as .jsonl, .csv or a drawn "
                          ".txt; choose one, or say it by --format.")
    if not Path(output).resolve().parent.is_dir():
        raise OutputError(f"--output {output} cannot be written, as its folder is missing; make it, or choose another path.")
    return form or FORMS[suffix]


def render(rows: Sequence[Mapping[str, Any]], form: str) -> str:
    """The columns are those of all rows. Lists are JSON in a cell of csv and of the table, whose long texts are cut."""
    if form == "jsonl":
        return "".join(_json(row) + "\n" for row in rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in columns] for row in rows]
    out = io.StringIO()
    if form == "csv":
        csv.writer(out).writerows([columns, *cells])
        return out.getvalue()
    from rich.console import Console
    from rich.table import Column
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(*(Column(name, overflow="fold") for name in columns))
    for row in cells:
        texts = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in row]
        drawn.add_row(*(Text(t if len(t) <= _SHOWN else t[:_SHOWN] + "...") for t in texts))      # Text: brackets are no markup
    Console(file=out, width=120).print(drawn)
    return out.getvalue()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)        # str: dates and the like of a parquet file


def _cell(value: Any) -> Any:
    return "" if value is None else _json(value) if isinstance(value, (list, tuple, dict)) else value


def write_test_predictions(output: Path, model: Any, tokenizer: Any, task: Task, tables: Mapping[str, Table],
                           features: Mapping[str, list[Feature]], max_length: int, batch_size: int) -> None:
    """predictions.jsonl of the test table, labelled or not, and predictions_SPLIT.jsonl of further ones.

    features: of the tables that are labelled. A second pass over those: the metrics' scores are padded to the widest row, and
    where rows bring their candidates only the best one's number is kept.
    """
    splits = [split for split in tables if split.startswith("test")]
    if not splits:
        print("no predictions are written: there is no test table; give --test_file")
    model.eval()
    for split in splits:
        table = tables[split]
        made = features[split] if split in features else task.features(table, tokenizer, max_length, labelled=False)
        rows = beside(table.rows, task.answers(table, made, list(logits_of(model, task, made, batch_size))))
        file = output / ("predictions.jsonl" if split == "test" else f"predictions_{split}.jsonl")
        replace_file(file, render(rows, "jsonl").encode())
        print(f"{split}: predictions of {len(rows)} rows in {file}")
