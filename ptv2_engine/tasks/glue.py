"""GLUE's nine data sets: the published inputs, and the files its download holds.

Official files are tab separated and without quotation rules; CoLA's have no header, MRPC's name their columns in their own way.
CoLA's training file is often found cut in two (train and val) beside the official dev: `val` is then the validation split, as the
first of the usual names (validation, valid, val, dev) that a folder has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptv2_engine.errors import DataError
from ptv2_engine.tasks.base import Benchmark
from ptv2_engine.tasks.data import Table, read_table
from ptv2_engine.tasks.features import pick_columns
from ptv2_engine.tasks.sequences import SequenceTask, published_task

_LABELS = ("label", "gold_label", "score", "is_duplicate", "Quality")
_COLA = ("source", "label", "star", "sentence")                 # the columns of a file without header
_USUAL = {"train": "train", "validation": "validation", "test": "test"}


@dataclass(frozen=True)
class _Set:
    """columns: ours -> what files call it. names: the classes in the hub's order, empty for regression."""

    columns: Mapping[str, tuple[str, ...]]
    names: tuple[str, ...]
    extra: tuple[str, ...] = ()
    best: str = "accuracy"
    splits: Mapping[str, str] | None = None
    files: Mapping[str, tuple[str, ...]] | None = None

    def make(self, table: Table, template: int) -> SequenceTask:
        return published_task(table, list(self.columns), self.names, self.extra, self.best)

    def rows(self, table: Table, template: int) -> Table:
        rows = pick_columns(table, self.columns, self.names, labels=_LABELS)
        if "question1" in self.columns:                         # QQP: a handful of its questions are empty
            rows = [row for row in rows if all(str(row[column]).strip() for column in self.columns)]
        return Table(rows, table.source)


def _pair(first: str = "sentence1", second: str = "sentence2", *more: tuple[str, str]) -> dict[str, tuple[str, ...]]:
    return {first: (first, *(a for a, _ in more)), second: (second, *(b for _, b in more))}


_ENTAILS = ("entailment", "not_entailment")
_SETS = {
    "cola": _Set({"sentence": ("sentence",)}, ("unacceptable", "acceptable"), ("matthews",), "matthews"),
    "sst2": _Set({"sentence": ("sentence",)}, ("negative", "positive")),
    "mrpc": _Set(_pair("sentence1", "sentence2", ("#1 String", "#2 String")), ("not_equivalent", "equivalent"), ("f1",),
                 files={"train": ("msr_paraphrase_train",), "test": ("msr_paraphrase_test",)}),
    "qqp": _Set(_pair("question1", "question2"), ("not_duplicate", "duplicate"), ("f1",)),
    "stsb": _Set(_pair(), (), best="pearson"),
    "mnli": _Set(_pair("premise", "hypothesis", ("sentence1", "sentence2")), ("entailment", "neutral", "contradiction"),
                 splits={"train": "train", "validation": "validation_matched", "test": "test_matched",
                         "validation_mismatched": "validation_mismatched", "test_mismatched": "test_mismatched"},
                 files={"validation": ("dev_matched", "validation_matched"), "test": ("test_matched",),
                        "validation_mismatched": ("dev_mismatched",)}),
    "qnli": _Set(_pair("question", "sentence"), _ENTAILS),
    "rte": _Set(_pair(), _ENTAILS),
    "wnli": _Set(_pair(), ("not_entailment", "entailment")),
}


def _reader(name: str) -> Callable[[Any], Table]:
    """Of official files (.tsv, .txt); others are read_table's."""
    columns = _SETS[name].columns
    known = {theirs for names in columns.values() for theirs in names}

    def read(path: str | Path) -> Table:
        path = Path(path)
        if path.suffix.lower() not in (".tsv", ".txt"):
            return read_table(path)
        try:        # only \n ends a line: a few texts hold a bare \r
            with open(path, newline="\n", encoding="utf-8-sig") as file:
                lines = [line.rstrip("\r\n").split("\t") for line in file if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as tab separated UTF-8 ({error}); repair or convert it.") from error
        header = lines.pop(0) if lines and (name != "cola" or "sentence" in lines[0]) else list(_COLA)
        if not known & set(header):
            raise DataError(f"{path} has the columns {', '.join(header)}, but {name} needs {' and '.join(columns)}; is this the "
                            "file?")
        needed = max(i for i, column in enumerate(header, 1) if column in known or column in _LABELS)
        rows = []
        for number, fields in enumerate(lines, 1):
            if len(fields) >= needed:
                rows.append(dict(zip(header, fields, strict=False)))
            elif name != "qqp":      # QQP's own file holds a few rows that a line break cut in two
                raise DataError(f"{path} row {number} has {len(fields)} fields where the header has {len(header)}; repair the "
                                "file.")
        if not rows:
            raise DataError(f"{path} has 0 examples; check the file.")
        return Table(rows, str(path))

    return read


GLUE: dict[str, Benchmark] = {
    name: Benchmark(name, ("nyu-mll/glue", name), of.make, of.splits or _USUAL, of.files or {}, of.rows, _reader(name))
    for name, of in _SETS.items()}
