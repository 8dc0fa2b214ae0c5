"""Extractive question answering: the answer to a question is a span of a context, or, on request, nothing.

A context that is too long becomes several windows that overlap. In each one the first and the last token of the answer are
learned, and [CLS] twice where it is not in there.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ptv2_engine.errors import ConfigError, DataError
from ptv2_engine.tasks.base import Feature, Metrics, Task
from ptv2_engine.tasks.data import Table
from ptv2_engine.tasks.span_search import Found, search, windows_of
from ptv2_engine.tasks.squad_metrics import squad_scores

_ROWS = 1000         # tokenised at a time: Python lists of offsets are large


@dataclass
class SpanTask(Task):
    """Rows of a question, a context and answers, {"text": [...], "answer_start": [characters]} (qa.normal_table makes them).

    unanswerable: a row may have no answer (SQuAD 2.0). n_best_size, max_answer_length (tokens): of the search for an answer.
    null_threshold: by how much no answer must outscore the best one. doc_stride: tokens that neighbouring windows share; at most
    half of the room for the context, where a long question leaves little.
    """

    kind = "span"
    model_task = "question-answering"
    best = "f1"
    epoch_decay = 0.95

    question_column: str = "question"
    context_column: str = "context"
    answers_column: str = "answers"
    id_column: str = "id"
    unanswerable: bool = False
    n_best_size: int = 20
    max_answer_length: int = 30
    null_threshold: float = 0.0
    doc_stride: int = 128

    def __post_init__(self) -> None:
        for name, least in (("n_best_size", 1), ("max_answer_length", 1), ("doc_stride", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} {getattr(self, name)} is below {least}; use {least} or more.")

    def model_options(self, tokenizer: Any) -> dict[str, Any]:
        return {"num_labels": 2}

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def problems(self, table: Table, labelled: bool = True) -> Iterator[tuple[int, str]]:
        needed = [self.question_column, self.context_column, *([self.answers_column] if labelled else [])]
        absent = [name for name in needed if name not in table.columns]
        if absent:
            yield 0, (f"there is no column {' and no column '.join(map(repr, absent))}; the file has "
                      f"{', '.join(map(repr, table.columns)) or '0 rows'}")
            return
        first: dict[str, int] = {}
        for number, row in enumerate(table.rows, 1):
            given = row.get(self.id_column)
            if given not in (None, "") and first.setdefault(str(given), number) != number:
                yield number, (f"the {self.id_column} {given!r} is row {first[str(given)]}'s as well, but predictions go by it; "
                               "give each question its own")
            for name in needed[:2]:
                text = "" if row.get(name) is None else row[name]
                if not isinstance(text, str):
                    yield number, f"the {name} is {text!r}, not a text"
                elif not text.strip():
                    yield number, f"the {name} is empty"
            if labelled and isinstance(row.get(self.context_column), str) and row[self.context_column].strip():
                yield from ((number, what) for what in self._answer_problems(row))

    def _answer_problems(self, row: dict[str, Any]) -> Iterator[str]:
        try:
            golds = gold_answers(row.get(self.answers_column))
        except DataError as error:
            yield str(error)
            return
        if not golds and not self.unanswerable:
            yield "there is no answer, but every question of this task has one; leave the row out, or train as for squad_v2"
        wrong = (what_is_wrong(row[self.context_column], text, start) for text, start in dict.fromkeys(golds))
        yield from (what for what in wrong if what is not None)

    def has_labels(self, table: Table) -> bool:
        """Where every question has an answer, a table without any is unlabelled."""
        if self.unanswerable:
            return super().has_labels(table)
        return any(row[self.answers_column] and (not isinstance(row[self.answers_column], dict)
                                                 or row[self.answers_column].get("text")) for row in table.rows
                   if self.answers_column in row)

    def features(self, table: Table, tokenizer: Any, max_length: int, *, training: bool = False,
                 labelled: bool = True) -> list[Feature]:
        """One feature a window: input_ids, token_type_ids where the tokenizer makes them, row; with labels start_positions and
        end_positions (tokens); unless training offsets, each token's (begin, end) in the context, None outside it."""
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(f"{type(tokenizer).__name__} does not say where its tokens stand in the text, which question "
                              "answering needs; use a backbone with a fast tokenizer (tokenizer.json).")
        questions = [str(q).lstrip() for q in table.column(self.question_column)]      # blanks there are tokens, as published
        contexts = [str(c) for c in table.column(self.context_column)]
        spans = self._first_answers(table) if labelled else None
        by_stride: dict[int, list[int]] = defaultdict(list)
        for row, room in enumerate(self._rooms(table.source, questions, tokenizer, max_length)):
            by_stride[min(self.doc_stride, room // 2)].append(row)
        found: list[list[Feature]] = [[] for _ in questions]
        for stride, rows in by_stride.items():
            for start in range(0, len(rows), _ROWS):
                part = rows[start:start + _ROWS]
                encoded = tokenizer([questions[r] for r in part], [contexts[r] for r in part], truncation="only_second",
                                    max_length=max_length, stride=stride, return_overflowing_tokens=True,
                                    return_offsets_mapping=True, return_attention_mask=False)
                for i, sample in enumerate(encoded["overflow_to_sample_mapping"]):
                    row = part[sample]
                    feature: Feature = {n: encoded[n][i] for n in ("input_ids", "token_type_ids") if n in encoded}
                    offsets = [o if part_of == 1 else None
                               for o, part_of in zip(encoded["offset_mapping"][i], encoded.sequence_ids(i), strict=True)]
                    if spans is not None:
                        feature["start_positions"], feature["end_positions"] = token_span(offsets, spans[row])
                    if not training:
                        feature["offsets"] = offsets
                    found[row].append(feature | {"row": row})
        return [feature for of_row in found for feature in of_row]

    def _rooms(self, source: str, questions: list[str], tokenizer: Any, max_length: int) -> Iterator[int]:
        """Tokens that each question leaves for its context. Raises DataError where that is none."""
        special = tokenizer.num_special_tokens_to_add(pair=True)
        for start in range(0, len(questions), _ROWS):
            part = tokenizer(questions[start:start + _ROWS], add_special_tokens=False, verbose=False)["input_ids"]
            for number, ids in enumerate(part, start + 1):
                if len(ids) + special >= max_length:
                    raise DataError(f"{source}, row {number}: the question has {len(ids)} tokens and with {special} special ones "
                                    f"leaves none of {max_length} for the context; shorten it, or raise --max_seq_length.")
                yield max_length - special - len(ids)

    def _first_answers(self, table: Table) -> list[tuple[int, int] | None]:
        """(first character, the one behind the last) of each row's first answer, without outer blanks. Raises DataError."""
        found: list[tuple[int, int] | None] = []
        rows = zip(table.column(self.answers_column), table.column(self.context_column), strict=True)
        for number, (answers, context) in enumerate(rows, 1):
            try:
                golds = gold_answers(answers)[:1]
            except DataError as error:
                raise DataError(f"{table.source}, row {number}: {error}.") from None
            for text, start in golds:
                wrong = what_is_wrong(str(context), text, start)
                if wrong is not None:
                    raise DataError(f"{table.source}, row {number}: {wrong}; correct the row, or leave it out.")
                begin = start + len(text) - len(text.lstrip())
                found.append((begin, begin + len(text.strip())))
            if not golds:
                found.append(None)
        return found

    def metric_names(self) -> tuple[str, ...]:
        if not self.unanswerable:
            return ("exact_match", "f1")
        of_rows = tuple(rows + name for rows in ("", "HasAns_", "NoAns_") for name in ("exact", "f1", "total"))
        return (*of_rows, "best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh")

    def metrics(self, table: Table, features: Sequence[Feature]) -> Metrics:
        """Version 2.0's scores where a row may have no answer, else version 1.1's; see squad_metrics.squad_scores."""
        golds = [[text for text, _ in gold_answers(answers)] for answers in table.column(self.answers_column)]
        contexts, windows = table.column(self.context_column), windows_of(features)

        def scores(prediction: Any) -> dict[str, float]:
            starts, ends = prediction.predictions[:2]
            found = search(windows, starts, ends, len(contexts), self.n_best_size, self.max_answer_length)
            guesses = [_text(context, of_row) for context, of_row in zip(contexts, found, strict=True)]
            if not self.unanswerable:
                return squad_scores(golds, guesses)
            return squad_scores(golds, guesses, unanswerable=True, null_scores=[of_row.null_margin for of_row in found],
                                threshold=self.null_threshold)

        return scores

    def answers(self, table: Table, features: Sequence[Feature], logits: Sequence[Any]) -> list[dict[str, Any]]:
        """prediction ("" for no answer), score (start + end logit of the best span), probability of the prediction among the n
        best; with unanswerable also null_score_diff, what the official evaluation takes as a question's null odds: the score of
        no answer less that of the best span. The prediction is "" where it is above null_threshold."""
        found = search(windows_of(features), [start for start, _ in logits], [end for _, end in logits], len(table),
                       self.n_best_size, self.max_answer_length)
        rows = []
        for row, of_row in zip(table.rows, found, strict=True):
            none = self.unanswerable and of_row.null_margin > self.null_threshold
            rows.append({"prediction": "" if none else _text(row[self.context_column], of_row),
                         "score": of_row.scores[0] if of_row.scores else 0.0,
                         "probability": of_row.probability(none, self.unanswerable)}
                        | ({"null_score_diff": of_row.null_margin} if self.unanswerable else {}))
        return rows

    def show(self, table: Table, features: Sequence[Feature], tokenizer: Any, index: int) -> str:
        feature = features[index]
        shown = tokenizer.decode(feature["input_ids"])
        if "start_positions" not in feature:
            return shown
        first, last = feature["start_positions"], feature["end_positions"]
        answer = tokenizer.decode(feature["input_ids"][first:last + 1]).strip() if last else "(no answer in this window)"
        return f"{shown}  ->  {answer}"


def _text(context: str, found: Found) -> str:
    return context[slice(*found.spans[0])] if found.spans else ""


def token_span(offsets: Sequence[tuple[int, int] | None], span: tuple[int, int] | None) -> tuple[int, int]:
    """The first and the last token of a span of characters; (0, 0), which is [CLS], where it is not wholly in the window.

    It is looked for in the context alone: looking on for the last token that starts at or before the answer, as published, leaves
    the window when the answer starts in its last token, and gives a first token behind the last where one character is several.
    """
    inside = [i for i, offset in enumerate(offsets) if offset is not None]
    if span is None or not inside:
        return 0, 0
    context = [offsets[i] or (0, 0) for i in inside]
    begin, end = span
    if context[0][0] > begin or context[-1][1] < end:
        return 0, 0
    first = bisect_right(context, begin, key=lambda offset: offset[1])          # ends behind the answer's first character
    last = bisect_left(context, end, key=lambda offset: offset[0]) - 1          # begins before the one behind it
    return (inside[first], inside[last]) if first <= last else (0, 0)           # a character the tokenizer dropped


def gold_answers(answers: Any) -> list[tuple[str, int]]:
    """(text, start) of {"text": [...], "answer_start": [...]}; None is no answer. Raises DataError for anything else."""
    if answers is None:
        return []
    texts, starts = (answers.get("text"), answers.get("answer_start")) if isinstance(answers, dict) else (None, None)
    if (isinstance(texts, (list, tuple)) and isinstance(starts, (list, tuple)) and len(texts) == len(starts)
            and all(isinstance(text, str) for text in texts) and all(isinstance(start, int) for start in starts)):
        return list(zip(texts, starts, strict=True))
    raise DataError(f'the answers are {str(answers)[:80]!r}, but {{"text": [...], "answer_start": [...]}} of texts and as many '
                    "whole numbers is expected")


def what_is_wrong(context: str, text: str, start: int) -> str | None:
    """Why `text` is not the answer that stands at character `start`, with what may have happened; None where it is."""
    if not text.strip():
        return "an answer is an empty text"
    if start >= 0 and context[start:start + len(text)] == text:
        return None
    if start < 0:
        found = f"the answer {text!r} is not in its context"
    elif start + len(text) > len(context):
        found = f"the answer {text!r} at answer_start {start} is outside its context of {len(context)} characters"
    else:
        found = f"the answer {text!r} is not at answer_start {start}, where {context[start:start + len(text)]!r} stands"
    return found + _what_happened(context, text, start)


def _what_happened(context: str, text: str, start: int) -> str:
    for encoding, unit in (("utf-8", 1), ("utf-16-le", 2)):
        if start >= 0 and context.encode(encoding, "replace")[start * unit:].startswith(text.encode(encoding, "replace")):
            return f" (it is, if {encoding.removesuffix('-le').upper()} units are counted; count characters)"
    if text in context:
        at = min((i for i in range(len(context)) if context.startswith(text, i)), key=lambda i: abs(i - start))
        return f" (but at {at})"
    if any(misread is not None and misread in context for misread in (_recoded(text, "cp1252", "utf-8"),
                                                                      _recoded(text, "utf-8", "cp1252"))):
        return " (but is, read in another encoding; read the file as UTF-8)"
    at = context.lower().find(text.strip().lower())
    return f" (but {context[at:at + len(text.strip())]!r} is, at {at})" if at >= 0 else ""


def _recoded(text: str, wrote: str, read: str) -> str | None:
    try:
        return text.encode(wrote).decode(read)
    except UnicodeError:
        return None
