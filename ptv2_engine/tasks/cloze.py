"""Rows -> cloze features: text with one blank, and what may fill it.

GLM: `[CLS] pattern with [MASK] <eos>` (part A), then `<sop>` and the answers (part B). Part A is bidirectional, with positions
0, 1, 2, ... and block 0. Every token of part B has the position of the last [MASK] and blocks 1, 2, 3, ...; all candidates of a
row lie behind one context, each starting again at block 1.

Masked language models (BERT, RoBERTa): `[CLS] pattern with [MASK] [SEP]`, an ordinary input, and where its mask is.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptv2_engine.errors import ConfigError, DataError
from ptv2_engine.packing import IGNORE
from ptv2_engine.tasks.cloze_patterns import Blank, Long, Part, Pattern, Row, find_pattern, known_label, own_pattern
from ptv2_engine.tasks.glm_tokenizer import EOP, SOP


@dataclass(frozen=True)
class Example:
    """A row before it is tokenised. row: its index in the table. answers: its candidates, None where there are verbalizers.
    label: the right answer's index, IGNORE where only a wrong one is known, None where nothing is."""

    row: int
    parts: list[Part]
    answers: list[str] | None
    label: int | None


def describe_pattern(pattern: Mapping[str, Any]) -> Pattern:
    """The pattern that a training run's settings name: {"name", "pattern_id"} or {"template", "verbalizers"}."""
    if "template" in pattern:
        return own_pattern(pattern["template"], pattern["verbalizers"])
    return find_pattern(pattern["name"], pattern.get("pattern_id", 0))


def verbalizer_ids(pattern: Pattern, tokenizer: Any) -> list[int]:
    """The token of each label, in the verbalizers' order. Raises ConfigError for a word of several tokens."""
    words = pattern.verbalizers or {}
    encoded = encode_texts(words.values(), tokenizer)
    for label, word in words.items():
        if len(encoded[word]) != 1:
            raise ConfigError(f"the verbalizer {word!r} of label {label!r} is {len(encoded[word])} tokens ({encoded[word]}), but "
                              "needs to be one; choose a word of one token (a leading space counts).")
    return [encoded[word][0] for word in words.values()]


def label_of(row: Row, pattern: Pattern, column: str) -> int | None:
    """The class number of a row, None where its label is not known (missing, empty or -1). Raises DataError."""
    assert pattern.verbalizers is not None
    known, value = list(pattern.verbalizers), row.get(column)
    if str(value).strip() in known:
        return known.index(str(value).strip())
    name = known_label(value)
    if name is None:
        return None
    spelling = (pattern.aliases or {}).get(name.lower(), name)
    if spelling in known:
        return known.index(spelling)
    raise DataError(f"label {value!r} has no verbalizer; there are {', '.join(known)}.")


def example_of(row: Row, pattern: Pattern, label_column: str = "label", index: int = 0) -> Example:
    """One flat row's text and answers. Raises DataError, without the row's number."""
    _check_columns(row, pattern)
    parts = pattern.build(row)
    answers, label = (None, label_of(row, pattern, label_column)) if pattern.answers is None else pattern.answers(
        row, label_column)
    blanks = sum(isinstance(part, Blank) for part in parts)
    if blanks != 1:
        raise DataError(f"its pattern has {blanks} blanks, but needs exactly one.")
    return Example(index, parts, answers, label)


def _check_columns(row: Row, pattern: Pattern) -> None:
    for column in pattern.columns:
        if column not in row:
            raise DataError(f"the column {column!r} of its pattern is missing; it has {', '.join(map(str, row))}.")
        value = row[column]
        if value is None or isinstance(value, (str, list, tuple)) and not (value.strip() if isinstance(value, str) else value):
            raise DataError(f"the column {column!r} is empty; fill it, or leave the row out.")


def examples_of(rows: Iterable[Row], pattern: Pattern, label_column: str = "label", *, training: bool = False,
                labelled: bool = True, source: str = "the file") -> list[Example]:
    """The examples of flat rows (Pattern.rows makes them flat), in order.

    training: the published ones: COPA with its choices exchanged too, WSC's right spans, ReCoRD's gold answers one by one.
    labelled: every row must have a label. Raises DataError naming the row (from 1).
    """
    found: list[Example] = []
    generator = random.Random(42)              # as published: one for the whole table
    for number, row in enumerate(rows, 1):
        try:
            parts: Iterable[Row] = [row]
            if training and pattern.train is not None:
                _check_columns(row, pattern)
                parts = pattern.train(row, label_column, generator)
            for part in parts:
                made = example_of(part, pattern, label_column, number - 1)
                if labelled and made.label is None:
                    raise DataError(f"its label is not known ({label_column!r} is missing, empty or -1); add it, or predict "
                                    "instead.")
                found.append(made)
        except DataError as error:
            raise DataError(f"{source} row {number}: {error}") from None
    return found


def encode_texts(texts: Iterable[str], tokenizer: Any) -> dict[str, list[int]]:
    """The tokens of each different text, in one call. What spells a special token is text like any other: a user's "[MASK]" is
    no blank."""
    different = list(dict.fromkeys(map(str, texts)))
    if not different:
        return {}
    made = tokenizer(different, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return dict(zip(different, made["input_ids"], strict=True))


def cloze_features(examples: Sequence[Example], tokenizer: Any, max_length: int, *, labelled: bool = True,
                   source: str = "the file") -> list[dict[str, Any]]:
    """Features of examples, plain lists.

    max_length: of everything that a row brings, with all its candidates.
    Returns:
        input_ids, row, labels where they are known and asked for; for GLM causal_from (tokens of part A), position_ids (two
        lists), and for candidates candidate_ids (-1 in part A) and target_ids (-100 in part A): what packing.with_parts and the
        cloze head take; for masked language models mask_positions, the index of the blank.
    Raises:
        DataError: nothing of a row's text fits max_length. ConfigError: a tokenizer without a mask, or candidates without GLM.
    """
    glm = _sop(tokenizer) is not None
    if not glm and any(example.answers is not None for example in examples):
        raise ConfigError("candidates of several tokens need GLM, but this tokenizer is a masked language model's; use a pattern "
                          "with verbalizers, or another head.")
    if tokenizer.mask_token_id is None:
        raise ConfigError("this tokenizer has no mask token, so no blank can be filled; use a classifier head.")
    texts = (text for e in examples for text in (*e.parts, *(e.answers or ())) if isinstance(text, str))
    ids = encode_texts(texts, tokenizer)
    end = [tokenizer.convert_tokens_to_ids(EOP)]
    found = []
    for example in examples:
        targets = None if example.answers is None else [ids[answer] + end for answer in example.answers]
        part_b = int(glm) if targets is None else sum(map(len, targets))
        context = _context(example, ids, tokenizer, glm, max_length - part_b, source)
        mask_at = context.index(tokenizer.mask_token_id)       # the only one: texts hold none
        feature = _behind(context, mask_at, targets, tokenizer) if glm else {"input_ids": context, "mask_positions": mask_at}
        feature["row"] = example.row
        found.append(feature | {"labels": example.label} if labelled and example.label is not None else feature)
    return found


def cloze_rows(rows: Iterable[Row], pattern: Pattern, tokenizer: Any, max_length: int, *, training: bool = False,
               labelled: bool = True, label_column: str = "label", source: str = "the file") -> list[dict[str, Any]]:
    """Features of a table's rows, official nested ones too. Raises DataError naming the row (from 1)."""
    examples = examples_of(flat_rows(rows, pattern, source), pattern, label_column, training=training, labelled=labelled,
                           source=source)
    return cloze_features(examples, tokenizer, max_length, labelled=labelled, source=source)


def flat_rows(rows: Iterable[Row], pattern: Pattern, source: str = "the file") -> list[Any]:
    """One row an example: official MultiRC and ReCoRD files nest theirs. Raises DataError."""
    try:
        return list(rows) if pattern.rows is None else pattern.rows(rows)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None


def _sop(tokenizer: Any) -> int | None:
    """GLM's <sop>, None for the tokenizer of a masked language model."""
    found = tokenizer.convert_tokens_to_ids(SOP)
    return None if found is None or found == tokenizer.unk_token_id else found


def _context(example: Example, encoded: Mapping[str, list[int]], tokenizer: Any, glm: bool, room: int, source: str) -> list[int]:
    """[CLS] parts <eos> (or [SEP]), shortened to `room` tokens: from the end of the longest Long part, one token at a time."""
    ids = [[tokenizer.mask_token_id] if isinstance(part, Blank) else encoded[part] for part in example.parts]
    long = [i for i, part in enumerate(example.parts) if isinstance(part, Long)]
    for _ in range(sum(map(len, ids)) + 2 - room):
        longest = max(reversed(long), key=lambda i: len(ids[i]), default=None)      # of equal ones the last, as published
        if longest is None or not ids[longest]:
            raise DataError(f"{source} row {example.row + 1}: its pattern and answers alone need {sum(map(len, ids)) + 2} tokens "
                            f"beside {room} that are left; raise --max_seq_length, or use shorter candidates.")
        ids[longest] = ids[longest][:-1]
    return [tokenizer.cls_token_id, *(i for part in ids for i in part), tokenizer.eos_token_id if glm else tokenizer.sep_token_id]


def _behind(context: list[int], mask_at: int, targets: list[list[int]] | None, tokenizer: Any) -> dict[str, Any]:
    """Part B behind its context: <sop> alone, or <sop> and all but the last token of every candidate."""
    sep, sop = len(context), _sop(tokenizer)
    assert sop is not None
    ids, blocks = list(context), [0] * sep
    candidates, predicted = [-1] * sep, [IGNORE] * sep
    for c, target in enumerate([[sop]] if targets is None else targets):
        ids += [sop, *target[:-1]]
        blocks += range(1, len(target) + 1)
        candidates += [c] * len(target)
        predicted += target
    positions = [*range(sep), *[mask_at] * (len(ids) - sep)]
    found: dict[str, Any] = {"input_ids": ids, "causal_from": sep, "position_ids": [positions, blocks]}
    return found if targets is None else found | {"candidate_ids": candidates, "target_ids": predicted}
