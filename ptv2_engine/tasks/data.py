"""Tables from files: csv, tsv, json, jsonl, parquet, and CoNLL columns. The first four need only the standard library."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptv2_engine.errors import DataError

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt", ".conll")


@dataclass
class Table:
    """Rows of one file, each a dictionary of column -> value; `source` is for messages."""

    rows: list[dict[str, Any]]
    source: str

    @property
    def columns(self) -> list[str]:
        return list(self.rows[0]) if self.rows else []

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        """Raises DataError naming the columns there are."""
        if name not in self.columns:
            raise DataError(f"{self.source} has no column {name!r}; it has {', '.join(map(repr, self.columns))}.")
        return [row[name] for row in self.rows]


def read_table(path: str | Path) -> Table:
    """Read a file by its suffix. csv and tsv need a header line; json is a list of objects or {"data": [...]}.

    Raises DataError: missing, unreadable, of an unknown suffix, or empty.
    """
    path = Path(path)
    readers = {".csv": _delimited, ".tsv": _delimited, ".json": _json, ".jsonl": _jsonl, ".parquet": _parquet,
               ".txt": _conll, ".conll": _conll}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path} has the suffix {path.suffix!r}, but files of {', '.join(SUFFIXES)} can be read; convert it.")
    if not path.is_file():
        raise DataError(f"{path} does not exist; check the path.")
    try:
        rows = list(readers[path.suffix.lower()](path))
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as {path.suffix[1:]} ({error}); repair or convert it (UTF-8).") from error
    if not rows:
        raise DataError(f"{path} has 0 examples; check the file.")
    return Table(rows, str(path))


def _delimited(path: Path) -> Iterable[dict[str, Any]]:
    tsv = path.suffix.lower() == ".tsv"
    with open(path, newline="", encoding="utf-8-sig") as file:
        # tsv benchmark files hold bare quotation marks; csv quotes its fields
        reader = csv.DictReader(file, delimiter="\t" if tsv else ",", quoting=csv.QUOTE_NONE if tsv else csv.QUOTE_MINIMAL)
        for number, row in enumerate(reader, start=2):
            if None in row or None in row.values():
                raise DataError(
                    f"{path}, line {number}: {len([v for v in row.values() if v is not None])} fields where the header "
                    f"has {len(reader.fieldnames or [])}; quote fields that hold the separator."
                )
            yield row


def _jsonl(path: Path) -> Iterable[dict[str, Any]]:
    with open(path, encoding="utf-8-sig") as file:
        yield from (json.loads(line) for line in file if line.strip())


def _json(path: Path) -> Iterable[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        loaded = json.loads(text)
    except json.JSONDecodeError:
        return list(_jsonl(path))      # many .json files hold one object a line
    rows = loaded.get("data") if isinstance(loaded, dict) else loaded
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} is JSON but not a list of objects; write [{{...}}, ...] or one object a line.")
    return rows


def _parquet(path: Path) -> Iterable[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{path} needs pyarrow to be read; pip install pyarrow, or convert it to jsonl.") from None
    import pyarrow

    try:
        return parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable parquet file ({error}); write it again.") from error


def _conll(path: Path) -> Iterable[dict[str, Any]]:
    """Blank-line separated sentences of columns: word first, tag in the last column that holds BIO tags."""
    def finished(lines: list[list[str]]) -> dict[str, Any]:
        width = min(len(fields) for fields in lines)
        columns = list(zip(*(fields[:width] for fields in lines), strict=True))
        tags = [i for i, c in enumerate(columns) if all(v == "O" or v[:2] in ("B-", "I-", "E-", "S-") for v in c)]
        if not tags:
            raise DataError(f"{path}: no column of the sentence starting {lines[0]} holds BIO tags; one tag column is needed.")
        words = 1 if width > 2 and all(v.isdigit() for v in columns[0]) and tags[0] > 1 else 0
        return {"words": list(columns[words]), "tags": list(columns[tags[0]])}

    sentence: list[list[str]] = []
    with open(path, encoding="utf-8-sig") as file:
        for line in file:
            fields = line.split()
            if not fields or fields[0] in ("-DOCSTART-", "#doc"):
                if sentence:
                    yield finished(sentence)
                sentence = []
            else:
                sentence.append(fields)
    if sentence:       # a file need not end in a blank line
        yield finished(sentence)
