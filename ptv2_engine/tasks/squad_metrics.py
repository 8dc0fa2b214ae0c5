"""Exact match and F1 of answers, as SQuAD's official scripts (evaluate-v1.1.py, evaluate-v2.0.py) count them, but from 0 to 1."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

from ptv2_engine.errors import DataError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)       # ASCII only, as published: a typographic quote stays


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and surplus white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact(gold: str, guess: str) -> float:
    """1.0 where both are one text after normalisation."""
    return float(normalize_answer(gold) == normalize_answer(guess))


def f1(gold: str, guess: str, both_empty: float = 1.0) -> float:
    """Harmonic mean of precision and recall over the words (a multiset). both_empty: the value where neither has a word left,
    1 in version 2.0 and 0 in version 1.1."""
    golds, guesses = normalize_answer(gold).split(), normalize_answer(guess).split()
    if not golds and not guesses:
        return both_empty
    same = sum((Counter(golds) & Counter(guesses)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(guesses), same / len(golds)
    return 2 * precision * recall / (precision + recall)


def squad_scores(golds: Sequence[Sequence[str]], guesses: Sequence[str], *, unanswerable: bool = False,
                 null_scores: Sequence[float] | None = None, threshold: float = 0.0) -> dict[str, float]:
    """Scores of one guess a question, each the best over its gold answers.

    Arguments:
        golds: the gold answers of each question; none at all (version 2.0) where there is no answer.
        guesses: text, "" for no answer. unanswerable: count as version 2.0 does.
        null_scores: how much rather no answer than the guess, in any unit; where it is above `threshold`, the guess counts as
            no answer. Then the guesses are to be the best non-empty ones, or the best thresholds below cannot be found.
    Returns:
        Version 1.1: exact_match, f1. Version 2.0: exact, f1, total, HasAns_* and NoAns_* of the same three where there are such
        questions; with null_scores also best_exact, best_exact_thresh, best_f1, best_f1_thresh: the best that a threshold could
        give, and that threshold. Where no guess at all is best, it is below every null score; the official script, which expects
        probabilities, then says 0.0.
    Raises:
        DataError: nothing to score, another number of guesses, or in version 1.1 a question without gold answers.
    """
    if len(golds) != len(guesses) or not guesses or (null_scores is not None and len(null_scores) != len(guesses)):
        given = f"{len(guesses)} guesses" + ("" if null_scores is None else f" and {len(null_scores)} null scores")
        raise DataError(f"{given} were given for {len(golds)} questions; give one each, for 1 question or more.")
    if not unanswerable:
        missing = next((i for i, texts in enumerate(golds, 1) if not texts), None)
        if missing is not None:
            raise DataError(f"question {missing} has 0 gold answers, but SQuAD 1.1 needs 1 or more; score it as SQuAD 2.0.")
        pairs = list(zip(golds, guesses, strict=True))
        return {"exact_match": _mean([max(exact(gold, guess) for gold in texts) for texts, guess in pairs]),
                "f1": _mean([max(f1(gold, guess, 0.0) for gold in texts) for texts, guess in pairs])}

    answered = [bool(texts) for texts in golds]
    # an answer of nothing but articles and punctuation is no answer, but its question still counts as one that has an answer
    kept = [[gold for gold in texts if normalize_answer(gold)] or [""] for texts in golds]
    raw = {"exact": [max(exact(gold, guess) for gold in texts) for texts, guess in zip(kept, guesses, strict=True)],
           "f1": [max(f1(gold, guess) for gold in texts) for texts, guess in zip(kept, guesses, strict=True)]}
    scores = raw
    if null_scores is not None:
        null = [score > threshold for score in null_scores]
        scores = {name: [float(not has) if none else value for value, none, has in zip(values, null, answered, strict=True)]
                  for name, values in raw.items()}
    found: dict[str, float] = {}
    for prefix, wanted in (("", (True, False)), ("HasAns_", (True,)), ("NoAns_", (False,))):
        if any(has in wanted for has in answered):
            for name, values in scores.items():
                found[prefix + name] = _mean([value for value, has in zip(values, answered, strict=True) if has in wanted])
            found[prefix + "total"] = sum(has in wanted for has in answered)
    if null_scores is not None:
        for name, values in raw.items():
            found[f"best_{name}"], found[f"best_{name}_thresh"] = _best_threshold(values, guesses, answered, null_scores)
    return found


def _best_threshold(scores: Sequence[float], guesses: Sequence[str], answered: Sequence[bool],
                    null_scores: Sequence[float]) -> tuple[float, float]:
    """Start from no answer anywhere and give one question after the other its guess, the surest first."""
    current = best = float(len(answered) - sum(answered))
    threshold = min(0.0, math.nextafter(min(null_scores), -math.inf))
    for i in sorted(range(len(scores)), key=lambda i: null_scores[i]):
        current += scores[i] if answered[i] else -bool(guesses[i])
        if current > best:
            best, threshold = current, float(null_scores[i])
    return best / len(scores), threshold


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
