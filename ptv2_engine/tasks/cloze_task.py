"""ClozeTask: a pattern with one blank, filled by verbalizers or by each row's candidates, as a Task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ptv2_engine.errors import DataError
from ptv2_engine.tasks.base import Feature, Metrics, Task
from ptv2_engine.tasks.cloze import (
    cloze_features,
    describe_pattern,
    example_of,
    examples_of,
    flat_rows,
    label_of,
    verbalizer_ids,
)
from ptv2_engine.tasks.cloze_patterns import Row, known_label
from ptv2_engine.tasks.data import Table
from ptv2_engine.tasks.metrics import best_of, class_scores, multirc_scores, scores_of, text_scores
from ptv2_engine.tasks.sequences import most_likely


class ClozeTask(Task):
    """Rows as text with one blank.

    Arguments:
        pattern: {"name", "pattern_id"}, a published one, or {"template", "verbalizers"}, as own_pattern takes them.
        label_column: where rows have their label. ReCoRD's are its answers.

    Tables may hold official nested rows (MultiRC, ReCoRD). They are laid flat first, and "row" of a feature, row numbers in
    messages, and the rows of `answers` are then those of the flat table, which `flat` returns.

    GLM takes every pattern; other backbones, through a masked language model's head, those with verbalizers.
    """

    kind = "cloze"
    model_task = "cloze"

    def __init__(self, pattern: Mapping[str, Any], label_column: str = "label") -> None:
        self.description, self.label_column = dict(pattern), label_column
        self.pattern = describe_pattern(pattern)
        self.name = str(pattern.get("name", "")).lower()
        self.names = list(self.pattern.verbalizers or ())
        self.best = "f1" if self.name in ("multirc", "record") else "accuracy"

    @property
    def has_candidates(self) -> bool:
        """Whether each row brings its own answers. Evaluation then gathers the best one's index, not scores: rows differ in how
        many they have."""
        return self.pattern.answers is not None

    def settings(self) -> dict[str, Any]:
        return {"pattern": self.description, "label_column": self.label_column}

    def model_options(self, tokenizer: Any) -> dict[str, Any]:
        """verbalizer_ids (None for candidates), length_penalty, mix_loss, num_labels and id2label. Raises ConfigError for a
        verbalizer of several tokens."""
        if self.has_candidates:
            return {"verbalizer_ids": None, "length_penalty": self.pattern.length_penalty, "mix_loss": self.pattern.mix_loss,
                    "num_labels": None, "id2label": None}
        return {"verbalizer_ids": verbalizer_ids(self.pattern, tokenizer), "length_penalty": self.pattern.length_penalty,
                "num_labels": len(self.names), "id2label": dict(enumerate(self.names))}

    def flat(self, table: Table) -> Table:
        """One row an example. Raises DataError for nested rows that are not as they should be."""
        return Table(flat_rows(table.rows, self.pattern, table.source), table.source)

    def has_labels(self, table: Table) -> bool:
        """Whether any row's label is known: false for the test splits of SuperGLUE."""
        rows = self.flat(table).rows
        if self.name == "record":
            return any(row["answers"] for row in rows)
        return any(known_label(row.get(self.label_column)) is not None for row in rows)

    def problems(self, table: Table, labelled: bool = True) -> Iterator[tuple[int, str]]:
        try:
            rows = self.flat(table).rows
        except DataError as error:
            yield 0, str(error).removeprefix(f"{table.source}: ").rstrip(".")
            return
        for number, row in enumerate(rows, 1):
            try:
                if example_of(row, self.pattern, self.label_column).label is None and labelled:
                    yield number, f"the label {self.label_column!r} is missing, empty or -1"
            except DataError as error:
                yield number, str(error).rstrip(".")

    def features(self, table: Table, tokenizer: Any, max_length: int, *, training: bool = False,
                 labelled: bool = True) -> list[Feature]:
        """Besides Task.features: max_length bounds a row's text and all its candidates together. Labels are -100 for WSC rows
        whose span is wrong, which have no right candidate to learn and are left out of training."""
        examples = examples_of(self.flat(table).rows, self.pattern, self.label_column, training=training, labelled=labelled,
                               source=table.source)
        if training and labelled:
            found = {example.label for example in examples}
            if not examples or len(found) < 2 and not self.has_candidates:
                what = f"every label is {self.names[found.pop() or 0]!r}" if examples else "no row has an answer to learn"
                raise DataError(f"{table.source}: {what}, and that cannot be learned; add rows of another label.")
        return cloze_features(examples, tokenizer, max_length, labelled=labelled, source=table.source)

    def metric_names(self) -> tuple[str, ...]:
        more = {"multirc": ("f1", "exact_match"), "record": ("f1", "exact_match"), "cb": ("f1_macro",)}
        return (*more.get(self.name, ()), "accuracy")

    def metrics(self, table: Table, features: Sequence[Feature]) -> Metrics:
        """The data set's official ones, over the features that evaluation has (not training's).

        Predictions: scores [B, C], or the index of each feature's best candidate or verbalizer [B]. Accuracy; CB: f1_macro too;
        MultiRC: f1 (F1a) and exact_match over questions; ReCoRD: f1 and exact_match over its gold answers, and accuracy, the
        share of guesses that are one of them; WSC: the span is guessed exactly where the label says so.
        """
        flat = self.flat(table).rows
        rows = [flat[feature["row"]] for feature in features]
        counts = [len(self._answers_of(row)) for row in rows]
        if self.name == "record":
            return lambda prediction: _record_scores(rows, _best(prediction, counts))
        labels_B = np.array([self._truth(row) for row in rows])
        if self.name == "wsc":
            return lambda prediction: {"accuracy": float(((_best(prediction, counts) == 0) == labels_B).mean())}
        if self.name == "multirc":
            questions = [tuple(row["idx"][name] for name in ("paragraph", "question")) if isinstance(row["idx"], Mapping)
                         else (row["paragraph"], row["question"]) for row in rows]
            return lambda prediction: multirc_scores(_best(prediction, counts), labels_B, questions)
        extra = ("f1_macro",) if self.name == "cb" else ()
        return lambda prediction: class_scores(_one_hot(_best(prediction, counts), max(counts)), labels_B, extra)

    def answers(self, table: Table, features: Sequence[Feature], logits: Sequence[Any]) -> list[dict[str, Any]]:
        """prediction: the verbalizer's label, or of candidates the best one's number from 0 (for WSC 0 is the span), with its
        prediction_text. probability: among them."""
        rows, found = self.flat(table).rows, []
        for feature, scores in zip(features, logits, strict=True):
            names = self._answers_of(rows[feature["row"]])
            best, probability = most_likely(np.asarray(scores, dtype=np.float64)[:len(names)])     # the rest is padding
            said = {"prediction": best, "prediction_text": names[best]} if self.has_candidates else {"prediction": names[best]}
            found.append(said | {"probability": probability})
        return found

    def show(self, table: Table, features: Sequence[Feature], tokenizer: Any, index: int) -> str:
        feature = features[index]
        context = feature["input_ids"][:feature.get("causal_from")]
        label = feature.get("labels")
        if not self.has_candidates:
            return f"{tokenizer.decode(context)}  ->  {None if label is None else self.names[label]}"
        ids, of, texts = feature["target_ids"], feature["candidate_ids"], []
        for c in range(max(of) + 1):
            own = [i for i, candidate in zip(ids, of, strict=True) if candidate == c]
            texts.append(tokenizer.decode(own, skip_special_tokens=True).strip())
        right = "unknown" if label is None else texts[label] if label >= 0 else f"not {texts[0]}"
        return f"{tokenizer.decode(context)}  [{' | '.join(texts)}]  ->  {right}"

    def _truth(self, row: Row) -> int:
        """The right answer's index; for WSC whether that is the span. Raises DataError for a row without a label."""
        label = example_of(row, self.pattern, self.label_column).label if self.has_candidates else label_of(
            row, self.pattern, self.label_column)
        if label is None:
            raise DataError(f"a row has no label in {self.label_column!r}, so it cannot be evaluated; add one, or predict.")
        return int(label == 0) if self.name == "wsc" else label

    def _answers_of(self, row: Row) -> list[str]:
        if self.pattern.answers is None:
            return self.names
        return [answer.strip() for answer in self.pattern.answers(row, self.label_column)[0]]


def _best(prediction: Any, counts: Sequence[int]) -> np.ndarray:
    """int [B]: each row's best answer of the `counts` it has; scores beyond those are padding."""
    scores = scores_of(prediction)
    if scores.ndim == 1:
        return scores.astype(np.int64)
    return best_of(scores, counts)


def _one_hot(best_B: np.ndarray, count: int) -> np.ndarray:
    return best_B[:, None] == np.arange(count)


def _record_scores(rows: Sequence[Row], best_B: np.ndarray) -> dict[str, float]:
    guesses = [row["entities"][best] for row, best in zip(rows, best_B.tolist(), strict=True)]
    golds = [row["answers"] for row in rows]
    right = sum(guess in gold for guess, gold in zip(guesses, golds, strict=True))
    return text_scores(guesses, golds) | {"accuracy": right / max(len(guesses), 1)}
