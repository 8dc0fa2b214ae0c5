"""Multiple choice: each choice is read behind the row's text, a head gives it one score, and the scores of a row compete."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from ptv2_engine.errors import ConfigError, DataError, LabelError
from ptv2_engine.tasks.base import Feature, Metrics, Task
from ptv2_engine.tasks.data import Table
from ptv2_engine.tasks.metrics import best_of, scores_of
from ptv2_engine.tasks.sequences import most_likely


@dataclass
class ChoiceTask(Task):
    """Choose one of two or more texts.

    text_columns: joined by spaces, the first segment of every choice. choice_columns: one column a choice, or a single column
    that holds lists of them; then rows may differ in their number. A label is an index from 0 (also as text), the name of a
    choice's column, or the text of a choice, and is looked for in this order.
    """

    kind: ClassVar[str] = "choice"
    model_task: ClassVar[str] = "multiple-choice"
    text_columns: list[str]
    choice_columns: list[str]
    label_column: str

    def __post_init__(self) -> None:
        self.text_columns, self.choice_columns = list(self.text_columns), list(self.choice_columns)
        if not self.text_columns or not self.choice_columns:
            raise ConfigError(f"{len(self.text_columns)} text columns and {len(self.choice_columns)} choice columns were given; "
                              "name one or more of each.")

    def model_options(self, tokenizer: Any) -> dict[str, Any]:
        return {"num_labels": 1}

    def choices(self, row: Mapping[str, Any]) -> list[str]:
        """A row's choices; those without text are "" here."""
        if len(self.choice_columns) == 1:
            given = row.get(self.choice_columns[0])
            return ["" if c is None else str(c) for c in given] if isinstance(given, (list, tuple)) else []
        return ["" if row.get(column) is None else str(row[column]) for column in self.choice_columns]

    def index(self, row: Mapping[str, Any]) -> int | None:
        """The number of the right choice from 0, None where the row has no label. Raises LabelError where it fits no choice."""
        value, choices = row.get(self.label_column), self.choices(row)
        name = "" if value is None else str(value).strip()
        if not name:
            return None
        number = _number(value)
        if number is not None and number < len(choices):
            return number
        if len(self.choice_columns) > 1 and name in self.choice_columns:
            return self.choice_columns.index(name)
        texts = [choice.strip() for choice in choices]
        if name in texts:
            return texts.index(name)
        columns = f", {', '.join(self.choice_columns)}" if len(self.choice_columns) > 1 else ""
        raise LabelError(f"label {value!r} is none of the row's {len(choices)} choices; give its index (0 to {len(choices) - 1})"
                         f"{columns} or its text.")

    def problems(self, table: Table, labelled: bool = True) -> Iterator[tuple[int, str]]:
        if labelled and self._counts_from_one(table):
            yield 0, "no label is 0 and some are the number of their row's choices, so they look 1-based; subtract 1 from all"
        for number, row in enumerate(table.rows, 1):
            for column in self.text_columns:
                if row.get(column) is None or not str(row[column]).strip():
                    yield number, f"the text {column!r} is empty" if column in row else f"there is no column {column!r}"
            missing = [column for column in self.choice_columns if column not in row]
            choices = self.choices(row)
            if missing:
                yield number, f"there is no column {missing[0]!r}"
            elif len(choices) < 2:
                yield number, f"there are {len(choices)} choices in {self.choice_columns[0]!r}, but two or more are needed"
            else:
                yield from ((number, f"choice {i} is empty") for i, choice in enumerate(choices) if not choice.strip())
            if labelled and not missing:
                try:
                    if self.index(row) is None:
                        yield number, f"the label {self.label_column!r} is missing"
                except LabelError as error:
                    yield number, str(error).partition(";")[0]

    def _counts_from_one(self, table: Table) -> bool:
        """Whether the labels there are go from 1 to the number of choices, and the last choice's fits no index, name or text."""
        last = False
        for row in table.rows:
            label, choices = row.get(self.label_column), self.choices(row)
            number = _number(label)
            if label in (None, ""):
                continue
            if number is None or not 1 <= number <= len(choices):
                return False
            last = last or number == len(choices) and str(number) not in map(str.strip, choices)
        return last

    def features(self, table: Table, tokenizer: Any, max_length: int, *, training: bool = False,
                 labelled: bool = True) -> list[Feature]:
        """input_ids and token_type_ids are lists of C lists, one a choice; labels is the number of the right one."""
        for column in (*self.text_columns, *self.choice_columns):
            table.column(column)
        choices = [self.choices(row) for row in table.rows]
        features: list[Feature] = []
        for i, row in enumerate(table.rows):
            where = f"{table.source} row {i + 1}"
            if len(choices[i]) < 2:
                raise DataError(f"{where} has {len(choices[i])} choices, but two or more are needed; correct the row.")
            features.append({"row": i})
            if labelled:
                try:
                    index = self.index(row)
                except LabelError as error:
                    raise LabelError(f"{where}: {error}") from None
                if index is None:
                    raise LabelError(f"{where} has no label in column {self.label_column!r}; add it, or leave the row out.")
                features[-1]["labels"] = index
        firsts = [self._text(row) for row, of_row in zip(table.rows, choices, strict=True) for _ in of_row]
        encoded = tokenizer(firsts, [c for of_row in choices for c in of_row], truncation=True, max_length=max_length)
        start = 0
        for feature, of_row in zip(features, choices, strict=True):
            end = start + len(of_row)
            feature |= {name: encoded[name][start:end] for name in ("input_ids", "token_type_ids") if name in encoded}
            start = end
        return features

    def metrics(self, table: Table, features: Sequence[Feature]) -> Metrics:
        labels = np.array([feature["labels"] for feature in features])
        counts = [len(feature["input_ids"]) for feature in features]

        def accuracy(prediction: Any) -> dict[str, float]:
            return {"accuracy": float((best_of(scores_of(prediction), counts) == labels).mean())}
        return accuracy

    def answers(self, table: Table, features: Sequence[Feature], logits: Sequence[Any]) -> list[dict[str, Any]]:
        """prediction (a choice's number from 0), prediction_text (the choice itself) and its probability."""
        found = []
        for feature, scores in zip(features, logits, strict=True):
            choices = self.choices(table.rows[feature["row"]])
            best, probability = most_likely(np.asarray(scores, dtype=np.float64).reshape(-1)[:len(choices)])
            found.append({"prediction": best, "prediction_text": choices[best], "probability": probability})
        return found

    def show(self, table: Table, features: Sequence[Feature], tokenizer: Any, index: int) -> str:
        feature = features[index]
        lines = [f"{i}: {tokenizer.decode(ids)}" for i, ids in enumerate(feature["input_ids"])]
        return "\n".join([*lines, f"->  {feature.get('labels', 'no label')}"])

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def _text(self, row: Mapping[str, Any]) -> str:
        return " ".join(str(row[column]).strip() for column in self.text_columns)


def _number(label: Any) -> int | None:
    """The whole number from 0 that a label is, also as text; None for others."""
    name = str(label).strip().removesuffix(".0")
    return int(name) if name.isdecimal() else None
