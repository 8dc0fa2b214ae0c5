"""One label a word: named entities and semantic roles.

A sentence that does not fit is cut into pieces at word boundaries, and its tags are put together again before they are scored: no
word is lost, and every word has one label and one prediction. A piece repeats some words before its own, unlabelled, as context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ptv2_engine.errors import ConfigError, DataError, LabelError
from ptv2_engine.packing import IGNORE
from ptv2_engine.tasks.base import Feature, Metrics, Task
from ptv2_engine.tasks.conll import is_tag
from ptv2_engine.tasks.data import Table
from ptv2_engine.tasks.features import in_order
from ptv2_engine.tasks.metrics import scores_of, seqeval_scores, word_accuracy

_CONTEXT = 0.25        # of a piece's room: words repeated from before the cut
_BATCH = 1000          # sentences tokenised at once


class TagTask(Task):
    """A word's tag from its first sub-word; the other sub-words have the label -100.

    words_column: lists of words. label_column: lists of as many tags. names: the tags, in the order of the classifier's outputs.
    predicate_column: of semantic roles, the predicate's index from 0, or the word itself. The input is then the sentence, the
    tokenizer's separator and the predicate once more (every piece of a long sentence has it). The published code writes "[SEP]"
    there for every model; a tokenizer whose separator has another name reads that as ordinary text, so its own is taken here.

    Tags that mark spans are scored by span (seqeval's default, which takes an I- without a B- as a beginning), predicates' own
    spans (B-V) included, as published; where no tag does, as in part-of-speech tagging, only the accuracy is given.
    """

    kind = "tags"
    model_task = "token-classification"
    best = "f1"
    epoch_decay = 0.95

    def __init__(self, words_column: str, label_column: str, names: list[str], predicate_column: str | None = None) -> None:
        self.words_column, self.label_column, self.predicate_column = words_column, label_column, predicate_column
        self.names = list(names)
        self.of_spans = any(name != "O" and is_tag(name) for name in names)
        if not self.of_spans:
            self.best = "accuracy"
        self._numbers = {name: number for number, name in enumerate(self.names)}

    @classmethod
    def infer(cls, table: Table, words_column: str, label_column: str, predicate_column: str | None = None) -> TagTask:
        """The task whose tags are those of a training table. Raises DataError for a missing column, or one without lists."""
        table.column(words_column)
        found = set()
        for number, tags in enumerate(table.column(label_column), start=1):
            if not isinstance(tags, (list, tuple)):
                raise DataError(f"{table.source}: row {number} has {tags!r} as {label_column!r}, but a list of tags, one a word, "
                                "is expected; correct the file, or use --task sequence-classification.")
            found |= {str(tag) for tag in tags}
        if not found:
            raise DataError(f"{table.source} has 0 labels; check the file.")
        return cls(words_column, label_column, in_order(found), predicate_column)

    def settings(self) -> dict[str, Any]:
        return {"words_column": self.words_column, "label_column": self.label_column, "names": self.names,
                "predicate_column": self.predicate_column}

    def model_options(self, tokenizer: Any) -> dict[str, Any]:
        return {"num_labels": len(self.names), "id2label": dict(enumerate(self.names))}

    def problems(self, table: Table, labelled: bool = True) -> Iterator[tuple[int, str]]:
        for number, row in enumerate(table.rows, start=1):
            yield from ((number, what) for what in self._problems_of(row, labelled))

    def training_problems(self, table: Table) -> Iterator[tuple[int, str]]:
        if all(tag == "O" for row in table.rows for tag in row[self.label_column]):
            yield 0, f"all {len(table)} sentences are tagged 'O' throughout, so there is nothing to find"

    def has_labels(self, table: Table) -> bool:
        return any(row.get(self.label_column) for row in table.rows)

    def _problems_of(self, row: dict[str, Any], labelled: bool) -> Iterator[str]:
        words = row.get(self.words_column)
        if not isinstance(words, (list, tuple)) or not words:
            yield f"{self.words_column!r} is {words!r}, but a list of one or more words is expected"
            return
        empty = [i for i, word in enumerate(words, start=1) if not str(word).strip()]
        if empty:
            yield f"word {empty[0]} of {len(words)} is empty"
        if self.predicate_column is not None:
            try:
                self._predicate(row)
            except DataError as error:
                yield str(error)
        if not labelled:
            return
        tags = row.get(self.label_column)
        if not isinstance(tags, (list, tuple)):
            yield f"{self.label_column!r} is {tags!r}, but a list of tags is expected"
            return
        if len(tags) != len(words):
            yield f"{len(words)} words but {len(tags)} tags"
        for tag in dict.fromkeys(str(tag) for tag in tags):
            if tag not in self._numbers:
                yield f"tag {tag!r} is not one of the {len(self.names)} known ({_some(self.names)})"
            elif self.of_spans and not is_tag(tag):
                yield f"tag {tag!r} is not 'O' or a prefix and a type such as B-LOC, as other tags are"

    def _predicate(self, row: dict[str, Any]) -> int:
        """The index of the predicate's word. Raises DataError (of the row, which the caller names)."""
        assert self.predicate_column is not None
        words, given = list(row[self.words_column]), row.get(self.predicate_column)
        if isinstance(given, str) and given in words:
            return words.index(given)
        index = int(given) if isinstance(given, str) and given.strip().isdigit() else given
        if not isinstance(index, (int, np.integer)) or isinstance(index, bool) or not 0 <= index < len(words):
            raise DataError(f"predicate {given!r} is neither one of the {len(words)} words nor the index of one, from 0")
        return int(index)

    def features(self, table: Table, tokenizer: Any, max_length: int, *, training: bool = False,
                 labelled: bool = True) -> list[Feature]:
        """Features with input_ids, token_type_ids (where the tokenizer has them), word_ids, row and labels.

        word_ids: of each token the word's index in its row, None for special tokens, for repeated context and for the predicate
        behind the separator, so that over the pieces of a row every word has exactly one first sub-word.
        """
        for name in [self.words_column] + [c for c in (self.predicate_column,) if c] + [self.label_column] * labelled:
            table.column(name)
        features: list[Feature] = []
        frame = _Frame(tokenizer)
        if self.predicate_column is not None and frame.separator is None:
            raise ConfigError("the tokenizer has no separator to put before the predicate; give it a sep_token.")
        for start in range(0, len(table), _BATCH):
            rows = table.rows[start:start + _BATCH]
            for number, row in enumerate(rows, start=start + 1):
                if not isinstance(words := row[self.words_column], (list, tuple)) or not words:
                    raise DataError(f"{table.source}: row {number} has {words!r} as {self.words_column!r}, but a list of one or "
                                    "more words is expected; correct the row.")
            tokens = _sub_words([row[self.words_column] for row in rows], tokenizer, table.source, start)
            for index, (row, ids) in enumerate(zip(rows, tokens, strict=True), start=start):
                labels = self._labels(row, f"{table.source}: row {index + 1}") if labelled else None
                tail = []
                if self.predicate_column is not None:
                    try:
                        tail = [frame.separator, *ids[self._predicate(row)]]
                    except DataError as error:
                        raise DataError(f"{table.source}: row {index + 1}: {error}; correct the row.") from None
                features += self._pieces(ids, tail, labels, frame, max_length, index)
        return features

    def _labels(self, row: dict[str, Any], where: str) -> list[int]:
        words, tags = row[self.words_column], row[self.label_column]
        if len(words) != len(tags):
            raise DataError(f"{where} has {len(words)} words but {len(tags)} tags; give one tag a word.")
        try:
            return [self._numbers[str(tag)] for tag in tags]
        except KeyError as error:
            raise LabelError(f"{where}: tag {error.args[0]!r} is not one of the {len(self.names)} known ({_some(self.names)}); "
                             "correct the file, or train with data that has it.") from None

    def _pieces(self, words: list[list[int]], tail: list[int], labels: list[int] | None, frame: _Frame, max_length: int,
                row: int) -> Iterator[Feature]:
        room = max_length - len(frame.before) - len(frame.after)
        tail = tail[:max(2, room // 2)]                            # a predicate of many sub-words leaves the sentence its half
        room -= len(tail)
        if room < 1:
            raise ConfigError(f"max_length {max_length} leaves no room for a word beside {max_length - room} other tokens; raise "
                              "--max_seq_length, or shorten the prompt.")
        words = [ids[:room] for ids in words]
        for context, first, end in _cuts([len(ids) for ids in words], room):
            ids, targets = list(frame.before), [IGNORE] * len(frame.before)
            word_ids: list[int | None] = [None] * len(frame.before)
            for index in range(context, end):
                ids += words[index]
                more = len(words[index])
                word_ids += [index if index >= first else None] * more
                targets += [labels[index] if labels is not None and index >= first else IGNORE] + [IGNORE] * (more - 1)
            rest = [*tail, *frame.after]
            feature: Feature = {"input_ids": ids + rest, "word_ids": word_ids + [None] * len(rest), "row": row}
            if frame.types is not None:
                feature["token_type_ids"] = frame.types_for(len(ids) + len(tail) - len(frame.before))
            if labels is not None:
                feature["labels"] = targets + [IGNORE] * len(rest)
            yield feature

    def metric_names(self) -> tuple[str, ...]:
        return ("precision", "recall", "f1", "accuracy") if self.of_spans else ("accuracy",)

    def metrics(self, table: Table, features: Sequence[Feature]) -> Metrics:
        """Precision, recall and F1 of spans (unless no tag marks any), and the accuracy a word, over whole sentences."""
        truth = [[str(tag) for tag in tags] for tags in table.column(self.label_column)]

        def score(prediction: Any) -> dict[str, float]:
            guesses = self._joined(table, features, scores_of(prediction).argmax(-1))
            accuracy = {"accuracy": word_accuracy(truth, guesses)}
            return span_scores(truth, guesses) | accuracy if self.of_spans else accuracy

        return score

    def answers(self, table: Table, features: Sequence[Feature], logits: Sequence[Any]) -> list[dict[str, Any]]:
        """prediction: a list of tags, one a word. Where tags mark spans also entities: each one's type, text, and its words, from
        start to before end."""
        tags = self._joined(table, features, [np.asarray(scores).argmax(-1) for scores in logits])
        answers = []
        for row, guess in zip(table.rows, tags, strict=True):
            answer: dict[str, Any] = {"prediction": guess}
            if self.of_spans:
                words = [str(word) for word in row[self.words_column]]
                answer["entities"] = [{"type": name, "text": " ".join(words[a:b]), "start": a, "end": b}
                                      for name, a, b in spans(guess)]
            answers.append(answer)
        return answers

    def show(self, table: Table, features: Sequence[Feature], tokenizer: Any, index: int) -> str:
        feature = features[index]
        words, labels = table.rows[feature["row"]][self.words_column], feature.get("labels")
        said = " ".join(str(words[word]) + ("" if labels is None else f"={self.names[labels[position]]}")
                        for position, word in _firsts(feature))
        return f"{tokenizer.decode(feature['input_ids'])}  ->  {said}"

    def _joined(self, table: Table, features: Sequence[Feature], numbers: Sequence[Sequence[int]]) -> list[list[str]]:
        """A tag a word of every row, from the class numbers at the tokens of its pieces."""
        tags: list[list[str | None]] = [[None] * len(row[self.words_column]) for row in table.rows]
        for feature, row_numbers in zip(features, numbers, strict=True):
            for position, word in _firsts(feature):
                assert tags[feature["row"]][word] is None, f"row {feature['row'] + 1}: word {word + 1} is in two pieces"
                tags[feature["row"]][word] = self.names[int(row_numbers[position])]
        assert all(tag is not None for row in tags for tag in row), "a word has no prediction"
        return [[tag for tag in row if tag is not None] for row in tags]


class _Frame:
    """The special tokens that a tokenizer puts around one text, and the token types it gives."""

    def __init__(self, tokenizer: Any) -> None:
        bare = tokenizer(["a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
        whole = tokenizer(["a"], is_split_into_words=True)
        ids = whole["input_ids"]
        start = next(i for i in range(len(ids)) if ids[i:i + len(bare)] == bare)
        self.before, self.after = ids[:start], ids[start + len(bare):]
        self.types = whole.get("token_type_ids")
        self._inside = 0 if self.types is None else self.types[start]
        self.separator = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id

    def types_for(self, tokens: int) -> list[int]:
        """Of `tokens` tokens between the special ones."""
        assert self.types is not None
        return [*self.types[:len(self.before)], *[self._inside] * tokens, *self.types[len(self.types) - len(self.after):]]


def _sub_words(sentences: Sequence[Sequence[Any]], tokenizer: Any, source: str, start: int) -> list[list[list[int]]]:
    """The token ids of every word of every sentence, without special tokens.

    A word of which the tokenizer leaves nothing (control characters) is one unknown token, so that it keeps its label.
    """
    words = [[str(word) for word in sentence] for sentence in sentences]
    found: list[list[list[int]]] = []
    if tokenizer.is_fast:
        encoded = tokenizer(words, is_split_into_words=True, add_special_tokens=False, verbose=False)
        for number, sentence in enumerate(words):
            found.append([[] for _ in sentence])
            for token, word in zip(encoded["input_ids"][number], encoded.word_ids(number), strict=True):
                if word is not None:
                    found[-1][word].append(token)
    else:
        found = [[tokenizer(word, add_special_tokens=False)["input_ids"] for word in sentence] for sentence in words]
    for number, tokens in enumerate(found, start=start + 1):
        for ids in tokens:
            if not ids and tokenizer.unk_token_id is None:
                raise DataError(f"{source}: row {number} has a word of which the tokenizer keeps nothing; replace the word.")
            if not ids:
                ids.append(tokenizer.unk_token_id)
    return found


def _cuts(lengths: Sequence[int], room: int) -> Iterator[tuple[int, int, int]]:
    """(first word of context, first word, end) of each piece; its words have at most `room` tokens, each of them too."""
    first = 0
    while first < len(lengths):
        context, used = first, lengths[first]
        if first:
            budget = min(int(room * _CONTEXT), room - used)
            while context and sum(lengths[context - 1:first]) <= budget:
                context -= 1
            used += sum(lengths[context:first])
        end = first + 1
        while end < len(lengths) and used + lengths[end] <= room:
            used += lengths[end]
            end += 1
        yield context, first, end
        first = end


def _firsts(feature: Feature) -> Iterator[tuple[int, int]]:
    """(position, word) of the first sub-word of each word that is this feature's own."""
    ids = feature["word_ids"]
    return ((i, word) for i, word in enumerate(ids) if word is not None and (i == 0 or ids[i - 1] != word))


def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first word, end) of the spans that tags mark, in any of the usual schemes, as seqeval's default mode reads them."""
    found, start = [], 0
    before, kind = "O", ""
    for i, tag in enumerate([*map(_bioes, tags), "O"]):
        prefix, name = tag[:1], tag[1:].removeprefix("-")
        begins = prefix != "O" and (before == "O" or prefix in ("B", "S") or before in ("E", "S") or name != kind)
        if before != "O" and (begins or prefix == "O"):
            found.append((kind, start, i))
        if begins:
            start = i
        before, kind = prefix, name
    return found


def span_scores(truth: list[list[str]], guesses: list[list[str]]) -> dict[str, float]:
    """seqeval's scores of spans; BILOU's and BMES's prefixes as BIOES's, which are the ones it knows."""
    return seqeval_scores(*([[_bioes(tag) for tag in tags] for tags in part] for part in (truth, guesses)))


def _bioes(tag: str) -> str:
    return {"L-": "E-", "U-": "S-", "M-": "I-"}.get(tag[:2], tag[:2]) + tag[2:]


def _some(names: Sequence[str], shown: int = 8) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
