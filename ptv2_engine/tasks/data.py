"""Tables from files: csv, tsv, json, jsonl, parquet, and CoNLL columns. The first four need only the standard library."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptv2_engine.errors import DataError
from ptv2_engine.tasks.conll import read_conll

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt", ".conll", ".conllx", ".bio")


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
        for number, row in enumerate(self.rows, start=1):
            if name not in row:
                raise DataError(f"{self.source}: row {number} has no {name!r}; it has {', '.join(map(repr, row))}.")
        return [row[name] for row in self.rows]


def read_table(path: str | Path) -> Table:
    """Read a file by its suffix. csv and tsv need a header line; json is a list of objects or {"data": [...]}.

    Raises DataError: missing, unreadable, of an unknown suffix, or empty.
    """
    path = Path(path)
    readers = {".csv": _delimited, ".tsv": _delimited, ".json": _json, ".jsonl": _jsonl, ".parquet": _parquet,
               ".txt": _conll, ".conll": _conll, ".conllx": _conll, ".bio": _conll}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path} has the suffix {path.suffix!r}, but files of {', '.join(SUFFIXES)} can be read; convert it.")
    if not path.is_file():
        raise DataError(f"{path} does not exist; check the path.")
    rows = list(readers[path.suffix.lower()](path))
    if not rows:
        raise DataError(f"{path} has 0 examples; check the file.")
    return Table(rows, str(path))


def _text(path: Path) -> str:
    """Raises DataError with the first line that is not UTF-8: files put together from several sources mix encodings."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[:error.start]
        raise DataError(f"{path}, line {before.count(bytes([10])) + 1} is not UTF-8 (byte {content[error.start]:#04x} at "
                        f"{error.start}); convert the file to UTF-8.") from error


def _delimited(path: Path) -> Iterable[dict[str, Any]]:
    tsv = path.suffix.lower() == ".tsv"
    csv.field_size_limit(2**31 - 1)         # Python's own limit of 131,072 characters is no mistake of the file
    # tsv benchmark files hold bare quotation marks; csv quotes its fields
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter="\t" if tsv else ",",
                            quoting=csv.QUOTE_NONE if tsv else csv.QUOTE_MINIMAL)
    try:
        for row in reader:
            if None in row or None in row.values():
                fields = len([v for v in row.values() if v is not None]) + len(row.get(None, ())) - (None in row)
                raise DataError(f"{path}, line {reader.line_num}: {fields} fields where the header has "
                                f"{len(reader.fieldnames or [])}; quote fields that hold the separator.")
            yield row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} cannot be read as {path.suffix[1:]} ({error}); repair it.") from error


def _jsonl(path: Path) -> Iterable[dict[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} cannot be read as jsonl ({error.msg}); repair it.") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is JSON but not an object; write {{\"column\": value, ...}}.")
        yield row


def _json(path: Path) -> Iterable[dict[str, Any]]:
    text = _text(path)
    try:
        loaded = json.loads(text)
    except json.JSONDecodeError as error:
        try:
            json.loads(next((line for line in text.split("\n") if line.strip()), ""))
        except json.JSONDecodeError:
            raise DataError(f"{path}, line {error.lineno} cannot be read as json ({error.msg}); repair it.") from error
        return list(_jsonl(path))      # many .json files hold one object a line
    rows = loaded.get("data") if isinstance(loaded, dict) else loaded
    if not isinstance(rows, list):
        raise DataError(f"{path} is JSON but not a list of objects; write [{{...}}, ...] or one object a line.")
    if wrong := next((i for i, row in enumerate(rows, start=1) if not isinstance(row, dict)), None):
        raise DataError(f"{path} is JSON but not a list of objects: entry {wrong} is none; write [{{...}}, ...].")
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
    return read_conll(path, _text(path))
