"""Start and end logits of a context's windows -> the best answers, as the published post-processing finds them.

Of each window the n best starts and the n best ends are paired; pairs outside the context, back to front or too long are left
out, and the best pairs of a row's windows together are kept. No answer scores what [CLS] scores in the window where that is
lowest: a question has no answer only if no window holds one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptv2_engine.errors import InputError


@dataclass(frozen=True)
class Window:
    """One feature of a row. begins, ends: int64 [tokens], a token's first character in the context and the one behind its last;
    -1 for the question and the special tokens."""

    row: int
    begins: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True)
class Found:
    """A row's answers. spans: (first character, the one behind the last), best first, with their scores (start + end logit).
    null: the score of no answer, None where the row has no window."""

    spans: list[tuple[int, int]]
    scores: list[float]
    null: float | None

    @property
    def null_margin(self) -> float:
        """How much higher no answer scores than the best span (than 0, as published, where there is no span)."""
        return (self.null or 0.0) - (self.scores[0] if self.scores else 0.0)

    def probability(self, of_null: bool, with_null: bool) -> float:
        """Softmax over the spans, and with_null over no answer too: the share of no answer, or of the best span."""
        scores = np.array([*self.scores, *([self.null] if with_null and self.null is not None else [])], dtype=np.float64)
        if not len(scores):
            return 0.0
        shares = np.exp(scores - scores.max())
        return float(shares[-1 if of_null else 0] / shares.sum())


def windows_of(features: Sequence[dict[str, Any]]) -> list[Window]:
    """features: with "row" and "offsets", one pair a token, None outside the context."""
    found = []
    for feature in features:
        offsets = np.array([(-1, -1) if o is None else o for o in feature["offsets"]], dtype=np.int64).reshape(-1, 2)
        found.append(Window(feature["row"], offsets[:, 0], offsets[:, 1]))
    return found


def search(windows: Sequence[Window], starts: Sequence[np.ndarray], ends: Sequence[np.ndarray], rows: int, n_best: int,
           max_length: int) -> list[Found]:
    """The answers of each of `rows` rows.

    Arguments:
        starts, ends: the logits of each window, [its tokens] or longer (padding is left out).
        n_best: starts and ends tried in a window, and spans kept for a row. max_length: tokens of an answer.
    Raises:
        InputError: other windows than logits.
    """
    if not len(windows) == len(starts) == len(ends):
        raise InputError(f"{len(starts)} start and {len(ends)} end logits were given for {len(windows)} windows; pass those of "
                         "the same features, in their order.")
    spans: list[list[np.ndarray]] = [[] for _ in range(rows)]
    scores: list[list[np.ndarray]] = [[] for _ in range(rows)]
    null: list[float | None] = [None] * rows
    for window, start, end in zip(windows, starts, ends, strict=True):
        tokens, given = len(window.begins), min(len(start), len(end))
        if given < tokens:
            raise InputError(f"row {window.row + 1} has logits of {given} tokens for a window of {tokens}; pass those of the "
                             "same features, in their order.")
        span, score = _best_pairs(window, start[:tokens], end[:tokens], n_best, max_length)
        spans[window.row].append(span)
        scores[window.row].append(score)
        none, known = float(start[0] + end[0]), null[window.row]
        null[window.row] = none if known is None else min(known, none)
    return [_ranked(*of_row, n_best) for of_row in zip(spans, scores, null, strict=True)]


def _best_pairs(window: Window, start: np.ndarray, end: np.ndarray, n_best: int,
                max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(characters [pairs, 2], scores [pairs]), by rank of the start, then of the end."""
    first_S = np.argsort(start)[:-n_best - 1:-1]
    last_E = np.argsort(end)[:-n_best - 1:-1]
    length_SE = last_E[None] - first_S[:, None] + 1
    begins_S, ends_E = window.begins[first_S][:, None], window.ends[last_E][None]
    # the last condition also leaves out ends outside the context, and tokens that stand for no character
    legal_SE = (length_SE >= 1) & (length_SE <= max_length) & (begins_S >= 0) & (ends_E > begins_S)
    s, e = legal_SE.nonzero()
    return np.stack((begins_S[s, 0], ends_E[0, e]), 1), start[first_S[s]] + end[last_E[e]]


def _ranked(spans: list[np.ndarray], scores: list[np.ndarray], null: float | None, n_best: int) -> Found:
    if not spans:
        return Found([], [], null)
    score = np.concatenate(scores)
    best = np.argsort(-score, kind="stable")[:n_best]          # stable: of equal ones the first window's
    return Found([(int(b), int(e)) for b, e in np.concatenate(spans)[best]], [float(s) for s in score[best]], null)
