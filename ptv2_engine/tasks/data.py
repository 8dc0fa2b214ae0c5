"""Tables from files: csv, tsv, json, jsonl, parquet, and CoNLL columns. The first four need only the standard library."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptv2_engine.errors import DataError
from ptv2_engine.tasks.conll import read_conll

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt", ".conll", ".conllx", ".bio")
_QUOTED = re.compile(r'(?<![^\t\r\n])"[^"]*(?:""[^"]*)*"(?![^\t\r\n])')       # a whole field of a tsv in quotes


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


def _delimited(path: Path) -> list[dict[str, Any]]:
    text = _text(path)
    if path.suffix.lower() != ".tsv":
        return _separated(path, text, ",", csv.QUOTE_MINIMAL)
    # pandas and spreadsheets quote the fields of a tsv that need it, benchmarks do not and have bare quotation marks
    quoted = '"' in text and '"' not in _QUOTED.sub("", text)
    if quoted and any(map(_breaks, _QUOTED.findall(text))):
        try:                        # bare marks may begin and end fields by chance: then each line is a row without them too
            return _separated(path, text, "\t", csv.QUOTE_NONE)
        except DataError:
            pass
    return _separated(path, text, "\t", csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)


def _separated(path: Path, text: str, separator: str, quoting: Any) -> list[dict[str, Any]]:
    """Rows of columns. A line that is wrong is named by the first line of its row, where an unbalanced quote opens."""
    csv.field_size_limit(2**31 - 1)         # Python's own limit of 131,072 characters is no mistake of the file
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True)
    lines: list[tuple[int, list[str]]] = []
    first = 1
    try:
        for fields in reader:
            if fields:
                lines.append((first, fields))
            first = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {first} cannot be read as {path.suffix[1:]} ({error}, on line {reader.line_num}); close "
                        "the quote that opens there, and write quotes inside a quoted field twice.") from error
    header, rows = lines[0][1] if lines else [], lines[1:]
    for number, fields in rows:
        if len(fields) != len(header):
            over = f", over {breaks + 1} lines of one quote" if (breaks := sum(map(_breaks, fields))) else ""
            raise DataError(f"{path}, line {number}: {len(fields)} fields where the header has {len(header)}{over}; quote fields "
                            "that hold the separator, and close every quote.")
    _refuse_swallowed(path, rows, separator)
    kept = _named_columns(path, header, rows)
    return [{header[i]: fields[i] for i in kept} for _, fields in rows]


def _named_columns(path: Path, header: list[str], rows: list[tuple[int, list[str]]]) -> list[int]:
    """The columns with a name. One without may be left out where it holds numbers or nothing: the index that pandas writes, or a
    separator at the end of every line. Raises DataError for others (CoLA's own files start with an example, not with names), and
    for a name that two columns have."""
    names = [name.strip() for name in header]
    if twice := [name for name, count in Counter(names).items() if name and count > 1]:
        raise DataError(f"{path}, line 1: {', '.join(map(repr, twice))} is the name of more than one column; rename the others.")
    for i, name in enumerate(names):
        if not name and (wrong := next((f[i] for _, f in rows if f[i].strip() and not f[i].strip().isdecimal()), None)):
            raise DataError(f"{path}, line 1: column {i + 1} of {len(header)}, which holds {wrong[:40]!r}, has no name; "
                            "begin the file with a line that names its columns.")
    return [i for i, name in enumerate(names) if name]


def _refuse_swallowed(path: Path, rows: list[tuple[int, list[str]]], separator: str) -> None:
    """Raises DataError for a field with line breaks that holds other rows, from a quote that nobody closed to another such: every
    line of it has the header's number of fields, and in one column values that other rows have there as well."""
    long = [(number, fields) for number, fields in rows if len(fields) > 1 and any(map(_breaks, fields))]
    others = [set(column) for column in zip(*(f for _, f in rows if not any(map(_breaks, f))), strict=True)] if long else []
    for number, fields in long:
        for at, field in enumerate(fields):
            lines = [line.rstrip("\r").split(separator) for line in field.split("\n")]
            lines[0], lines[-1] = fields[:at] + lines[0], lines[-1] + fields[at + 1:]
            if len(lines) == 1 or any(len(line) != len(fields) for line in lines):
                continue
            if any(all(line[i] in known for line in lines) for i, known in enumerate(others) if i != at):
                raise DataError(f"{path}, line {number}: the quote that opens there goes over {len(lines)} lines that look like "
                                "rows of their own; close it, or remove it.")


def _breaks(field: str) -> int:
    return field.count("\n")


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
