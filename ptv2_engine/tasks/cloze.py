"""Rows -> GLM's cloze features: `[CLS] pattern with [MASK] <eos>` (part A), then `<sop>` and the answers (part B).

Part A is bidirectional, with positions 0, 1, 2, ... and block 0. Every token of part B has the position of the last [MASK] and
blocks 1, 2, 3, ...; all candidates of a row lie behind one context, each starting again at block 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ptv2_engine.errors import ConfigError, DataError
from ptv2_engine.packing import IGNORE
from ptv2_engine.tasks.cloze_patterns import BLANK, Blank, Long, Part, Pattern, Row
from ptv2_engine.tasks.glm_tokenizer import EOP, SOP


def verbalizer_ids(pattern: Pattern, tokenizer: Any) -> list[int]:
    """The token of each label, in the verbalizers' order. Raises ConfigError for a word of several tokens."""
    found = []
    for label, word in (pattern.verbalizers or {}).items():
        ids = _encode(word, tokenizer)
        if len(ids) != 1:
            raise ConfigError(f"the verbalizer {word!r} of label {label!r} is {len(ids)} tokens ({ids}), but needs to be one; "
                              "choose a word of one token (a leading space counts).")
        found += ids
    return found


def label_of(row: Row, pattern: Pattern, column: str, where: str) -> int | None:
    """The class number of a row, None where it has no label. Raises DataError."""
    assert pattern.verbalizers is not None
    value = row.get(column)
    if value is None:
        return None
    name = str(value).strip()
    known = list(pattern.verbalizers)
    for spelling in (name, (pattern.aliases or {}).get(name.lower(), name)):
        if spelling in known:
            return known.index(spelling)
    raise DataError(f"{where}: label {value!r} has no verbalizer; there are {', '.join(known)}.")


def cloze_features(row: Row, pattern: Pattern, tokenizer: Any, max_length: int, *, with_eop: bool = True,
                   label_column: str = "label", where: str = "the row") -> dict[str, Any]:
    """One row's features, plain lists.

    Returns:
        input_ids; causal_from (tokens of part A); position_ids (two lists); label, where it is known; and for candidates
        candidate_ids (-1 in part A) and target_ids (-100 in part A): what packing.with_parts and the cloze head take.
    Raises:
        DataError: the row does not fit its pattern, or nothing of its text fits max_length.
    """
    try:
        parts = pattern.build(row)
        answers, label = (None, label_of(row, pattern, label_column, where)) if pattern.answers is None else pattern.answers(row)
    except KeyError as error:
        raise DataError(f"{where} lacks the column {error.args[0]!r} of its pattern; it has "
                        f"{', '.join(map(str, row))}.") from None
    except DataError as error:
        raise DataError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    if answers is not None and len(answers) < 1:
        raise DataError(f"{where} has no candidate answers; give at least one.")
    end = [tokenizer.convert_tokens_to_ids(EOP)] if with_eop else []
    targets = None if answers is None else [_encode(answer, tokenizer) + end for answer in answers]
    part_b = 1 if targets is None else sum(map(len, targets))
    context = _context(parts, tokenizer, max_length - part_b, where)
    found = _behind(context, targets, tokenizer)
    return found if label is None else found | {"label": label}


def cloze_rows(rows: Iterable[Row], pattern: Pattern, tokenizer: Any, max_length: int, *, training: bool,
               source: str = "the file", **options: Any) -> list[dict[str, Any]]:
    """Features of a table; rows that are scored in several parts are expanded. Raises DataError naming the row (from 1)."""
    found = []
    for number, row in enumerate(rows, 1):
        for part in [row] if pattern.expand is None else pattern.expand(row, training):
            made = cloze_features(part, pattern, tokenizer, max_length, where=f"{source} row {number}", **options)
            # A row whose right candidate is unknown teaches nothing: WSC's false ones, as published
            if not training or "label" in made:
                found.append(made)
    return found


def _encode(text: str, tokenizer: Any) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _context(parts: Sequence[Part], tokenizer: Any, room: int, where: str) -> list[int]:
    """[CLS] parts <eos>, shortened to `room` tokens: from the end of the longest Long part, one token at a time."""
    if sum(isinstance(part, Blank) for part in parts) != 1:
        raise DataError(f"{where}: its pattern has {sum(isinstance(p, Blank) for p in parts)} blanks, but needs exactly one.")
    ids = [[tokenizer.mask_token_id] if part is BLANK or isinstance(part, Blank) else _encode(part, tokenizer) for part in parts]
    long = [i for i, part in enumerate(parts) if isinstance(part, Long)]
    surplus = sum(map(len, ids)) + 2 - room
    for _ in range(max(surplus, 0)):
        longest = max(long, key=lambda i: len(ids[i]), default=None)
        if longest is None or not ids[longest]:
            raise DataError(f"{where}: its pattern and answers alone need {sum(map(len, ids)) + 2} tokens beside {room} that are "
                            "left; raise --max_seq_length, or use shorter candidates.")
        ids[longest].pop()
    return [tokenizer.cls_token_id, *(i for part in ids for i in part), tokenizer.eos_token_id]


def _behind(context: list[int], targets: list[list[int]] | None, tokenizer: Any) -> dict[str, Any]:
    """Part B behind its context: <sop> alone, or <sop> and all but the last token of every candidate."""
    sep, sop = len(context), tokenizer.convert_tokens_to_ids(SOP)
    mask_at = sep - 1 - context[::-1].index(tokenizer.mask_token_id)
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


def describe_pattern(pattern: Mapping[str, Any]) -> Pattern:
    """The pattern that a training run's settings name: {"name", "pattern_id"} or {"template", "verbalizers"}."""
    from ptv2_engine.tasks.cloze_patterns import find_pattern, own_pattern

    if "template" in pattern:
        return own_pattern(pattern["template"], pattern["verbalizers"])
    return find_pattern(pattern["name"], pattern["pattern_id"])
