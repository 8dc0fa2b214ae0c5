"""GLM's patterns: how a SuperGLUE row, or a row of one's own, becomes text with one blank, and what may fill it.

The wording of every pattern is published (GLM, arXiv 2103.10360, appendix, and its code): single-token tasks name a verbalizer a
label, multi-token tasks bring candidate answers. Parts marked Long are cut first when a text does not fit.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptv2_engine.errors import ConfigError, DataError

Row = Mapping[str, Any]


class Long(str):
    """Text that may be shortened."""


class Blank:
    """The place of the [MASK]."""


BLANK = Blank()
Part = str | Blank


@dataclass(frozen=True)
class Pattern:
    """build: row -> parts with one BLANK. verbalizers: label -> word, or None where `answers` gives a row's candidates."""

    build: Callable[[Row], list[Part]]
    verbalizers: Mapping[str, str] | None = None
    answers: Callable[[Row], tuple[list[str], int | None]] | None = None      # candidates, the right one or None
    aliases: Mapping[str, str] | None = None                                  # how files spell labels -> ours
    length_penalty: float = 0.0
    expand: Callable[[Row, bool], list[Row]] | None = None                    # a row into the rows that are scored apart


def bare(text: str) -> str:
    """Without its final punctuation."""
    return type(text)(text.rstrip(string.punctuation))


def lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _entailment(pattern_id: int, false_or: str) -> Callable[[Row], list[Part]]:
    """RTE and CB: hypothesis, blank, premise."""
    def build(row: Row) -> list[Part]:
        premise, hypothesis = row["premise"], bare(row["hypothesis"])
        if pattern_id == 4:
            whole = row["hypothesis"] if "neither" in false_or else hypothesis
            return [Long(premise), " question:", Long(f" {whole}"), false_or, BLANK]
        point = "." if pattern_id in (2, 3) else ","
        if pattern_id in (0, 2):
            return ['"', Long(hypothesis), '" ?', BLANK, f'{point} "', Long(premise), '"']
        return [Long(hypothesis), "?", BLANK, point, Long(f" {premise}")]
    return build


def _boolq(pattern_id: int) -> Callable[[Row], list[Part]]:
    def build(row: Row) -> list[Part]:
        passage, question = Long(row["passage"]), Long(f" {row['question']}")
        if pattern_id < 2:
            return [passage, " Question:", question, "? Answer:", BLANK, "."]
        if pattern_id < 4:
            return [passage, " Based on the previous passage,", question, "?", BLANK, "."]
        return ["Based on the following passage ", question, "?", BLANK, ".", Long(f" {row['passage']}")]
    return build


def _wic(pattern_id: int) -> Callable[[Row], list[Part]]:
    def build(row: Row) -> list[Part]:
        a, b, word = row["sentence1"], row["sentence2"], row["word"]
        if pattern_id == 0:
            return [Long(f'"{a}" / "{b}"'), f' Similar sense of "{word}"?', BLANK, "."]
        if pattern_id == 1:
            return [Long(a), Long(f" {b}"), f" Does {word} have the same meaning in both sentences?", BLANK]
        return [word, " . Sense (1) (a)", Long(f' "{a}"'), " (", BLANK, ') "', b, '"']
    return build


def _multirc(pattern_id: int) -> Callable[[Row], list[Part]]:
    def build(row: Row) -> list[Part]:
        passage, question = bare(Long(row["paragraph"].rstrip())), bare(row["question"].rstrip())
        answer = row["answer"]
        return [[passage, ". Question:", f" {question}", "? Is it", f" {answer}", "?", BLANK, "."],
                [passage, ". Question:", f" {question}", '? Is the correct answer "', answer, '"?', BLANK, "."],
                [passage, ". Based on the previous passage,", f" {question}", '? Is "', answer, '" a correct answer?', BLANK,
                 "."],
                [passage, f" {question}", "- [", BLANK, "]", answer]][pattern_id]
    return build


def _copa(pattern_id: int) -> Callable[[Row], list[Part]]:
    def build(row: Row) -> list[Part]:
        one, two = (bare(lower_first(row[f"choice{i}"])) for i in (1, 2))
        premise, link = bare(Long(f" {row['premise']}")), " because" if row["question"] == "cause" else ", so"
        either = ['"', one, '" or "', two, '"?'] if pattern_id == 0 else [one, " or", f" {two}", "?"]
        return [*either, premise, link, BLANK, "."]
    return build


def _copa_answers(row: Row) -> tuple[list[str], int | None]:
    label = row.get("label")
    return [" " + bare(lower_first(row[f"choice{i}"])) for i in (1, 2)], None if label is None else int(label)


def _wsc(pattern_id: int) -> Callable[[Row], list[Part]]:
    ask = (" The pronoun '*{}*' refers to", " In the previous sentence, the pronoun '*{}*' refers to",
           " Question: In the passage above, what does the pronoun '*{}*' refer to? Answer:")[pattern_id]

    def build(row: Row) -> list[Part]:
        target = row.get("target", row)
        words, at = row["text"].split(), target["span2_index"]
        words[at] = f"*{words[at]}*"
        return [Long(" ".join(words)), ask.format(target["span2_text"]), BLANK, "."]
    return build


def _wsc_answers(row: Row) -> tuple[list[str], int | None]:
    """The span first, then the row's other noun phrases. The right one is known where the label says it is the span."""
    target = row.get("target", row)
    others = row.get("candidates") or []
    if not others:
        raise DataError("a WSC row has no candidates; add a column candidates with other noun phrases of the text, or use "
                        "the classification head, which needs none.")
    true = str(row.get("label")).lower() in ("true", "1")
    return [f" {target['span1_text']}", *(f" {other}" for other in others)], 0 if true else None


def _record(row: Row) -> list[Part]:
    before, marker, after = row["query"].partition("@placeholder")
    if not marker:
        raise DataError(f"the ReCoRD query {row['query'][:60]!r} has no @placeholder; correct the row.")
    return [Long(row["passage"]), f" {before.rstrip()}", BLANK, after]


def _record_answers(row: Row) -> tuple[list[str], int | None]:
    gold, entities = row.get("answers") or [], list(row["entities"])
    if gold and gold[0] not in entities:
        raise DataError(f"the ReCoRD answer {gold[0]!r} is not one of the row's {len(entities)} entities; correct the row.")
    return [f" {entity}" for entity in entities], entities.index(gold[0]) if gold else None


def _record_rows(row: Row, training: bool, negatives: int = 9) -> list[Row]:
    """Training: one row for each gold answer with at most nine other entities, drawn with seed 42. Evaluation: all entities."""
    if not training:
        return [row]
    generator = random.Random(42)
    rows: list[Row] = []
    for gold in dict.fromkeys(row["answers"]):
        wrong = [e for e in row["entities"] if e not in row["answers"]]
        rows.append({**row, "answers": [gold], "entities": [gold, *generator.sample(wrong, min(negatives, len(wrong)))]})
    return rows


_TRUTH = {"0": "false", "1": "true", "false": "false", "true": "true"}
_YES = {"false": " No", "true": " Yes"}
_ENTAILS = {"entailment": " Yes", "not_entailment": " No"}
_CB = {"entailment": " Yes", "contradiction": " No", "neutral": " Maybe"}
PATTERNS: dict[str, list[Pattern]] = {
    "boolq": [Pattern(_boolq(i), {"false": " false", "true": " true"} if i % 2 else _YES, aliases=_TRUTH) for i in range(6)],
    "rte": [Pattern(_entailment(i, " True or False? answer:"),
                    {"entailment": " true", "not_entailment": " false"} if i == 4 else _ENTAILS,
                    aliases={"0": "entailment", "1": "not_entailment"}) for i in range(5)],
    "cb": [Pattern(_entailment(i, " true, false or neither? answer:"),
                   {"entailment": " true", "contradiction": " false", "neutral": " neither"} if i == 4 else _CB,
                   aliases={"0": "entailment", "1": "contradiction", "2": "neutral"}) for i in range(5)],
    "wic": [Pattern(_wic(i), {"false": "2", "true": "b"} if i == 2 else _YES, aliases=_TRUTH) for i in range(3)],
    "multirc": [Pattern(_multirc(i), {"false": " False", "true": " True"} if i == 3 else _YES, aliases=_TRUTH) for i in range(4)],
    "copa": [Pattern(_copa(i), answers=_copa_answers) for i in range(2)],
    "wsc": [Pattern(_wsc(i), answers=_wsc_answers, length_penalty=1.0) for i in range(3)],
    "record": [Pattern(_record, answers=_record_answers, expand=_record_rows)],
}


def find_pattern(name: str, pattern_id: int = 0) -> Pattern:
    """A published pattern. Raises ConfigError naming what there is."""
    known = PATTERNS.get(name.lower())
    if known is None:
        raise ConfigError(f"there is no published pattern for {name!r} (there are {', '.join(PATTERNS)}); give one of your own: "
                          "--pattern '{sentence1} ... {mask}.' --verbalizers 'label= word' ...")
    if not 0 <= pattern_id < len(known):
        raise ConfigError(f"--pattern_id {pattern_id} does not exist for {name}; use 0 to {len(known) - 1}.")
    return known[pattern_id]


def own_pattern(template: str, verbalizers: Sequence[str]) -> Pattern:
    """A pattern from text such as "{premise} Question: {hypothesis}? Answer: {mask}." and "label= word" pairs.

    A space before a column belongs to the column's text and one before {mask} falls away, as GPT-2's tokens want it.
    Raises ConfigError.
    """
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"--pattern {template!r} is not understood ({error}); write columns as {{name}} and the blank as "
                          "{mask}.") from error
    fields = [field for _, field, _, _ in pieces if field is not None]
    if fields.count("mask") != 1:
        raise ConfigError(f"--pattern {template!r} has {fields.count('mask')} blanks, but needs exactly one {{mask}}.")
    words = dict(pair.partition("=")[::2] for pair in verbalizers)
    if len(words) < 2 or not all(words.values()):
        raise ConfigError(f"--verbalizers {list(verbalizers)} must name a word for each of two or more labels, as 'label= word'.")

    def build(row: Row) -> list[Part]:
        parts: list[Part] = []
        for literal, field, _, _ in pieces:
            space = " " if literal.endswith(" ") and field is not None else ""
            parts.append(literal.removesuffix(" ") if field is not None else literal)
            if field == "mask":
                parts.append(BLANK)
            elif field is not None:
                if field not in row:
                    raise DataError(f"the pattern's column {field!r} is not in the data; it has {', '.join(row)}.")
                parts.append(Long(f"{space}{row[field]}"))
        return [p for p in parts if isinstance(p, Blank) or p]

    return Pattern(build, words)
