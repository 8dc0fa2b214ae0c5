"""What `ptv2 evaluate` and `ptv2 predict` do: an adapter, its tokenizer and its settings, applied to a file or to texts."""

from __future__ import annotations

import argparse
import json
import sys
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ptv2_engine.adapter import replace_file
from ptv2_engine.cli_predictions import beside, form_of, logits_of, own_rows, render
from ptv2_engine.cli_tables import check_columns, described
from ptv2_engine.cli_train import SETTINGS, load_tokenizer
from ptv2_engine.errors import AdapterError, ConfigError, DataError, OutputError
from ptv2_engine.lora import is_lora, load_lora_model
from ptv2_engine.model import PromptedModel
from ptv2_engine.tasks.base import Benchmark, named_columns, refuse_problems, task_from
from ptv2_engine.tasks.benchmarks import find_benchmark
from ptv2_engine.tasks.choices import ChoiceTask
from ptv2_engine.tasks.cloze_task import ClozeTask
from ptv2_engine.tasks.custom import normalised
from ptv2_engine.tasks.data import Table, read_table
from ptv2_engine.tasks.sequences import SequenceTask
from ptv2_engine.tasks.spans import SpanTask
from ptv2_engine.tasks.tags import TagTask

_WAY_OUT = "rename the file's columns, or name them with --text_columns"
_COLUMNS = {"sequence": "text_columns", "choice": "text_columns", "tags": "words_column"}


class Predictor:
    """An adapter that labels tables of text. Its model is loaded when a table has been read and found right."""

    def __init__(self, args: argparse.Namespace) -> None:
        """args: of `ptv2 evaluate` and `ptv2 predict`. Raises AdapterError, ConfigError."""
        self.folder, self.args, self.batch_size = Path(args.adapter), args, args.batch_size
        if not self.folder.is_dir():
            raise AdapterError(f"the adapter folder {args.adapter} does not exist; pass the folder that ptv2 train wrote.")
        for name in ("batch_size", "max_seq_length"):
            if (value := getattr(args, name)) is not None and value < 1:
                raise ConfigError(f"--{name} {value} is below 1; use 1 or more.")
        settings = _settings(self)
        if args.text_columns:
            settings["task"] |= _columns(settings["task"]["kind"], args.text_columns)
        self.task, self.trained_length, self.benchmark = (task_from(settings["task"]), settings["max_seq_length"],
                                                          settings.get("benchmark"))

    @cached_property
    def model(self) -> Any:
        return _load_model(self.folder, self.args).eval()

    @cached_property
    def tokenizer(self) -> Any:
        model = self.model             # first: what it says of a backbone that is not there is clearer
        has_own = any((self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
        return load_tokenizer(str(self.folder if has_own else self.args.backbone or model.origin.location),
                              self.task.kind == TagTask.kind)

    @property
    def max_length(self) -> int:
        """Tokens of an example."""
        given = self.args.max_seq_length
        return min(given, self.model.max_length()) if given else self.trained_length

    def evaluate(self, file: str, label_column: str | None = None) -> dict[str, float]:
        """Metrics over a labelled file. Raises DataError where it has no labels, or other columns than training had."""
        if label_column is not None:
            name = "answers_column" if self.task.kind == "span" else "label_column"
            setattr(self.task, name, label_column)
        table = self._taken(self._given(file))
        check_columns(self.task, table, _WAY_OUT)
        if not self.task.has_labels(table):
            raise DataError(f"{file} has no labels in a column {named_columns(self.task)[1]!r} to score against, only "
                            f"{', '.join(map(repr, table.columns))}; name theirs with --label_column, or use ptv2 predict.")
        refuse_problems(self.task, table)
        features = self.task.features(table, self.tokenizer, self.max_length)
        scores = list(logits_of(self.model, self.task, features, self.batch_size))
        columns: list[Any] = list(zip(*scores, strict=True)) if self.task.kind == "span" else [scores]
        padded = [_padded(list(column)) for column in columns]
        prediction = SimpleNamespace(predictions=tuple(padded) if len(padded) > 1 else padded[0], label_ids=None)
        return {"examples": len(table)} | self.task.metrics(table, features)(prediction)

    def predict_file(self, file: str) -> list[dict[str, Any]]:
        """Each row of a file with its prediction."""
        given = self._given(file)
        table = self._taken(given)
        return self.predict(table, own_rows(given, table))

    def _given(self, file: str) -> Table:
        """A file's rows as it has them."""
        read = self._of_benchmark().read if self.benchmark else None
        return (read or read_table)(file)

    def _taken(self, table: Table) -> Table:
        """Rows as the task takes them: a published data set's as that has them, with its templates."""
        if isinstance(self.task, ClozeTask):
            return self.task.flat(table)
        if self.benchmark is None:
            return normalised(table, tagging=self.task.kind == TagTask.kind)
        rows = self._of_benchmark().rows
        return table if rows is None else rows(table, self.benchmark["template_id"])

    def _of_benchmark(self) -> Benchmark:
        assert self.benchmark is not None
        return find_benchmark(self.benchmark["task_name"], self.benchmark["dataset_name"])

    def predict_texts(self, texts: list[str]) -> list[dict[str, Any]]:
        """Texts as given on the command line; words are split at spaces for tagging. One row a text, so that rows stay beside
        lines: the prediction for a blank one is None. Raises DataError for other tasks."""
        task: Any = self.task
        if task.kind == "tags" and task.predicate_column is None:
            rows: list[dict[str, Any]] = [{task.words_column: text.split()} for text in texts]
        elif task.kind == "sequence" and len(task.text_columns) == 1:
            rows = [{task.text_columns[0]: text} for text in texts]
        else:
            needs = {"sequence": f"pairs of {' and '.join(getattr(task, 'text_columns', []))}", "tags": "words and a predicate",
                     "span": "a question and its context", "choice": "a text and its choices",
                     "cloze": "the blank of a pattern over several columns"}[task.kind]
            raise DataError(f"this adapter takes {needs}; give --file with these columns.")
        filled = [row for row, text in zip(rows, texts, strict=True) if text.strip()]
        found = iter(self.predict(Table(filled, "the given texts")) if filled or not texts else [])
        return [next(found) if text.strip() else row | {"prediction": None} for row, text in zip(rows, texts, strict=True)]

    def predict(self, table: Table, own: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        """A table's rows, or `own` in their place, each with what the model says of it (Task.answers)."""
        if not table.rows:
            raise DataError("there are 0 texts to label; pass some, or --file.")
        check_columns(self.task, table, _WAY_OUT)
        refuse_problems(self.task, table, labelled=False)
        features = self.task.features(table, self.tokenizer, self.max_length, labelled=False)
        scores = list(logits_of(self.model, self.task, features, self.batch_size))
        return beside(own or table.rows, self.task.answers(table, features, scores))


def predict(args: argparse.Namespace) -> None:
    """`ptv2 predict`: of the given texts, of --file or of the lines of standard input, to --output or to standard output."""
    if args.file and args.texts:
        raise ConfigError(f"{len(args.texts)} texts and --file {args.file} were given; leave one of the two out.")
    form = form_of(args.output, args.format)
    predictor = Predictor(args)
    if args.file:
        rows = predictor.predict_file(args.file)
    else:
        rows = predictor.predict_texts(args.texts or [line.rstrip("\r\n") for line in sys.stdin])
    written = render(rows, form)
    if args.output is None:
        print(written, end="")
        return
    try:
        replace_file(Path(args.output), written.encode())
    except OSError as error:
        raise OutputError(f"--output {args.output} cannot be written ({error.strerror}); choose another path.") from error


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    """[N, ...]: rows of different length filled with -100, as transformers gathers them."""
    rows = [np.asarray(row) for row in rows]
    if rows[0].ndim == 0 or len({row.shape for row in rows}) == 1:
        return np.stack(rows)
    longest = max(row.shape[0] for row in rows)
    return np.stack([np.pad(row, [(0, longest - row.shape[0])] + [(0, 0)] * (row.ndim - 1), constant_values=-100)
                     for row in rows])


def _columns(kind: str, names: list[str]) -> dict[str, Any]:
    """--text_columns, as the task of this kind calls them. Raises ConfigError."""
    if kind == "span" and len(names) == 2:
        return {"question_column": names[0], "context_column": names[1]}
    if kind not in _COLUMNS or kind == "tags" and len(names) != 1:
        raise ConfigError(f"--text_columns {' '.join(names)} does not fit this adapter's task ({kind}); leave it out, or rename "
                          "the file's columns.")
    return {_COLUMNS[kind]: names[0] if kind == "tags" else names}


def _load_model(folder: Path, args: argparse.Namespace) -> Any:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    if is_lora(folder):
        placed = [name for name in ("dtype", "frozen_dtype", "stream_weights") if getattr(args, name) not in (None, "float32")]
        if placed:
            raise ConfigError(f"{folder} is a LoRA adapter, which runs on transformers' model in float32; leave --{placed[0]} "
                              "out.")
        return load_lora_model(folder, source=args.backbone, device=device)
    placement = {"frozen_dtype": None if args.frozen_dtype == "none" else args.frozen_dtype} if args.frozen_dtype else {}
    return PromptedModel.from_adapter(folder, backbone=args.backbone, dtype=dtype, device=device,
                                      stream_weights=args.stream_weights, **placement)


def _settings_file(folder: Path) -> Path:
    """Beside the adapter, or, for a checkpoint of a run, in the run's folder: OUT/checkpoint-3, OUT/checkpoint-3/DATA_SET."""
    folder = folder.resolve()
    places = [folder]
    if folder.name.startswith("checkpoint-"):
        places.append(folder.parent)
    if folder.parent.name.startswith("checkpoint-"):
        places.append(folder.parent.parent / folder.name)
    return next((place / SETTINGS for place in places if (place / SETTINGS).is_file()), folder / SETTINGS)


def _settings(predictor: Predictor) -> dict[str, Any]:
    """What training wrote beside the adapter, or defaults for one made in Python, which its model says."""
    folder, file = predictor.folder, _settings_file(predictor.folder)
    if file.is_file():
        found = json.loads(file.read_text())
        if "task" not in found:
            raise ConfigError(f"{file} was written by an older version, which said differently how text becomes features; train "
                              "again, or remove the file for the defaults (columns text and label).")
        return found
    model = predictor.model
    names, values = list(model.id2label.values()), model.problem_type == "regression"
    defaults: dict[str, dict[str, Any]] = {
        "token-classification": {"kind": TagTask.kind, "words_column": "words", "label_column": "tags", "names": names},
        "question-answering": {"kind": SpanTask.kind, "unanswerable": True},
        "multiple-choice": {"kind": ChoiceTask.kind, "text_columns": ["text"], "choice_columns": ["choices"],
                            "label_column": "label"},
        "sequence-classification": {"kind": SequenceTask.kind, "text_columns": ["text"], "label_column": "label",
                                    "label_kind": "values" if values else "classes", "names": [] if values else names}}
    if model.task not in defaults:
        raise ConfigError(f"{folder} has no {SETTINGS}, which says how text becomes the features of task {model.task!r}; pass a "
                          "folder that ptv2 train wrote.")
    found = {"task": defaults[model.task], "max_seq_length": min(predictor.args.max_seq_length or 128, model.max_length())}
    print(f"note: {folder} has no {SETTINGS}; taking {described(task_from(found['task']))}, {found['max_seq_length']} tokens",
          file=sys.stderr)
    return found
