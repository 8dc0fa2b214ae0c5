"""GLM's patterns: how a SuperGLUE row, or a row of one's own, becomes text with one blank, and what may fill it.

The wording of every pattern is published (GLM, arXiv 2103.10360, appendix, and its code), part by part, since each is tokenised
alone: single-token tasks name a verbalizer a label, multi-token tasks bring candidate answers. Parts marked Long are cut first
when a text does not fit. Typographic quotation marks and dashes become plain ones, as published, in all tasks but COPA.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptv2_engine.errors import ConfigError, DataError
from ptv2_engine.packing import IGNORE
from ptv2_engine.tasks.superglue import multirc_rows, record_rows, wsc_words

Row = Mapping[str, Any]
NEGATIVES = 9                      # other candidates beside the right one in a training example of ReCoRD and WSC
_PLAIN = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2013": "-"})


class Long(str):
    """Text that may be shortened."""


class Blank:
    """The place of the [MASK]."""


BLANK = Blank()
Part = str | Blank


@dataclass(frozen=True)
class Pattern:
    """What one data set's rows become.

    build: row -> parts with one BLANK. columns: the texts it reads, which must be there and not empty.
    verbalizers: label -> word, or None where `answers` gives a row's candidates and the right one's index: None where the label
    is not known, IGNORE where all that is known is that the first is wrong. aliases: how files spell labels -> ours.
    rows: official nested rows -> flat ones, which it leaves as they are. train: a flat row, the label column and the table's
    random generator -> the rows that training makes of it.
    """

    build: Callable[[Row], list[Part]]
    columns: tuple[str, ...]
    verbalizers: Mapping[str, str] | None = None
    answers: Callable[[Row, str], tuple[list[str], int | None]] | None = None
    aliases: Mapping[str, str] | None = None
    length_penalty: float = 0.0
    mix_loss: bool = False                                                    # the loss: see cloze.ClozeHead
    rows: Callable[[Iterable[Row]], list[dict[str, Any]]] | None = None
    train: Callable[[Row, str, random.Random], Iterator[Row]] | None = None


def bare(text: str) -> str:
    """Without its final punctuation."""
    return type(text)(text.rstrip(string.punctuation))


def lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def plain(text: Any) -> str:
    """With plain quotation marks, apostrophes and hyphens."""
    return str(text).translate(_PLAIN)


def known_label(value: Any) -> str | None:
    """A label as text, or None where it is not known: missing, empty, or -1 as in the test splits of the hub."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    name = "" if value is None else str(value).strip()
    return None if name in ("", "-1") else name


def _entailment(pattern_id: int, *choices: str, whole: bool = False) -> Callable[[Row], list[Part]]:
    """RTE and CB: hypothesis, blank, premise. whole: pattern 4 keeps the hypothesis' final punctuation."""
    def build(row: Row) -> list[Part]:
        premise, full = plain(row["premise"]), plain(row["hypothesis"])
        hypothesis = bare(full)
        if pattern_id == 4:
            return [Long(premise), " question:", Long(f" {full if whole else hypothesis}"), *choices, " answer:", BLANK]
        point = "." if pattern_id in (2, 3) else ","
        if pattern_id in (0, 2):
            return ['"', Long(hypothesis), '" ?', BLANK, f'{point} "', Long(premise), '"']
        return [Long(hypothesis), "?", BLANK, point, Long(f" {premise}")]
    return build


def _boolq(pattern_id: int) -> Callable[[Row], list[Part]]:
    def build(row: Row) -> list[Part]:
        passage, question = plain(row["passage"]), Long(f" {plain(row['question'])}")
        if pattern_id < 2:
            return [Long(passage), " Question:", question, "? Answer:", BLANK, "."]
        if pattern_id < 4:
            return [Long(passage), " Based on the previous passage,", question, "?", BLANK, "."]
        return ["Based on the following passage", question, "?", BLANK, ".", Long(f" {passage}")]
    return build


def _wic(pattern_id: int) -> Callable[[Row], list[Part]]:
    def build(row: Row) -> list[Part]:
        a, b, word = plain(row["sentence1"]), plain(row["sentence2"]), str(row["word"])
        if pattern_id == 0:
            return [Long(f'"{a}" / "{b}"'), f' Similar sense of "{word}"?', BLANK, "."]
        if pattern_id == 1:
            return [Long(a), Long(f" {b}"), f" Does {word} have the same meaning in both sentences?", BLANK]
        return [word, " .", ' Sense (1) (a) "', Long(a), '"', " (", BLANK, ') "', b, '"']
    return build


def _multirc(pattern_id: int) -> Callable[[Row], list[Part]]:
    def build(row: Row) -> list[Part]:
        passage, question = bare(Long(plain(row["paragraph"]).rstrip())), " " + bare(plain(row["question"]).rstrip())
        answer = plain(row["answer"])
        parts: list[list[Part]] = [
            [passage, ".", " Question:", f"{question}?", " Is it", f" {answer}", "?", BLANK, "."],
            [passage, ".", " Question:", question, "?", ' Is the correct answer "', answer, '"?', BLANK, "."],
            [passage, ". Based on the previous passage,", question, "?", ' Is "', answer, '" a correct answer?', BLANK, "."],
            [passage, question, "- [", BLANK, "]", answer],
            [passage, ".", " Question:", question, "?", f" {answer}", "?", BLANK, "."]]
        return parts[pattern_id]
    return build


def _copa(pattern_id: int) -> Callable[[Row], list[Part]]:
    def build(row: Row) -> list[Part]:
        if row["question"] not in ("cause", "effect"):
            raise DataError(f"the question {row['question']!r} is neither 'cause' nor 'effect'; correct the row.")
        one, two = (bare(lower_first(str(row[f"choice{i}"]))) for i in (1, 2))
        premise, link = bare(Long(f" {row['premise']}")), " because" if row["question"] == "cause" else ", so"
        either = ['"', one, '" or "', two, '"?'] if pattern_id == 0 else [one, " or", f" {two}", "?"]
        return [*either, premise, link, BLANK, "."]
    return build


def _copa_label(row: Row, label_column: str) -> int | None:
    label = known_label(row.get(label_column))
    if label is not None and label not in _CHOICES:
        raise DataError(f"label {row[label_column]!r} is neither 0 nor 1, the number of the right choice; correct the row.")
    return None if label is None else _CHOICES[label]


def _copa_answers(row: Row, label_column: str) -> tuple[list[str], int | None]:
    return [" " + bare(lower_first(str(row[f"choice{i}"]))) for i in (1, 2)], _copa_label(row, label_column)


def _copa_training(row: Row, label_column: str, _: random.Random) -> Iterator[Row]:
    """The row, and the row with its choices exchanged."""
    yield row
    label = _copa_label(row, label_column)
    yield {**row, "choice1": row["choice2"], "choice2": row["choice1"], label_column: None if label is None else 1 - label}


def _target(row: Row) -> Row:
    """Where the spans are: in the row itself (hub), or in its target (official)."""
    found = row.get("target") or row
    if not isinstance(found, Mapping) or not {"span1_text", "span2_text", "span2_index"} <= set(found):
        raise DataError("a WSC row has span1_text, span2_text and span2_index, its own or under target; add what is missing.")
    return found


def _wsc(pattern_id: int) -> Callable[[Row], list[Part]]:
    ask = ((" The pronoun '*{}*' refers to",), (" In the previous sentence, the pronoun '*{}*' refers to",),
           (" Question: In the passage above, what does the pronoun '*{}*' refer to?", " Answer:"))[pattern_id]

    def build(row: Row) -> list[Part]:
        pronoun = _target(row)["span2_text"]
        words, at = wsc_words({**row, "text": plain(row["text"])})
        words[at] = f"*{words[at]}*"
        return [Long(" ".join(words)), *(part.format(pronoun) for part in ask), BLANK, "."]
    return build


def _wsc_candidates(row: Row) -> list[str]:
    """The row's other noun phrases, each once; they come as texts or as {"text": ...}."""
    texts = [str(c["text"] if isinstance(c, Mapping) else c) for c in row.get("candidates") or []]
    return [text for text in dict.fromkeys(texts) if text != _target(row)["span1_text"]]


def _wsc_truth(row: Row, label_column: str) -> bool | None:
    """Whether the span is what the pronoun refers to."""
    label = known_label(row.get(label_column))
    if label is not None and label.lower() not in _TRUTH:
        raise DataError(f"label {row[label_column]!r} is neither true nor false; correct the row.")
    return None if label is None else _TRUTH[label.lower()] == "true"


def _wsc_answers(row: Row, label_column: str) -> tuple[list[str], int | None]:
    """The span first, then the row's other noun phrases. Which is right is known where the label says that the span is."""
    others, truth = _wsc_candidates(row), _wsc_truth(row, label_column)
    if not others:
        raise DataError("a WSC row has no candidates; add a column candidates with other noun phrases of the text, or use "
                        "the classification head, which needs none.")
    return [f" {text}" for text in (_target(row)["span1_text"], *others)], None if truth is None else 0 if truth else IGNORE


def _wsc_training(row: Row, label_column: str, _: random.Random) -> Iterator[Row]:
    """Nothing where the span is wrong; else nine candidates at a time, the last nine made up from the first."""
    if _wsc_truth(row, label_column) is False:
        return
    others = _wsc_candidates(row)
    for start in range(0, max(len(others), 1), NEGATIVES):
        part = others[start:start + NEGATIVES]
        yield {**row, "candidates": part + others[:NEGATIVES - len(part)] if start else part}


def _record_table(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Flat rows with plain punctuation, entities in alphabetical order, and highlights as a list, as published."""
    def once(texts: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(map(plain, texts)))

    return [{**row, "passage": plain(row["passage"]).replace("@highlight\n", "- "), "query": plain(row["query"]),
             "entities": sorted(once(row["entities"])), "answers": once(row["answers"])} for row in record_rows(rows)]


def _record(row: Row) -> list[Part]:
    before, marker, after = row["query"].partition("@placeholder")
    if not marker:
        raise DataError(f"the ReCoRD query {row['query'][:60]!r} has no @placeholder; correct the row.")
    return [Long(row["passage"]), f" {before.rstrip()}", BLANK, after]


def _record_answers(row: Row, _label_column: str) -> tuple[list[str], int | None]:
    gold, entities = row.get("answers") or [], list(row["entities"])
    if gold and gold[0] not in entities:
        raise DataError(f"the ReCoRD answer {gold[0]!r} is not one of the row's {len(entities)} entities; correct the row.")
    return [f" {entity}" for entity in entities], entities.index(gold[0]) if gold else None


def _record_training(row: Row, _label_column: str, generator: random.Random) -> Iterator[Row]:
    """One example for each gold answer, with at most nine other entities."""
    for gold in row["answers"]:
        wrong = [e for e in row["entities"] if e not in row["answers"]]
        if len(wrong) > NEGATIVES:
            generator.shuffle(wrong)
        yield {**row, "answers": [gold], "entities": [gold, *wrong[:NEGATIVES]]}
    if not row["answers"]:
        yield row


_CHOICES = {"0": 0, "1": 1, "choice1": 0, "choice2": 1}
_TRUTH = {"0": "false", "1": "true", "false": "false", "true": "true"}
_YES = {"false": " No", "true": " Yes"}
_ENTAILS = {"entailment": " Yes", "not_entailment": " No"}
_CB = {"entailment": " Yes", "contradiction": " No", "neutral": " Maybe"}
_PAIR = ("premise", "hypothesis")
PATTERNS: dict[str, list[Pattern]] = {
    "boolq": [Pattern(_boolq(i), ("passage", "question"), {"false": " false", "true": " true"} if i % 2 else _YES, aliases=_TRUTH)
              for i in range(6)],
    "rte": [Pattern(_entailment(i, " True or False?"), _PAIR,
                    {"entailment": " true", "not_entailment": " false"} if i == 4 else _ENTAILS,
                    aliases={"0": "entailment", "1": "not_entailment"}) for i in range(5)],
    "cb": [Pattern(_entailment(i, " true, false or neither?", whole=True), _PAIR,
                   {"entailment": " true", "contradiction": " false", "neutral": " neither"} if i == 4 else _CB,
                   aliases={"0": "entailment", "1": "contradiction", "2": "neutral"}) for i in range(5)],
    "wic": [Pattern(_wic(i), ("sentence1", "sentence2", "word"), {"false": "2", "true": "b"} if i == 2 else _YES, aliases=_TRUTH)
            for i in range(3)],
    "multirc": [Pattern(_multirc(i), ("paragraph", "question", "answer"),
                        {"false": " False", "true": " True"} if i == 3 else _YES, aliases=_TRUTH, rows=multirc_rows)
                for i in range(5)],
    "copa": [Pattern(_copa(i), ("premise", "choice1", "choice2", "question"), answers=_copa_answers, train=_copa_training)
             for i in range(2)],
    "wsc": [Pattern(_wsc(i), ("text",), answers=_wsc_answers, length_penalty=1.0, mix_loss=True, train=_wsc_training)
            for i in range(3)],
    "record": [Pattern(_record, ("passage", "query", "entities"), answers=_record_answers, rows=_record_table,
                       train=_record_training)],
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
                parts.append(Long(f"{space}{row[field]}"))
        return [p for p in parts if isinstance(p, Blank) or p]

    return Pattern(build, tuple(dict.fromkeys(f for f in fields if f != "mask")), words)
