"""Text -> token ids, label values -> class names and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ptv2_engine.errors import DataError, LabelError
from ptv2_engine.tasks.data import Table


@dataclass
class Labels:
    """What the labels are: kind "classes", "values" (regression) or "tags" (one a word), and the class names."""

    kind: str
    names: list[str]

    @classmethod
    def infer(cls, values: Sequence[Any], source: str) -> Labels:
        """Lists are tags, numbers with a fraction are values, anything else is a class. Raises DataError when empty."""
        if not values:
            raise DataError(f"{source} has 0 labels; check the file.")
        if isinstance(values[0], (list, tuple)):
            return cls("tags", in_order({str(t) for tags in values for t in tags}))
        if any(_is_fraction(v) for v in values):
            return cls("values", [])
        return cls(
            "classes", sorted({plain_label(v) for v in values}, key=lambda n: (0, float(n), n) if _is_number(n) else (1, 0.0, n))
        )

    @property
    def num_labels(self) -> int:
        return max(len(self.names), 1)

    @property
    def id2label(self) -> dict[int, str] | None:
        return dict(enumerate(self.names)) if self.names else None

    def encode(self, value: Any, source: str) -> Any:
        """A class number, a float, or a list of class numbers. Raises LabelError for a name that training did not have."""
        if self.kind == "values":
            if not _is_number(value):
                raise LabelError(f"{source}: label {value!r} is not a number, but this is a regression task; correct the file.")
            return float(value)
        if self.kind == "tags":
            return [self._number(t, source) for t in value]
        return self._number(plain_label(value), source)

    def _number(self, name: str, source: str) -> int:
        try:
            return self._numbers[name]
        except KeyError:
            raise LabelError(
                f"{source}: label {name!r} is not one of the {len(self.names)} known labels ({', '.join(self.names[:8])}"
                f"{', ...' if len(self.names) > 8 else ''}); correct the file, or train with data that has it."
            ) from None

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}


def in_order(names: set[str]) -> list[str]:
    """"O", then types with their prefixes side by side: O, B-LOC, I-LOC, B-PER, ..."""
    return sorted(names, key=lambda name: (name != "O", name[2:], name))


def plain_label(value: Any) -> str:
    """The name of a label's class: 1 and 1.0 in different files are one class, and so are true and "True"."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def label_name(value: Any, names: Sequence[str]) -> Any:
    """The class that a published file means, by name (in any case) or number; a float for regression (no names).

    None where the label is not known: missing, empty, or -1. What is no label at all comes back as it is, to be reported later.
    """
    name = "" if value is None else plain_label(value)
    if not name or name in ("-1", "-1.0") and name not in names:
        return None
    if not names:
        return float(value) if _is_number(value) else value
    same = {known.lower(): known for known in names}
    if name in names or name.lower() in same:
        return name if name in names else same[name.lower()]
    return names[int(name)] if name.isdecimal() and int(name) < len(names) else value


def pick_columns(table: Table, columns: Mapping[str, Sequence[str]], names: Sequence[str], *,
                 labels: Sequence[str] = ("label",)) -> list[dict[str, Any]]:
    """Rows of a published file under our column names, with "label" (label_name's) where any row has one, and "idx".

    columns: ours -> what files call it, the first that a row has. Raises DataError naming the row (from 1) that lacks one.
    """
    rows = []
    for number, row in enumerate(table.rows, 1):
        found = {ours: next((row[theirs] for theirs in known if theirs in row), None) for ours, known in columns.items()}
        missing = next((ours for ours, value in found.items() if value is None), None)
        if missing is not None:
            raise DataError(f"{table.source} row {number} has no column {' or '.join(columns[missing])}; it has "
                            f"{', '.join(map(str, row))}.")
        label = label_name(next((row[column] for column in labels if column in row), None), names)
        rows.append(found | {"label": label} | ({"idx": row["idx"]} if "idx" in row else {}))
    return without_unknown(rows)


def without_unknown(rows: list[dict[str, Any]], column: str = "label") -> list[dict[str, Any]]:
    """Rows without their label column where none of them knows its label: a test split."""
    if any(row[column] is not None for row in rows):
        return rows
    return [{name: value for name, value in row.items() if name != column} for row in rows]


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and not float(value).is_integer()


def encode_sequences(table: Table, tokenizer: Any, text_columns: Sequence[str], max_length: int,
                     label_column: str | None = None, labels: Labels | None = None) -> list[dict[str, Any]]:
    """Features of one text column or a pair: input_ids, token_type_ids where the tokenizer makes them, labels.

    Raises DataError (columns), LabelError naming the row (from 1).
    """
    if not 1 <= len(text_columns) <= 2:
        raise DataError(f"{len(text_columns)} text columns were given, but one text or a pair can be encoded; name one or two.")
    texts = [[str(v) for v in table.column(c)] for c in text_columns]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    features = [
        {name: encoded[name][i] for name in ("input_ids", "token_type_ids") if name in encoded} for i in range(len(table))
    ]
    if label_column is not None and labels is not None:
        for number, (feature, value) in enumerate(zip(features, table.column(label_column), strict=True), 1):
            feature["labels"] = labels.encode(value, f"{table.source} row {number}")
    return features
