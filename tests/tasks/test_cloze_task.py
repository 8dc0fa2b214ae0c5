"""ClozeTask: official files, published metrics against plain computations, problems by row, answers, settings."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ptv2_engine.errors import ConfigError, DataError
from ptv2_engine.tasks.base import refuse_problems, settings_of, task_from
from ptv2_engine.tasks.cloze_patterns import PATTERNS
from ptv2_engine.tasks.cloze_task import ClozeTask
from ptv2_engine.tasks.data import Table, read_table
from ptv2_engine.tasks.glm_tokenizer import load_glm_tokenizer
from tests.tasks import glm_vocabulary
from tests.tasks.test_cloze_features import ROWS

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def question(idx, text, first, **answers):
    """As official files have it; its answers are numbered from `first`."""
    return {"idx": idx, "question": text, "answers": [{"idx": first + i, "text": answer.replace("_", " "), "label": label}
                                                      for i, (answer, label) in enumerate(answers.items())]}


MULTIRC = [
    {"idx": 0, "passage": {"text": "The cat sat on the mat. Mark told Pete.", "questions": [
        question(0, "Who sat?", 0, the_cat=1, Pete=0, a_cat=1), question(1, "Who told Pete?", 3, Mark=1)]}},
    {"idx": 1, "passage": {"text": "It rained.", "questions": [question(2, "Was it wet?", 4, no=0, yes=1)]}}]
TEXT = "Mark told the Pete. It was Mark\u2019s mat."
RECORD = [{"idx": 4, "source": "made up", "passage": {"text": TEXT, "entities": [
               {"start": 0, "end": 3}, {"start": 10, "end": 17}, {"start": 27, "end": 30}]},
           "qas": [{"idx": 7, "query": "Then @placeholder sat.", "answers": [{"start": 10, "end": 17, "text": "the Pete"}]},
                   {"idx": 8, "query": "So @placeholder lies.", "answers": [{"start": 0, "end": 3, "text": "Mark"},
                                                                           {"start": 27, "end": 30, "text": "Mark"}]}]}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_glm_tokenizer(glm_vocabulary.write(tmp_path_factory.mktemp("gpt2"), 600))


def task_of(name, pattern_id=0, **options):
    return ClozeTask({"name": name, "pattern_id": pattern_id}, **options)


def metrics_of(task, table, tokenizer, predictions):
    return task.metrics(table, task.features(table, tokenizer, 256))(SimpleNamespace(predictions=predictions, label_ids=None))


def official_file(folder, rows):
    file = folder / "val.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_table(file)


def test_an_official_multirc_file_is_laid_flat_and_scored_by_question(tokenizer, tmp_path):
    from sklearn.metrics import f1_score

    task, table = task_of("multirc"), official_file(tmp_path, MULTIRC)
    features = task.features(table, tokenizer, 256)
    labels = [1, 0, 1, 1, 0, 1]
    assert [f["labels"] for f in features] == labels and not list(task.problems(table))
    assert [f["row"] for f in features] == list(range(6)) and len(task.flat(table)) == 6
    text = tokenizer.decode(features[5]["input_ids"][:features[5]["causal_from"]])
    assert text == "[CLS]It rained. Question: Was it wet? Is it yes?[MASK].<|endoftext|>"
    assert features == task.features(task.flat(table), tokenizer, 256)
    questions = [0, 0, 0, 1, 2, 2]
    generator = np.random.default_rng(1)
    for _ in range(5):
        scores = generator.normal(size=(6, 2))
        guess = scores.argmax(-1)
        right = [all(guess[i] == labels[i] for i in range(6) if questions[i] == q) for q in range(3)]
        want = {"f1": f1_score(labels, guess), "exact_match": sum(right) / 3, "accuracy": (guess == labels).mean()}
        assert metrics_of(task, table, tokenizer, scores) == pytest.approx(want)
        assert metrics_of(task, table, tokenizer, guess) == pytest.approx(want)
    assert task.best == "f1"


def squad_normal(text):
    """Lower case, no punctuation, no articles, single spaces: SQuAD's normalisation written out."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def squad_f1(guess, gold):
    guess, gold = squad_normal(guess), squad_normal(gold)
    same = sum((Counter(guess) & Counter(gold)).values())
    return 2 * same / (len(guess) + len(gold)) if same else 0.0


def test_an_official_record_file_is_laid_flat_and_scored_over_its_gold_answers(tokenizer, tmp_path):
    task, table = task_of("record"), official_file(tmp_path, RECORD)
    features = task.features(table, tokenizer, 256)
    entities, golds = ["Mark", "the Pete"], [["the Pete"], ["Mark"]]
    assert [row["entities"] for row in task.flat(table).rows] == [entities] * 2
    assert [f["labels"] for f in features] == [1, 0] and not list(task.problems(table))
    text = tokenizer.decode(features[0]["input_ids"][:features[0]["causal_from"]])
    assert text == "[CLS]Mark told the Pete. It was Mark's mat. Then[MASK] sat.<|endoftext|>"
    for guesses in ([1, 0], [0, 0], [0, 1]):
        texts = [entities[g] for g in guesses]
        want = {"f1": np.mean([max(squad_f1(t, gold) for gold in g) for t, g in zip(texts, golds, strict=True)]),
                "exact_match": np.mean([max(squad_normal(t) == squad_normal(gold) for gold in g)
                                        for t, g in zip(texts, golds, strict=True)]),
                "accuracy": np.mean([t in g for t, g in zip(texts, golds, strict=True)])}
        assert metrics_of(task, table, tokenizer, np.array(guesses)) == pytest.approx(want)
    trained = task.features(table, tokenizer, 256, training=True)
    assert [f["row"] for f in trained] == [0, 1] and {f["labels"] for f in trained} == {0}


def test_records_gold_answers_are_compared_as_squad_does(tokenizer):
    """An entity that differs from a gold answer in its article alone is an exact match, and shared words count for F1."""
    row = {"passage": "x", "query": "@placeholder sat", "entities": ["The Pete!", "Pete", "Pete Mark", "Mark"],
           "answers": ["Pete", "Mark"]}
    task, table = task_of("record"), Table([row] * 4, "file")
    order = ["Mark", "Pete", "Pete Mark", "The Pete!"]                                   # alphabetical
    found = metrics_of(task, table, tokenizer, np.array([0, 1, 2, 3]))
    f1 = np.mean([max(squad_f1(e, g) for g in row["answers"]) for e in order])
    assert found == pytest.approx({"f1": f1, "exact_match": 3 / 4, "accuracy": 2 / 4}) and f1 == pytest.approx((3 + 2 / 3) / 4)


def test_cb_has_macro_f1(tokenizer):
    from sklearn.metrics import f1_score

    labels, guess = [0, 1, 2, 2, 0, 1], np.array([0, 1, 1, 2, 2, 1])
    task, table = task_of("cb"), Table([ROWS["cb"] | {"label": y} for y in labels], "file")
    want = {"accuracy": 4 / 6, "f1_macro": f1_score(labels, guess, average="macro")}
    assert metrics_of(task, table, tokenizer, guess) == pytest.approx(want)
    assert metrics_of(task, table, tokenizer, np.eye(3)[guess] - 5) == pytest.approx(want)


@pytest.mark.parametrize("name", ["boolq", "rte", "wic", "copa"])
def test_the_other_data_sets_have_accuracy(tokenizer, name):
    names = {"rte": ["entailment", "not_entailment"], "copa": ["choice1", "choice2"]}.get(name, ["False", "True"])
    table = Table([ROWS[name] | {"label": names[y]} for y in (0, 1, 1, 0)], "file")      # class names, as the hub's
    assert metrics_of(task_of(name), table, tokenizer, np.array([0, 1, 0, 0])) == {"accuracy": 0.75}


def test_wsc_is_right_where_the_span_is_guessed_exactly_when_the_label_says_so(tokenizer):
    """Rows whose span is wrong count too: any other candidate is the right guess."""
    rows = [ROWS["wsc"] | {"label": label, "candidates": ["Pete", "lies", "sat"][:n]}
            for label, n in ((True, 2), (False, 3), (False, 1), (True, 1))]
    task, table = task_of("wsc"), Table(rows, "file")
    assert [f["labels"] for f in task.features(table, tokenizer, 256)] == [0, -100, -100, 0]
    assert metrics_of(task, table, tokenizer, np.array([0, 3, 0, 1])) == {"accuracy": 0.5}
    # Rows of fewer candidates come padded, here with something larger than their scores
    scores = np.array([[-200, -250, -300, -100], [-300, -310, -250, -200], [-150, -200, -100, -100], [-400, -300, -100, -100.]])
    assert metrics_of(task, table, tokenizer, scores) == {"accuracy": 0.5}
    scores[3, 0] = -200
    assert metrics_of(task, table, tokenizer, scores) == {"accuracy": 0.75}


@pytest.mark.parametrize("name", PATTERNS)
def test_settings_make_an_equal_task(tokenizer, name):
    task = task_of(name, min(len(PATTERNS[name]) - 1, 1), label_column="gold")
    settings = json.loads(json.dumps(settings_of(task)))
    assert settings["kind"] == "cloze"
    again = task_from(settings)
    row = dict(ROWS[name])
    row["gold"] = row.pop("label", None)
    table = Table([row], "file")
    assert again.features(table, tokenizer, 256) == task.features(table, tokenizer, 256)
    assert again.model_options(tokenizer) == task.model_options(tokenizer)


def test_model_options(tokenizer):
    yes, no = (tokenizer.encode(w, add_special_tokens=False) for w in (" Yes", " No"))
    assert task_of("rte").model_options(tokenizer) == {"verbalizer_ids": [*yes, *no], "length_penalty": 0.0, "num_labels": 2,
                                                       "id2label": {0: "entailment", 1: "not_entailment"}}
    assert task_of("wsc").model_options(tokenizer) == {"verbalizer_ids": None, "length_penalty": 1.0, "mix_loss": True,
                                                       "num_labels": None, "id2label": None}
    assert task_of("copa").model_options(tokenizer)["mix_loss"] is False
    with pytest.raises(ConfigError, match="0 to 4"):
        task_of("rte", 5)


@pytest.mark.parametrize(("name", "change", "what"), [
    ("rte", {"label": "perhaps"}, "label 'perhaps' has no verbalizer"),
    ("rte", {"label": -1}, "the label 'label' is missing, empty or -1"),
    ("boolq", {"question": ""}, "the column 'question' is empty"),
    ("wic", {"word": None}, "the column 'word' is empty"),
    ("copa", {"label": 7}, "label 7 is neither 0 nor 1"),
    ("wsc", {"candidates": None}, "a WSC row has no candidates"),
    ("record", {"answers": ["Paul"]}, "the ReCoRD answer 'Paul' is not one of the row's 3 entities"),
    ("record", {"query": "nothing to fill"}, "has no @placeholder"),
])
def test_problems_name_their_rows(name, change, what):
    table = Table([ROWS[name], ROWS[name] | change, ROWS[name]], "file")
    ((row, text),) = task_of(name).problems(table)
    assert row == 2 and what in text and not text.endswith(".")
    with pytest.raises(DataError, match="row 2: "):
        refuse_problems(task_of(name), table)
    assert len(list(task_of(name).problems(table, labelled=False))) == ("label 'label'" not in text)


def test_nested_rows_of_another_form_are_a_problem_of_the_file():
    ((row, text),) = task_of("multirc").problems(Table([{"passage": {"text": "x"}}], "file"))
    assert row == 0 and "row 1" in text and "official" in text


@pytest.mark.parametrize("name", ["rte", "boolq"])
def test_a_training_file_of_one_class_is_refused(tokenizer, name):
    table = Table([ROWS[name]] * 3, "train.jsonl")
    with pytest.raises(DataError, match="train.jsonl: every label is"):
        task_of(name).features(table, tokenizer, 256, training=True)
    assert len(task_of(name).features(table, tokenizer, 256)) == 3             # an evaluation may well be of one class


def test_wsc_without_a_right_span_cannot_be_learned(tokenizer):
    with pytest.raises(DataError, match="no row has an answer to learn"):
        task_of("wsc").features(Table([ROWS["wsc"] | {"label": False}] * 2, "train.jsonl"), tokenizer, 256, training=True)


@pytest.mark.parametrize("name", PATTERNS)
def test_whether_a_table_has_labels(name):
    unknown = {"answers": []} if name == "record" else {"label": -1}
    assert task_of(name).has_labels(Table([ROWS[name]], "file"))
    assert not task_of(name).has_labels(Table([ROWS[name] | unknown], "file"))


def test_answers_are_labels_or_candidates_with_their_probability(tokenizer):
    task, table = task_of("rte"), Table([ROWS["rte"] | {"label": -1}] * 2, "file")
    features = task.features(table, tokenizer, 256, labelled=False)
    found = task.answers(table, features, [np.array([1.0, 0.0]), np.array([0.0, 2.0])])
    assert [a["prediction"] for a in found] == ["entailment", "not_entailment"]
    assert [a["probability"] for a in found] == pytest.approx([1 / (1 + np.exp(-1)), 1 / (1 + np.exp(-2))])
    task, table = task_of("copa"), Table([ROWS["copa"]], "file")
    padded = np.array([-300.0, -200.0, -10000.0, -100.0])                       # two candidates, and a batch's padding
    (found,) = task.answers(table, task.features(table, tokenizer, 256), [padded])
    assert found == {"prediction": 1, "prediction_text": "the grass was cut", "probability": pytest.approx(1.0)}


def test_examples_are_shown_with_what_fills_their_blank(tokenizer):
    def shown(name, **change):
        task, table = task_of(name), Table([ROWS[name] | change], "file")
        return task.show(table, task.features(table, tokenizer, 256), tokenizer, 0)

    assert shown("multirc") == "[CLS]The cat sat. Question: Who sat? Is it the cat?[MASK].<|endoftext|>  ->  true"
    assert shown("copa").endswith("[MASK].<|endoftext|>  [the sun was rising | the grass was cut]  ->  the sun was rising")
    assert shown("wsc", label=False).endswith("[Mark | Pete | lies]  ->  not Mark")


def test_a_pattern_of_ones_own(tokenizer):
    task = ClozeTask({"template": "{a} It was {mask}.", "verbalizers": ["-1= No", "1= Yes"]}, label_column="mood")
    table = Table([{"a": "the cat sat.", "mood": -1}, {"a": "the mat.", "mood": 1.0}], "file")      # -1 is a label here
    assert [f["labels"] for f in task.features(table, tokenizer, 64, training=True)] == [0, 1]
    assert metrics_of(task, table, tokenizer, np.array([[2.0, 1.0], [5.0, 1.0]])) == {"accuracy": 0.5}
    ((_, what),) = task.problems(Table([{"b": "x", "mood": 1}], "file"))
    assert what.startswith("the column 'a' of its pattern is missing")


@pytest.mark.skipif(not (SHARED / "superglue-rte").is_dir(), reason="no ../shared/data")
def test_the_real_unlabelled_test_set(tokenizer):
    table = read_table(SHARED / "superglue-rte" / "test.jsonl")
    task = task_of("rte")
    assert not task.has_labels(table) and not list(task.problems(table, labelled=False))
    table.rows = table.rows[:300]
    features = task.features(table, tokenizer, 256, labelled=False)
    assert len(features) == 300 and not any("labels" in f for f in features)
