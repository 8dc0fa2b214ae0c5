"""Texts with a class or a number: features against the tokenizer, metrics against their libraries and plain loops."""

from __future__ import annotations

import json
import re
import string
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from scipy import stats
from sklearn import metrics as sk

from ptv2_engine.errors import ConfigError, DataError, LabelError
from ptv2_engine.tasks.base import refuse_problems, settings_of, task_from
from ptv2_engine.tasks.data import Table
from ptv2_engine.tasks.glm_tokenizer import load_glm_tokenizer
from ptv2_engine.tasks.sequences import SequenceTask, published_task
from tests.tasks import glm_vocabulary

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "##s", "."]
ROWS = [{"a": "the cat sat on a mat.", "b": "the dog", "y": "no"}, {"a": "a dog ran", "b": "cats sat on the mats.", "y": "yes"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return transformers.BertTokenizerFast(str(file))


def prediction(scores):
    return SimpleNamespace(predictions=scores, label_ids=None)


def labelled(labels, **more):
    """Features that hold their label, and the table they are of."""
    columns = [dict(zip(more, values, strict=True)) for values in zip(*more.values(), strict=True)] or [{} for _ in labels]
    return Table(columns, "x"), [{"row": i, "labels": label} for i, label in enumerate(labels)]


@pytest.mark.parametrize("columns", [["a"], ["a", "b"]])
@pytest.mark.parametrize("max_length", [64, 8])
def test_features_are_the_tokenizers_one_row_at_a_time(tokenizer, columns, max_length):
    task = SequenceTask(columns, "y", "classes", ["yes", "no"])
    features = task.features(Table(ROWS, "x"), tokenizer, max_length)
    for i, (feature, row) in enumerate(zip(features, ROWS, strict=True)):
        alone = tokenizer(*(row[c] for c in columns), truncation=True, max_length=max_length)
        assert feature == {"row": i, "labels": 1 - i, "input_ids": alone["input_ids"], "token_type_ids": alone["token_type_ids"]}
    assert max(len(f["input_ids"]) for f in features) <= max_length


def test_no_token_types_where_the_tokenizer_makes_none(tmp_path):
    glm = load_glm_tokenizer(glm_vocabulary.write(tmp_path))
    features = SequenceTask(["a", "b"], "y", "classes", ["no", "yes"]).features(Table(ROWS, "x"), glm, 64, labelled=False)
    assert [set(f) for f in features] == [{"row", "input_ids"}] * 2


def test_numbers_and_labels_that_are_wrong(tokenizer):
    task = SequenceTask(["a"], "y", "values", [], best="pearson")
    table = Table([{"a": "the cat", "y": "2.5"}, {"a": "a dog", "y": 1}], "x")
    assert [f["labels"] for f in task.features(table, tokenizer, 16)] == [2.5, 1.0]
    table.rows[1]["y"] = "high"
    with pytest.raises(LabelError, match="x row 2: label 'high' is not a number"):
        task.features(table, tokenizer, 16)
    with pytest.raises(LabelError, match="x row 1: label 'no' is not one of the 2 known labels"):
        SequenceTask(["a"], "y", "classes", ["yes", "maybe"]).features(Table(ROWS, "x"), tokenizer, 16)


@pytest.mark.parametrize("task", [
    SequenceTask(["a"], "y", "classes", ["no", "yes"], ["f1", "matthews"], "matthews"),
    SequenceTask(["a", "b"], "y", "values", [], best="pearson"),
    SequenceTask(["a", "b"], "label", "classes", ["0", "1"], best="f1", group="record")])
def test_settings_make_an_equal_task(task):
    assert task_from(json.loads(json.dumps(settings_of(task)))) == task and settings_of(task)["kind"] == "sequence"


def test_what_the_model_is_told():
    options = SequenceTask(["a"], "y", "classes", ["no", "yes", "?"]).model_options(None)
    assert options == {"num_labels": 3, "id2label": {0: "no", 1: "yes", 2: "?"}, "problem_type": None}
    assert SequenceTask(["a"], "y", "values", []).model_options(None) == {"num_labels": 1, "id2label": None,
                                                                          "problem_type": "regression"}


def test_problems_are_reported_by_row():
    task = SequenceTask(["a", "b"], "y", "classes", ["no", "yes"])
    rows = [*ROWS, {"a": " ", "b": "x", "y": "no"}, {"a": "x", "b": None, "y": "yes"}, {"a": "x", "b": "x", "y": "maybe"},
            {"a": "x", "b": "x", "y": None}, {"a": "x", "b": "x", "y": ""}, {"a": "x", "y": "no"}]
    found = list(task.problems(Table(rows, "x")))
    assert [number for number, _ in found] == [3, 4, 5, 6, 7, 8]
    for (_, said), words in zip(found, ["'a' is empty", "'b' is empty", "'maybe' is not one of no, yes", "'y' is missing",
                                        "'y' is missing", "no column 'b'"], strict=True):
        assert words in said
    assert [number for number, _ in task.problems(Table(rows, "x"), labelled=False)] == [3, 4, 8]
    with pytest.raises(DataError, match=r"x: row 3: the text 'a' is empty; row 4: .* and 1 more"):
        refuse_problems(task, Table(rows, "x"))
    values = SequenceTask(["a"], "y", "values", [])
    numbers = [{"a": "x", "y": v} for v in (1, "2.5", "high", float("nan"), True, -3.0)]
    assert [number for number, _ in values.problems(Table(numbers, "x"))] == [3, 4, 5]


def test_labels_of_another_type_are_one_class():
    """Booleans of jsonl and their names in csv, whole numbers with and without a point."""
    true = SequenceTask(["a"], "y", "classes", ["False", "True"])
    assert not list(true.problems(Table([{"a": "x", "y": v} for v in (True, "False", " True ")], "x")))
    ones = SequenceTask(["a"], "y", "classes", ["0", "1"])
    assert not list(ones.problems(Table([{"a": "x", "y": v} for v in (1, "0", 1.0)], "x")))


def test_a_training_file_of_one_class_is_refused():
    table = Table([{"text": f"t{i}", "label": "yes"} for i in range(3)], "train.csv")
    assert next(iter(SequenceTask(["text"], "label", "classes", ["yes"]).problems(table)))[0] == 0
    with pytest.raises(DataError, match="train.csv: every label is 'yes', and one class cannot be learned"):
        published_task(table, ["text"], ["no", "yes"])
    # a validation file may be of one class
    assert not list(SequenceTask(["text"], "label", "classes", ["no", "yes"]).problems(table))


@pytest.mark.parametrize("arguments", [(["a"], "y", "tags", ["O"]), (["a", "b", "c"], "y", "classes", ["0", "1"]),
                                       ([], "y", "classes", ["0", "1"])])
def test_settings_that_cannot_be(arguments):
    with pytest.raises(ConfigError):
        SequenceTask(*arguments)
    with pytest.raises(ConfigError, match="group 'record' with 3 classes"):
        SequenceTask(["a"], "y", "classes", ["0", "1", "2"], group="record")


def test_class_metrics_equal_sklearn():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(60, 2)), rng.integers(0, 2, 60)
    task = SequenceTask(["a"], "y", "classes", ["0", "1"], ["f1", "f1_macro", "matthews"])
    table, features = labelled(labels.tolist())
    found, guess = task.metrics(table, features)(prediction(scores)), scores.argmax(1)
    assert found == pytest.approx({
        "accuracy": sk.accuracy_score(labels, guess), "f1": sk.f1_score(labels, guess),
        "f1_macro": sk.f1_score(labels, guess, average="macro"), "matthews": sk.matthews_corrcoef(labels, guess)})
    assert task.metrics(table, features)(prediction((scores, "hidden"))) == found


def test_regression_metrics_equal_scipy():
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 9, (50, 1)).astype(float), rng.integers(0, 5, 50).astype(float)
    found = SequenceTask(["a"], "y", "values", []).metrics(*labelled(labels.tolist()))(prediction(scores))
    assert found["pearson"] == pytest.approx(stats.pearsonr(scores[:, 0], labels).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(scores[:, 0], labels).statistic)
    assert found["mse"] == pytest.approx(sk.mean_squared_error(labels, scores[:, 0]))


def test_multirc_counts_answers_and_whole_questions():
    rng = np.random.default_rng(2)
    for _ in range(20):
        scores, labels = rng.normal(size=(40, 2)), rng.integers(0, 2, 40).tolist()
        # the same question number in two paragraphs is two questions
        idx = [{"paragraph": int(rng.integers(2)), "question": int(rng.integers(7)), "answer": i} for i in range(40)]
        guess = scores.argmax(1).tolist()
        whole = defaultdict(list)
        for at, truth, said in zip(idx, labels, guess, strict=True):
            whole[at["paragraph"], at["question"]].append(truth == said)
        task = SequenceTask(["a"], "y", "classes", ["False", "True"], best="f1", group="multirc")
        found = task.metrics(*labelled(labels, idx=idx))(prediction(scores))
        assert found == pytest.approx({"f1": sk.f1_score(labels, guess), "accuracy": sk.accuracy_score(labels, guess),
                                       "exact_match": np.mean([all(v) for v in whole.values()])})
    nothing = task.metrics(*labelled([0, 0], idx=idx[:2]))(prediction(np.array([[1.0, 0.0], [1.0, 0.0]])))
    assert nothing == {"f1": 0.0, "exact_match": 1.0, "accuracy": 1.0}


def published_record(scores, entities, questions, answers):
    """What the published evaluation does, in plain loops: largest raw logit of class 1, ties to the last by spelling."""
    def words(text):
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    def f1(guess, gold):
        same = sum((Counter(words(guess)) & Counter(words(gold))).values())
        return 0 if same == 0 else 2 * same / (len(words(guess)) + len(words(gold)))

    by_question, golds = defaultdict(list), {}
    for score, entity, question, gold in zip(scores, entities, questions, answers, strict=True):
        by_question[question].append((score, entity))
        golds[question] = gold
    best = {question: sorted(pairs, reverse=True)[0][1] for question, pairs in by_question.items()}
    return {"f1": np.mean([max(f1(best[q], g) for g in golds[q]) for q in best]),
            "exact_match": np.mean([max(words(best[q]) == words(g) for g in golds[q]) for q in best])}


def test_record_equals_the_published_evaluation():
    rng = np.random.default_rng(3)
    names = ["The Hague", "Hague", "Anna B.", "anna b", "Rome", "New York", "New York City", "an Apple", "U.S."]
    task = SequenceTask(["passage", "query"], "label", "classes", ["0", "1"], best="f1", group="record")
    for _ in range(20):
        questions = np.repeat(np.arange(8), 5)
        entities = rng.choice(names, 40).tolist()
        golds = {q: rng.choice(names, int(rng.integers(1, 4))).tolist() for q in range(8)}
        scores = rng.integers(-3, 3, (40, 2)).astype(float)                     # whole numbers: ties are common
        order = rng.permutation(40)
        columns = {"entity": [entities[i] for i in order], "answers": [golds[questions[i]] for i in order],
                   "idx": [{"passage": 0, "query": int(questions[i])} for i in order]}
        found = task.metrics(*labelled([0] * 40, **columns))(prediction(scores))
        arguments = columns["entity"], questions[order].tolist(), columns["answers"]
        published = published_record(scores[:, 1].tolist(), *arguments)
        margin = published_record((scores[:, 1] - scores[:, 0]).tolist(), *arguments)
        assert found == pytest.approx(published | {f"margin_{name}": value for name, value in margin.items()})


def test_answers_and_what_is_shown(tokenizer):
    task, table = SequenceTask(["a", "b"], "y", "classes", ["no", "yes"]), Table(ROWS, "x")
    features = task.features(table, tokenizer, 64)
    found = task.answers(table, features, [np.array([0.0, 3.0]), np.array([1.0, 1.0])])
    assert found[0] == {"prediction": "yes", "probability": pytest.approx(
        np.exp(3) / (1 + np.exp(3)))}
    assert (found[1]["prediction"], found[1]["probability"]) == ("no", pytest.approx(0.5))
    assert task.show(table, features, tokenizer, 1) == "[CLS] a dog ran [SEP] cats sat on the mats. [SEP]  ->  yes"
    values = SequenceTask(["a"], "y", "values", [])
    assert values.answers(table, features, [[1.25], [2.0]])[0] == {"prediction": 1.25}
