"""Text -> token ids, label values -> class numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ptv2_engine.errors import DataError, LabelError
from ptv2_engine.packing import IGNORE
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
            return cls("tags", sorted({str(t) for tags in values for t in tags}, key=lambda t: (t != "O", t[2:], t)))
        if any(_is_fraction(v) for v in values):
            return cls("values", [])
        return cls(
            "classes", sorted({_plain(v) for v in values}, key=lambda n: (0, float(n), n) if _is_number(n) else (1, 0.0, n))
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
        return self._number(_plain(value), source)

    def _number(self, name: str, source: str) -> int:
        try:
            return self._numbers[name]
        except KeyError:
            raise LabelError(
                f"{source}: label {name!r} is not one of the {len(self.names)} known labels ({', '.join(self.names[:8])}"
                f"{', ...' if len(self.names) > 8 else ''}); correct the file, or train with data that has it."
            ) from None

    @property
    def _numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}


def _plain(value: Any) -> str:
    """True, 1 and 1.0 in different files are one label each: booleans by name, whole floats as integers."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


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
    """Features of one text column or a pair: input_ids, token_type_ids where the tokenizer makes them, labels."""
    if not 1 <= len(text_columns) <= 2:
        raise DataError(f"{len(text_columns)} text columns were given, but one text or a pair can be encoded; name one or two.")
    texts = [[str(v) for v in table.column(c)] for c in text_columns]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    features = [
        {name: encoded[name][i] for name in ("input_ids", "token_type_ids") if name in encoded} for i in range(len(table))
    ]
    if label_column is not None and labels is not None:
        for feature, value in zip(features, table.column(label_column), strict=True):
            feature["labels"] = labels.encode(value, table.source)
    return features


def encode_tokens(table: Table, tokenizer: Any, words_column: str, max_length: int, label_column: str | None = None,
                  labels: Labels | None = None) -> list[dict[str, Any]]:
    """Features of sentences split into words: the first sub-word carries the word's label, the others -100."""
    features = []
    tags = table.column(label_column) if label_column is not None and labels is not None else [None] * len(table)
    for words, row_tags in zip(table.column(words_column), tags, strict=True):
        if row_tags is not None and len(words) != len(row_tags):
            raise DataError(
                f"{table.source}: a sentence has {len(words)} words but {len(row_tags)} labels; give one label a word."
            )
        encoded = tokenizer(list(words), is_split_into_words=True, truncation=True, max_length=max_length)
        feature = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        word_ids = encoded.word_ids()
        feature["word_ids"] = word_ids
        if row_tags is not None and labels is not None:
            numbers = labels.encode(row_tags, table.source)
            firsts = [w is not None and (i == 0 or w != word_ids[i - 1]) for i, w in enumerate(word_ids)]
            feature["labels"] = [numbers[w] if first else IGNORE for w, first in zip(word_ids, firsts, strict=True)]
        features.append(feature)
    return features
