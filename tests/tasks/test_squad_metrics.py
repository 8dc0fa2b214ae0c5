"""Exact match and F1 of answers against the output of SQuAD's official scripts, kept in a fixture with what they were given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ptv2_engine.errors import DataError
from ptv2_engine.tasks.squad_metrics import exact, f1, normalize_answer, squad_scores

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "squad_official.json").read_text())
QUESTIONS = [q for article in FIXTURE["dataset"]["data"] for paragraph in article["paragraphs"] for q in paragraph["qas"]]


def given(questions):
    return ([[a["text"] for a in q["answers"]] for q in questions], [FIXTURE["predictions"][q["id"]] for q in questions],
            [FIXTURE["null_scores"][q["id"]] for q in questions])


def from_percent(official):
    return {name: value if name.endswith(("total", "thresh")) else value / 100 for name, value in official.items()}


def test_version_1_equals_the_official_script():
    golds, guesses, _ = given([q for q in QUESTIONS if not q["is_impossible"]])
    assert squad_scores(golds, guesses) == pytest.approx(from_percent(FIXTURE["official"]["1.1"]), abs=1e-12)


@pytest.mark.parametrize("threshold", [None, 0.0, -0.5, 2.0])
def test_version_2_equals_the_official_script(threshold):
    golds, guesses, nulls = given(QUESTIONS)
    if threshold is None:
        found, official = squad_scores(golds, guesses, unanswerable=True), FIXTURE["official"]["2.0"]
    else:
        found = squad_scores(golds, guesses, unanswerable=True, null_scores=nulls, threshold=threshold)
        official = FIXTURE["official"][f"2.0 above {threshold}"]
    assert found == pytest.approx(from_percent(official), abs=1e-12)


@pytest.mark.parametrize(
    "gold, guess, em, score",
    [
        ("The  Cat", "cat.", 1, 1),
        ("a b b c", "b c c", 0, 2 * 2 / 3 * 2 / 3 / (2 / 3 + 2 / 3)),      # the article a is gone: b b c against b c c
        ("U.S.", "us", 1, 1),
        ("well-known", "well known", 0, 0),
        ("", "", 1, 1),
        ("the", "!", 1, 1),
        ("Rome", "", 0, 0),
        ("another theory", "other theory", 0, 0.5),
        ("\u201cyes\u201d", "yes", 0, 0),                                  # only ASCII punctuation is taken away
    ],
)
def test_single_answers(gold, guess, em, score):
    assert exact(gold, guess) == em and f1(gold, guess) == pytest.approx(score) and f1(guess, gold) == pytest.approx(score)


def test_versions_differ_where_no_word_is_left():
    assert normalize_answer("An, the: A!") == ""
    assert f1("the", "a") == 1.0 and f1("the", "a", 0.0) == 0.0
    assert squad_scores([["the"]], ["a"])["f1"] == 0.0 and squad_scores([["the"]], ["a"], unanswerable=True)["f1"] == 1.0


def test_best_threshold_is_what_trying_every_threshold_finds():
    """The published run gave every question the null score 0, which leaves nothing to choose a threshold from."""
    rng = np.random.default_rng(3)
    golds = [["yes"] if answerable else [] for answerable in rng.random(60) < 0.6]
    guesses = ["yes" if right else "no" for right in rng.random(60) < 0.7]
    nulls = [float(n) for n in rng.normal(size=60) + [-0.8 if g else 0.8 for g in golds]]
    tried = {t: squad_scores(golds, guesses, unanswerable=True, null_scores=nulls, threshold=t)["f1"] for t in [-99.0, *nulls]}
    found = squad_scores(golds, guesses, unanswerable=True, null_scores=nulls)
    assert found["best_f1"] == pytest.approx(max(tried.values())) == pytest.approx(tried[found["best_f1_thresh"]])
    assert found["best_f1"] > found["f1"] > min(tried.values())


def test_threshold_where_no_guess_is_best():
    given = ([["yes"], []], ["no", "no"])
    found = squad_scores(*given, unanswerable=True, null_scores=[-3.0, -2.0])
    assert found["best_f1"] == 0.5 and found["f1"] == 0.0                 # at 0.0, which the official script would name
    assert squad_scores(*given, unanswerable=True, null_scores=[-3.0, -2.0], threshold=found["best_f1_thresh"])["f1"] == 0.5
    assert squad_scores(*given, unanswerable=True, null_scores=[0.2, 0.4])["best_f1_thresh"] == 0.0


def test_only_one_kind_of_question():
    assert not any(name.startswith("NoAns") for name in squad_scores([["x"]], ["x"], unanswerable=True))
    assert not any(name.startswith("HasAns") for name in squad_scores([[]], [""], unanswerable=True))


@pytest.mark.parametrize(
    "golds, guesses, options, words",
    [
        ([["x"]], [], {}, "0 guesses were given for 1 questions"),
        ([], [], {}, "for 1 question or more"),
        ([["x"], []], ["x", "y"], {}, "question 2 has 0 gold answers"),
        ([["x"]], ["x"], {"unanswerable": True, "null_scores": []}, "1 guesses and 0 null scores"),
    ],
)
def test_what_cannot_be_scored(golds, guesses, options, words):
    with pytest.raises(DataError, match=words):
        squad_scores(golds, guesses, **options)
