"""What `ptv2 evaluate` and `ptv2 predict` do: an adapter, its tokenizer and its settings, applied to a file or to texts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ptv2_engine.batches import PackedCollator
from ptv2_engine.cli_tables import described
from ptv2_engine.cli_train import SETTINGS, load_tokenizer
from ptv2_engine.errors import ConfigError, DataError
from ptv2_engine.lora import is_lora, load_lora_model
from ptv2_engine.model import PromptedModel
from ptv2_engine.tasks.base import Feature, as_features, refuse_problems, task_from
from ptv2_engine.tasks.benchmarks import find_benchmark
from ptv2_engine.tasks.choices import ChoiceTask
from ptv2_engine.tasks.cloze_task import ClozeTask
from ptv2_engine.tasks.custom import normalised
from ptv2_engine.tasks.data import Table, read_table
from ptv2_engine.tasks.sequences import SequenceTask
from ptv2_engine.tasks.spans import SpanTask
from ptv2_engine.tasks.tags import TagTask

Logits = np.ndarray | tuple[np.ndarray, np.ndarray]
_LABELS = ("labels", "label", "start_positions", "end_positions")
_COLUMNS = {"sequence": "text_columns", "choice": "text_columns", "tags": "words_column"}


class Predictor:
    """A loaded adapter that labels tables of text."""

    def __init__(self, model: Any, tokenizer: Any, settings: dict[str, Any], batch_size: int) -> None:
        self.model, self.tokenizer, self.task = model.eval(), tokenizer, task_from(settings["task"])
        self.max_length, self.batch_size, self.benchmark = settings["max_seq_length"], batch_size, settings.get("benchmark")

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Predictor:
        folder = Path(args.adapter)
        for name in ("batch_size", "max_seq_length"):
            if (value := getattr(args, name)) is not None and value < 1:
                raise ConfigError(f"--{name} {value} is below 1; use 1 or more.")
        model = _load_model(folder, args)
        settings = _settings(folder, model, args.max_seq_length)
        if args.text_columns:
            settings["task"] |= _columns(settings["task"]["kind"], args.text_columns)
        if args.max_seq_length:
            settings["max_seq_length"] = min(args.max_seq_length, model.max_length())
        has_own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
        tokenizer_at = str(folder) if has_own else str(args.backbone or model.origin.location)
        tokenizer = load_tokenizer(tokenizer_at, settings["task"]["kind"] == TagTask.kind)
        return cls(model, tokenizer, settings, args.batch_size)

    @torch.no_grad()
    def logits(self, features: list[Feature]) -> Iterator[Logits]:
        """Each feature's: [C], [its tokens, C], (start, end) of its tokens, or [its choices]."""
        collate = PackedCollator()
        for start in range(0, len(features), self.batch_size):
            part = features[start:start + self.batch_size]
            batch = collate(as_features(part, _LABELS))
            inputs = {k: v.to(self.model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            output = self.model(**inputs)
            scores = (output.start_logits, output.end_logits) if self.task.kind == "span" else (output.logits,)
            rows = zip(*(s.float().cpu().numpy() for s in scores), strict=True)
            for feature, row in zip(part, rows, strict=True):
                whole = self.task.kind in ("span", "tags", "choice")       # what belongs to the feature; the rest is padding
                found = tuple(s[:len(feature["input_ids"])] if whole else s for s in row)
                yield found if len(found) > 1 else found[0]

    def evaluate(self, file: str, label_column: str | None = None) -> dict[str, float]:
        """Metrics over a labelled file."""
        if label_column is not None:
            name = "answers_column" if self.task.kind == "span" else "label_column"
            setattr(self.task, name, label_column)
        table = self._read(file)
        refuse_problems(self.task, table)
        features = self.task.features(table, self.tokenizer, self.max_length)
        scores = list(self.logits(features))
        columns: list[Any] = list(zip(*scores, strict=True)) if self.task.kind == "span" else [scores]
        padded = [_padded(list(column)) for column in columns]
        prediction = SimpleNamespace(predictions=tuple(padded) if len(padded) > 1 else padded[0], label_ids=None)
        return {"examples": len(table)} | self.task.metrics(table, features)(prediction)

    def predict_file(self, file: str) -> list[dict[str, Any]]:
        return self.predict(self._read(file))

    def _read(self, file: str) -> Table:
        """A file's rows as the task takes them: a published data set's as that has them, with its templates."""
        if isinstance(self.task, ClozeTask):
            return self.task.flat(read_table(file))
        if self.benchmark is None:
            return normalised(read_table(file))
        benchmark = find_benchmark(self.benchmark["task_name"], self.benchmark["dataset_name"])
        table = (benchmark.read or read_table)(file)
        return table if benchmark.rows is None else benchmark.rows(table, self.benchmark["template_id"], "test")

    def predict_texts(self, texts: list[str]) -> list[dict[str, Any]]:
        """Texts as given on the command line; words are split at spaces for tagging. Raises DataError for other tasks."""
        task: Any = self.task
        if task.kind == "tags" and task.predicate_column is None:
            return self.predict(Table([{task.words_column: t.split()} for t in texts], "the given texts"))
        if task.kind == "sequence" and len(task.text_columns) == 1:
            return self.predict(Table([{task.text_columns[0]: t} for t in texts], "the given texts"))
        needs = {"sequence": f"pairs of {' and '.join(getattr(task, 'text_columns', []))}", "tags": "words and a predicate",
                 "span": "a question and its context", "choice": "a text and its choices",
                 "cloze": "the blank of a pattern over several columns"}[task.kind]
        raise DataError(f"this adapter takes {needs}; give --file with these columns.")

    def predict(self, table: Table) -> list[dict[str, Any]]:
        """One row an example: its text and what the model says of it (a label and its probability, tags, an answer, ...)."""
        if not table.rows:
            raise DataError("there are 0 texts to label; pass some, or --file.")
        refuse_problems(self.task, table, labelled=False)
        features = self.task.features(table, self.tokenizer, self.max_length, labelled=False)
        return self.task.answers(table, features, list(self.logits(features)))


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


def _settings(folder: Path, model: Any, max_length: int | None) -> dict[str, Any]:
    """What training wrote beside the adapter, or defaults for one made in Python."""
    file = _settings_file(folder)
    if file.is_file():
        found = json.loads(file.read_text())
        if "task" not in found:
            raise ConfigError(f"{file} was written by an older version, which said differently how text becomes features; train "
                              "again, or remove the file for the defaults (columns text and label).")
        return found
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
    found = {"task": defaults[model.task], "max_seq_length": min(max_length or 128, model.max_length())}
    print(f"note: {folder} has no {SETTINGS}; taking {described(task_from(found['task']))}, {found['max_seq_length']} tokens",
          file=sys.stderr)
    return found
