"""What is counted: accuracy and F1, correlation, MultiRC's and ReCoRD's scores by question, entity F1. All from 0 to 1 (-1 to 1).

The functions take arrays. Tasks choose among them; `metrics_for` makes a compute_metrics function for a Trainer in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from ptv2_engine.errors import DataError
from ptv2_engine.packing import IGNORE


def metrics_for(kind: str, names: list[str], extra: tuple[str, ...] = ()) -> Callable[[Any], dict[str, float]]:
    """The metric function of a label kind ("classes", "values", "tags"); extra: "f1", "f1_macro", "matthews"."""
    if kind == "tags":
        return lambda prediction: entity_scores(*_arrays(prediction), names)
    if kind == "values":
        return lambda prediction: correlations(*_arrays(prediction))
    return lambda prediction: class_scores(*_arrays(prediction), extra)


def _arrays(prediction: Any) -> tuple[np.ndarray, np.ndarray]:
    return scores_of(prediction), np.asarray(prediction.label_ids)


def scores_of(prediction: Any) -> np.ndarray:
    """The logits of a transformers.EvalPrediction; the first where the model returned several things."""
    scores = prediction.predictions
    return np.asarray(scores[0] if isinstance(scores, (tuple, list)) else scores)


def best_of(scores_BC: np.ndarray, counts_B: Sequence[int]) -> np.ndarray:
    """int [B]: each row's best among its first `counts_B` scores; those behind are padding, from the model (-10000) or from where
    batches of different width were put together (-100)."""
    there_BC = np.arange(scores_BC.shape[1]) < np.asarray(counts_B)[:, None]
    return np.where(there_BC, scores_BC, -np.inf).argmax(-1)


def class_scores(scores_BC: np.ndarray, labels_B: np.ndarray, extra: Sequence[str] = ()) -> dict[str, float]:
    """Accuracy, and what `extra` names: f1 of class 1, macro f1, Matthews correlation."""
    predicted = scores_BC.argmax(-1)
    found = {"accuracy": float((predicted == labels_B).mean())}
    if extra:
        from sklearn import metrics

        functions = {
            "f1": lambda: metrics.f1_score(labels_B, predicted),
            "matthews": lambda: metrics.matthews_corrcoef(labels_B, predicted),
            "f1_macro": lambda: metrics.f1_score(labels_B, predicted, average="macro"),
        }
        found |= {name: float(functions[name]()) for name in extra}
    return found


def multirc_scores(predicted_B: np.ndarray, labels_B: np.ndarray, questions_B: Sequence[Hashable]) -> dict[str, float]:
    """MultiRC over answers, each right (1) or wrong (0): f1 is F1a, that of class 1 over all answers; exact_match is the share of
    questions whose answers are all judged rightly; accuracy is over answers.

    questions_B: which question each answer belongs to; a question's answers need not be neighbours.
    """
    predicted_B, labels_B = np.asarray(predicted_B), np.asarray(labels_B)
    right_B = predicted_B == labels_B
    both = int(((predicted_B == 1) & (labels_B == 1)).sum())
    either = int((predicted_B == 1).sum() + (labels_B == 1).sum())
    whole: dict[Hashable, bool] = {}
    for question, right in zip(questions_B, right_B.tolist(), strict=True):
        whole[question] = whole.get(question, True) and right
    return {"f1": 2 * both / either if either else 0.0, "exact_match": sum(whole.values()) / max(len(whole), 1),
            "accuracy": float(right_B.mean())}


def record_scores(scores_B: np.ndarray, entities_B: Sequence[str], questions_B: Sequence[Hashable],
                  golds_B: Sequence[Sequence[str]]) -> dict[str, float]:
    """ReCoRD over candidate entities: a question's guess is its entity of the highest score; then text_scores over questions.

    golds_B: the right answers of the question each entity belongs to. Of equal scores the last by spelling wins, as published.
    """
    best: dict[Hashable, tuple[float, str]] = {}
    golds: dict[Hashable, Sequence[str]] = {}
    for score, entity, question, gold in zip(np.asarray(scores_B).tolist(), entities_B, questions_B, golds_B, strict=True):
        best[question] = max(best.get(question, (score, entity)), (score, entity))
        golds.setdefault(question, gold)
    return text_scores([entity for _, entity in best.values()], [golds[question] for question in best])


def text_scores(guesses: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """f1 (of words) and exact_match after SQuAD's normalisation, each the best over a guess's gold answers (0 without any)."""
    from ptv2_engine.tasks.squad_metrics import exact, f1

    found = {"f1": 0.0, "exact_match": 0.0}
    for guess, texts in zip(guesses, golds, strict=True):
        found["f1"] += max((f1(text, guess, both_empty=0.0) for text in texts), default=0.0)
        found["exact_match"] += max((exact(text, guess) for text in texts), default=0.0)
    return {name: total / max(len(guesses), 1) for name, total in found.items()}


def correlations(scores_B: np.ndarray, labels_B: np.ndarray) -> dict[str, float]:
    """Mean squared error, Pearson and Spearman correlation."""
    x, y = scores_B.reshape(-1).astype(np.float64), labels_B.reshape(-1).astype(np.float64)
    ranks = [_average_ranks(v) for v in (x, y)]
    return {"mse": float(((x - y) ** 2).mean()), "pearson": _correlation(x, y), "spearman": _correlation(*ranks)}


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else 0.0


def _average_ranks(x: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return ((ends - counts + 1 + ends) / 2)[inverse]


def entity_scores(scores_BSC: np.ndarray, labels_BS: np.ndarray, names: list[str]) -> dict[str, float]:
    """seqeval's entity precision, recall and F1 over the first sub-words (CoNLL's evaluation)."""
    predicted = scores_BSC.argmax(-1)
    truth, guess = [], []
    for label_row, guess_row in zip(labels_BS, predicted, strict=True):
        keep = label_row != IGNORE
        truth.append([names[i] for i in label_row[keep]])
        guess.append([names[i] for i in guess_row[keep]])
    return seqeval_scores(truth, guess) | {"accuracy": word_accuracy(truth, guess)}


def seqeval_scores(truth: list[list[str]], guesses: list[list[str]]) -> dict[str, float]:
    """seqeval's micro precision, recall and F1 of spans, 0 where there is none. Raises DataError without seqeval."""
    try:
        from seqeval.metrics.sequence_labeling import precision_recall_fscore_support
    except ImportError:
        raise DataError("entity F1 needs seqeval; pip install 'ptv2_engine[train]'.") from None
    precision, recall, f1, _ = precision_recall_fscore_support(truth, guesses, average="micro", zero_division=0)
    return {"precision": float(precision), "recall": float(recall), "f1": float(f1)}


def word_accuracy(truth: list[list[str]], guesses: list[list[str]]) -> float:
    """The share of words with the right tag."""
    right = sum(t == g for ts, gs in zip(truth, guesses, strict=True) for t, g in zip(ts, gs, strict=True))
    return right / max(sum(map(len, truth)), 1)
