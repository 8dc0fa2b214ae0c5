"""One text or a pair of texts, and a class or a number: most of GLUE and SuperGLUE, and most data of one's own."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np

from ptv2_engine.errors import ConfigError, DataError
from ptv2_engine.tasks.base import Feature, Metrics, Task
from ptv2_engine.tasks.data import Table
from ptv2_engine.tasks.features import Labels, encode_sequences, plain_label
from ptv2_engine.tasks.metrics import class_scores, correlations, multirc_scores, record_scores, scores_of

GROUPS = ("multirc", "record")


@dataclass
class SequenceTask(Task):
    """Sequence classification ("classes") or regression ("values") over one or two text columns.

    names: the classes in the order of the head's outputs. extra_metrics: "f1" (of class 1), "f1_macro", "matthews".
    group: rows that are judged together. "multirc": a row is an answer; F1 over all of them, and the share of questions whose
    answers are all right. "record": a row is an entity in its query (columns entity, answers); a question's guess is one of its
    entities, scored against its gold answers. The rows of a question have equal `idx` (its "answer" left aside).
    """

    kind: ClassVar[str] = "sequence"
    model_task: ClassVar[str] = "sequence-classification"
    text_columns: list[str]
    label_column: str
    label_kind: str
    names: list[str]
    extra_metrics: Sequence[str] = field(default_factory=list)
    best: str = "accuracy"
    group: str | None = None

    def __post_init__(self) -> None:
        self.text_columns, self.names, self.extra_metrics = list(self.text_columns), list(self.names), list(self.extra_metrics)
        if self.label_kind not in ("classes", "values"):
            raise ConfigError(f"label_kind {self.label_kind!r} does not exist; choose classes or values.")
        if not 1 <= len(self.text_columns) <= 2:
            raise ConfigError(f"{len(self.text_columns)} text columns were given, but one text or a pair can be encoded; name "
                              "one or two.")
        if self.group is not None and (self.group not in GROUPS or self.label_kind != "classes" or len(self.names) != 2):
            raise ConfigError(f"group {self.group!r} with {len(self.names)} classes does not exist; use one of "
                              f"{', '.join(GROUPS)} with two classes, or None.")

    @property
    def labels(self) -> Labels:
        return Labels(self.label_kind, self.names)

    def model_options(self, tokenizer: Any) -> dict[str, Any]:
        if self.label_kind == "values":
            return {"num_labels": 1, "id2label": None, "problem_type": "regression"}
        return {"num_labels": len(self.names), "id2label": self.labels.id2label, "problem_type": None}

    def problems(self, table: Table, labelled: bool = True) -> Iterator[tuple[int, str]]:
        if labelled and self.label_kind == "classes" and len(self.names) < 2:
            yield 0, f"every label is {self.names[0]!r}, and one class cannot be learned" if self.names else "there are no labels"
        known = set(self.names)
        for number, row in enumerate(table.rows, 1):
            for column in self.text_columns:
                if row.get(column) is None or not str(row[column]).strip():
                    yield number, f"the text {column!r} is empty" if column in row else f"there is no column {column!r}"
            if labelled:
                value = row.get(self.label_column)
                if value is None or not str(value).strip():
                    yield number, f"the label {self.label_column!r} is missing"
                elif self.label_kind == "values":
                    if not _finite(value):
                        yield number, f"label {value!r} is not a finite number"
                elif plain_label(value) not in known:
                    yield number, (f"label {value!r} is not one of {', '.join(self.names[:8])}"
                                   f"{', ...' if len(self.names) > 8 else ''}")

    def training_problems(self, table: Table) -> Iterator[tuple[int, str]]:
        found = {plain_label(row[self.label_column]) for row in table.rows}
        if self.label_kind == "classes" and len(found) < 2:
            yield 0, f"every one of the {len(table)} rows has the label {', '.join(found)!r}, and one class cannot be learned"

    def first_rows(self, table: Table, limit: int | None) -> list[dict[str, Any]]:
        """The first rows; the last question is kept whole where questions are judged together."""
        if limit is None or limit >= len(table):
            return table.rows
        if self.group is not None:
            last = question_of(table.rows[limit - 1], limit - 1)
            while limit < len(table) and question_of(table.rows[limit], limit) == last:
                limit += 1
        return table.rows[:limit]

    def features(self, table: Table, tokenizer: Any, max_length: int, *, training: bool = False,
                 labelled: bool = True) -> list[Feature]:
        label = self.label_column if labelled else None
        made = encode_sequences(table, tokenizer, self.text_columns, max_length, label, self.labels)
        return [feature | {"row": i} for i, feature in enumerate(made)]

    def metric_names(self) -> tuple[str, ...]:
        if self.label_kind == "values":
            return ("mse", "pearson", "spearman")
        grouped = {"multirc": ("f1", "exact_match", "accuracy"),
                   "record": ("f1", "exact_match", "margin_f1", "margin_exact_match")}
        return grouped.get(self.group or "", ("accuracy", *self.extra_metrics))

    def metrics(self, table: Table, features: Sequence[Feature]) -> Metrics:
        labels = np.array([feature["labels"] for feature in features])
        if self.label_kind == "values":
            return lambda prediction: correlations(scores_of(prediction), labels)
        if self.group is None:
            return lambda prediction: class_scores(scores_of(prediction), labels, self.extra_metrics)
        rows = [table.rows[feature["row"]] for feature in features]
        questions = [question_of(row, i) for i, row in enumerate(rows)]
        if self.group == "multirc":
            return lambda prediction: multirc_scores(scores_of(prediction).argmax(-1), labels, questions)
        entities, golds = [row["entity"] for row in rows], [row["answers"] for row in rows]

        def record(prediction: Any) -> dict[str, float]:
            """Published: the entity with the largest logit of class 1. That leaves out class 0's logit, on which two entities may
            differ as well; the choice by the margin between both, which is the choice by probability, stands beside it."""
            scores_BC = scores_of(prediction)
            margin_B = scores_BC[:, 1] - scores_BC[:, 0]
            found = record_scores(scores_BC[:, 1], entities, questions, golds)
            margin = record_scores(margin_B, entities, questions, golds)
            return found | {f"margin_{name}": value for name, value in margin.items()}
        return record

    def answers(self, table: Table, features: Sequence[Feature], logits: Sequence[Any]) -> list[dict[str, Any]]:
        """prediction: a class's name, with its probability, or a value."""
        flat = [np.asarray(scores, dtype=np.float64).reshape(-1) for scores in logits]
        if self.label_kind == "values":
            return [{"prediction": float(scores[0])} for scores in flat]
        best = [most_likely(scores) for scores in flat]
        return [{"prediction": self.names[index], "probability": probability} for index, probability in best]

    def show(self, table: Table, features: Sequence[Feature], tokenizer: Any, index: int) -> str:
        label = features[index].get("labels")
        name = "no label" if label is None else self.names[label] if self.label_kind == "classes" else f"{label:g}"
        return f"{tokenizer.decode(features[index]['input_ids'])}  ->  {name}"

    def settings(self) -> dict[str, Any]:
        return asdict(self)


def published_task(table: Table, text_columns: Sequence[str], names: Sequence[str], extra_metrics: Sequence[str] = (),
                   best: str = "accuracy", group: str | None = None) -> SequenceTask:
    """The task of a published data set with the column "label"; without names it is regression.

    table: the training rows. Raises DataError when they are all of one class.
    """
    seen = {row.get("label") for row in table.rows}
    if names and len(seen) == 1 and None not in seen:
        raise DataError(f"{table.source}: every label is {seen.pop()!r}, and one class cannot be learned; give training rows of "
                        f"{' and '.join(names)}.")
    kind = "classes" if names else "values"
    return SequenceTask(list(text_columns), "label", kind, list(names), extra_metrics, best, group)


def question_of(row: Mapping[str, Any], number: int) -> Hashable:
    """What the rows of one question have in common: idx without its "answer" (and "entity"), or the row alone (`number`)."""
    idx = row.get("idx", number)
    if isinstance(idx, Mapping):
        return tuple((name, idx[name]) for name in sorted(idx) if name not in ("answer", "entity"))
    return idx


def most_likely(scores_C: np.ndarray) -> tuple[int, float]:
    """The index of the largest of some logits, and its probability."""
    shifted = np.exp(scores_C - scores_C.max())
    return int(shifted.argmax()), float(shifted.max() / shifted.sum())


def _finite(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
