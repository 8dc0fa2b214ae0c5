"""compute_metrics functions for transformers' Trainer: accuracy and F1, correlation, entity F1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptv2_engine.errors import DataError
from ptv2_engine.packing import IGNORE


def metrics_for(kind: str, names: list[str], extra: tuple[str, ...] = ()) -> Callable[[Any], dict[str, float]]:
    """The metric function of a label kind ("classes", "values", "tags", "candidates"); extra: "f1", "f1_macro", "matthews".

    candidates: predictions are the index of each row's best candidate, not scores.
    """
    if kind == "candidates":
        return lambda prediction: {"accuracy": float(np.equal(*_arrays(prediction)).mean())}
    if kind == "tags":
        return lambda prediction: entity_scores(*_arrays(prediction), names)
    if kind == "values":
        return lambda prediction: correlations(*_arrays(prediction))
    return lambda prediction: class_scores(*_arrays(prediction), extra)


def _arrays(prediction: Any) -> tuple[np.ndarray, np.ndarray]:
    scores = prediction.predictions
    return np.asarray(scores[0] if isinstance(scores, tuple) else scores), np.asarray(prediction.label_ids)


def class_scores(scores_BC: np.ndarray, labels_B: np.ndarray, extra: tuple[str, ...] = ()) -> dict[str, float]:
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
    try:
        from seqeval.metrics import f1_score, precision_score, recall_score
    except ImportError:
        raise DataError("entity F1 needs seqeval; pip install 'ptv2_engine[train]'.") from None
    predicted = scores_BSC.argmax(-1)
    truth, guess = [], []
    for label_row, guess_row in zip(labels_BS, predicted, strict=True):
        keep = label_row != IGNORE
        truth.append([names[i] for i in label_row[keep]])
        guess.append([names[i] for i in guess_row[keep]])
    right = sum(t == g for ts, gs in zip(truth, guess, strict=True) for t, g in zip(ts, gs, strict=True))
    total = sum(map(len, truth))
    return {"f1": float(f1_score(truth, guess)), "precision": float(precision_score(truth, guess)),
            "recall": float(recall_score(truth, guess)), "accuracy": right / max(total, 1)}
