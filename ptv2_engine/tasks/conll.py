"""Columns of words and tags -> rows: CoNLL-2003 and its relatives, semantic roles one predicate a line, and CoNLL-2005's columns.

Which column is which is decided once a file, from all of its lines; every error names the line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ptv2_engine.errors import DataError

_TAG = re.compile(r"O|[BIESLUM]-\S+")               # BIO (either version), BIOES, BILOU and BMES
_BLANKS = re.compile(r"[ \t]+")                      # not those inside words: the no-break space, ...
_ROLE = re.compile(r"(\([^\s()*]+)?\*\)?")          # a cell of CoNLL-2005's role columns: "(A0*", "*", "*)", "(V*)"
_MOST = 0.5          # a column with more tags than this share is one of tags, and the rest of its cells are errors to report
Line = tuple[int, list[str]]                        # line number from 1, columns


@lru_cache(maxsize=4096)
def is_tag(tag: str) -> bool:
    """Whether a tag marks spans: "O", or a prefix and a type such as "B-LOC"."""
    return _TAG.fullmatch(tag) is not None


def read_conll(path: Path, text: str) -> list[dict[str, Any]]:
    """Rows {"words", "tags"}, or {"words", "predicate", "tags"} for semantic roles, or {"words"} for one column without tags.

    Formats: columns at tabs or blanks, with blank lines, -DOCSTART- or "#doc" lines between sentences, the word first or after an
    index that counts (the last column of BIO tags is taken, so that chunks before it and flags after it do not matter);
    "predicate_index word word ... ||| tag tag ..." lines, the index from 0; CoNLL-2005 columns, where the predicates' column is
    followed by one column of brackets a predicate. A last sentence without a blank line behind it is a sentence.

    Raises DataError with the line: columns that are missing, a word without a tag, no column of tags.
    """
    lines = text.split("\n")           # str.splitlines would cut at the separators that words of scraped text hold
    if "|||" in next((line for line in lines if line.strip()), ""):
        return [_role_line(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    sentences = _sentences(lines)
    rows = [line for sentence in sentences for line in sentence]
    if not rows:
        return []
    width = _width(rows)
    if width == 1 and all(len(fields) == 1 for _, fields in rows):
        return [{"words": [fields[0] for _, fields in sentence]} for sentence in sentences]
    tag = _tag_column([fields for _, fields in rows if len(fields) == width])
    if tag is None and (roles := _role_columns(path, sentences)):
        return roles
    sentences = [kept for sentence in sentences if (kept := _without_comments(sentence, width, tag))]
    _check_width(path, sentences, width)
    if tag is None:
        raise DataError(f"{path}: none of its {width} columns holds BIO tags (O, B-TYPE, I-TYPE); one tag column is needed.")
    word = 1 if tag > 1 and _counts(sentences) else 0
    _check_cells(path, sentences, word, tag)
    return [{"words": [fields[word] for _, fields in s], "tags": [fields[tag] for _, fields in s]} for s in sentences]


def _sentences(lines: Sequence[str]) -> list[list[Line]]:
    """Lines in columns, cut at blank lines and at the marks of documents."""
    filled = [line for line in lines if line.strip() and not line.startswith(("#", "-DOCSTART-"))]
    tabs = 2 * sum("\t" in line for line in filled) > len(filled)
    sentences: list[list[Line]] = [[]]
    for number, line in enumerate(lines, start=1):
        fields = line.rstrip().split("\t") if tabs else _BLANKS.split(line.strip(" \t\r"))
        mark = fields[0].split(" ")[0]
        if not line.strip() or mark == "-DOCSTART-" or (mark in ("#doc", "#begin", "#end") and not is_tag(fields[-1])):
            sentences.append([])
        else:
            sentences[-1].append((number, fields))
    return [sentence for sentence in sentences if sentence]


def _width(rows: Sequence[Line]) -> int:
    """The number of columns that most lines have."""
    counts = Counter(len(fields) for _, fields in rows if not fields[0].startswith("#"))
    return counts.most_common(1)[0][0] if counts else len(rows[0][1])


def _tag_column(rows: Sequence[Sequence[str]]) -> int | None:
    """The last column of tags that are not all "O"; the last of nothing but "O" where there is no other."""
    found = {i: Counter(tag for fields in rows if is_tag(tag := fields[i])) for i in range(1, len(rows[0]))}
    of_tags = [i for i, tags in found.items() if sum(tags.values()) > _MOST * len(rows)]
    return max([i for i in of_tags if set(found[i]) != {"O"}] or of_tags, default=None)


def _without_comments(sentence: list[Line], width: int, tag: int | None) -> list[Line]:
    """A "#" starts a comment before a sentence, unless its line has a word's columns: "# # O", "#hashtag O"."""
    def is_comment(fields: list[str]) -> bool:
        return fields[0].startswith("#") and (len(fields) != width or (tag is not None and not is_tag(fields[tag])))

    return sentence[next((i for i, (_, fields) in enumerate(sentence) if not is_comment(fields)), len(sentence)):]


def _counts(sentences: Sequence[Sequence[Line]]) -> bool:
    """Whether the first column is the word's index, from 0 or 1, in every sentence."""
    def counts(first: list[str], start: int) -> bool:
        return first == [str(i) for i in range(start, start + len(first))]

    columns = [[fields[0] for _, fields in sentence] for sentence in sentences]
    return any(all(counts(column, start) for column in columns) for start in (0, 1))


def _check_width(path: Path, sentences: Sequence[Sequence[Line]], width: int) -> None:
    for number, fields in (line for sentence in sentences for line in sentence):
        if len(fields) != width:
            raise DataError(f"{path}, line {number}: {len(fields)} columns ({' '.join(fields)[:60]!r}), but most lines of the "
                            f"file have {width}; give each word its columns, and separate sentences by a blank line.")


def _check_cells(path: Path, sentences: Sequence[Sequence[Line]], word: int, tag: int) -> None:
    for number, fields in (line for sentence in sentences for line in sentence):
        if not is_tag(fields[tag]):
            raise DataError(f"{path}, line {number}: {fields[tag]!r} in column {tag + 1} is not a tag (O, or a prefix and a type "
                            "such as B-LOC), but the file's other lines have BIO tags there; correct the line.")
        if not fields[word]:
            raise DataError(f"{path}, line {number}: column {word + 1}, the word's, is empty; give every tag its word.")


def _role_line(path: Path, number: int, line: str) -> dict[str, Any]:
    """One predicate with its sentence, as the published CoNLL-2005 and CoNLL-2012 files have them."""
    head, bar, tail = line.partition("|||")
    index, words, tags = head.split()[:1], head.split()[1:], tail.split()
    if not bar or not index or not index[0].isdigit():
        raise DataError(f"{path}, line {number}: not 'predicate_index word ... ||| tag ...' ({line[:60]!r}); correct it.")
    if len(words) != len(tags):
        raise DataError(f"{path}, line {number}: {len(words)} words but {len(tags)} tags; give one tag a word.")
    if not int(index[0]) < len(words):
        raise DataError(f"{path}, line {number}: predicate {index[0]} of {len(words)} words; indices count from 0.")
    if wrong := next((t for t in tags if not is_tag(t)), None):
        raise DataError(f"{path}, line {number}: {wrong!r} is not a tag (O, or a prefix and a type such as B-A0); correct it.")
    return {"words": words, "predicate": int(index[0]), "tags": tags}


def _role_columns(path: Path, sentences: Sequence[Sequence[Line]]) -> list[dict[str, Any]]:
    """CoNLL-2005's columns: words first, the predicates' ("-" elsewhere), one a predicate. [] for another format."""
    rows = []
    for sentence in sentences:
        if len({len(fields) for _, fields in sentence}) != 1:
            return []
        columns = list(zip(*(fields for _, fields in sentence), strict=True))
        verbs = next((i for i in range(1, len(columns)) if sum(v != "-" for v in columns[i]) == len(columns) - 1 - i
                      and all(_ROLE.fullmatch(v) for column in columns[i + 1:] for v in column)), None)
        if verbs is None:
            return []
        at = [i for i, verb in enumerate(columns[verbs]) if verb != "-"]
        rows += [{"words": list(columns[0]), "predicate": index, "tags": _unbracketed(path, sentence, column)}
                 for index, column in zip(at, columns[verbs + 1:], strict=True)]
    return rows


def _unbracketed(path: Path, sentence: Sequence[Line], cells: Sequence[str]) -> list[str]:
    tags, role = [], ""
    for (number, _), cell in zip(sentence, cells, strict=True):
        if cell.startswith("(") and role or cell.endswith(")") and not (role or cell.startswith("(")):
            raise DataError(f"{path}, line {number}: the bracket {cell!r} does not fit those before it; roles do not nest.")
        if cell.startswith("("):
            role = cell[1:cell.index("*")]
            tags.append("B-" + role)
        else:
            tags.append("I-" + role if role else "O")
        if cell.endswith(")"):
            role = ""
    if role:
        raise DataError(f"{path}, line {sentence[-1][0]}: the role {role} is not closed at the end of its sentence; add ')'.")
    return tags
