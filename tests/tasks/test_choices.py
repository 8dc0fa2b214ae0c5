"""Multiple choice: features as transformers' collator takes them, every spelling of a label, accuracy over ragged rows."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import transformers

from ptv2_engine.errors import ConfigError, DataError, LabelError
from ptv2_engine.tasks.base import settings_of, task_from
from ptv2_engine.tasks.choices import ChoiceTask
from ptv2_engine.tasks.data import Table

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "because", "it", "was", "tired", "."]
COPA = ChoiceTask(["text"], ["choice1", "choice2"], "label")
LISTED = ChoiceTask(["context", "question"], ["choices"], "answer")
ROWS = [{"text": "the cat sat because", "choice1": "it was tired.", "choice2": "the dog ran on a mat.", "label": 0},
        {"text": "a dog ran because", "choice1": "the mat sat.", "choice2": "it was a dog", "label": 1}]
LISTS = [{"context": "the cat sat.", "question": "it was", "choices": ["tired", "a mat", "the dog"], "answer": "a mat"},
         {"context": "a dog ran.", "question": "it was tired because", "choices": ["it ran", "it sat on the cat"], "answer": 0}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return transformers.BertTokenizerFast(str(file))


@pytest.mark.parametrize("max_length", [64, 9])
def test_each_choice_is_a_pair_of_its_own(tokenizer, max_length):
    features = COPA.features(Table(ROWS, "x"), tokenizer, max_length)
    for i, (feature, row) in enumerate(zip(features, ROWS, strict=True)):
        alone = [tokenizer(row["text"], row[f"choice{c}"], truncation=True, max_length=max_length) for c in (1, 2)]
        assert feature == {"row": i, "labels": row["label"], "input_ids": [a["input_ids"] for a in alone],
                           "token_type_ids": [a["token_type_ids"] for a in alone]}


def test_rows_may_differ_in_their_choices(tokenizer):
    features = LISTED.features(Table(LISTS, "x"), tokenizer, 64)
    assert [len(f["input_ids"]) for f in features] == [3, 2] and [f["labels"] for f in features] == [1, 0]
    assert tokenizer.decode(features[1]["input_ids"][1]) == \
        "[CLS] a dog ran. it was tired because [SEP] it sat on the cat [SEP]"
    assert LISTED.show(Table(LISTS, "x"), features, tokenizer, 1).splitlines()[-1] == "->  0"


def test_transformers_collator_takes_the_features(tokenizer):
    features = COPA.features(Table(ROWS, "x"), tokenizer, 64)
    batch = transformers.DataCollatorForMultipleChoice(tokenizer)([{k: v for k, v in f.items() if k != "row"} for f in features])
    pairs = [(row["text"], row[f"choice{c}"]) for row in ROWS for c in (1, 2)]
    padded = tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == padded["input_ids"].view(2, 2, -1).tolist() and batch["labels"].tolist() == [0, 1]


@pytest.mark.parametrize("label, index", [(1, 1), ("0", 0), (1.0, 1), ("1.0", 1), ("choice2", 1), (" it was a dog ", 1),
                                          (None, None), ("", None)])
def test_every_spelling_of_a_label(label, index):
    assert COPA.index(ROWS[1] | {"label": label}) == index


@pytest.mark.parametrize("label", [2, -1, "choice3", "it was", True])
def test_labels_that_are_no_choice(tokenizer, label):
    with pytest.raises(LabelError, match=r"is none of the row's 2 choices; give its index \(0 to 1\), choice1, choice2 or its"):
        COPA.index(ROWS[0] | {"label": label})
    with pytest.raises(LabelError, match="x row 2: label"):
        COPA.features(Table([ROWS[0], ROWS[1] | {"label": label}], "x"), tokenizer, 64)


def test_an_index_goes_before_a_text_that_looks_like_one():
    task = ChoiceTask(["q"], ["choices"], "answer")
    assert task.index({"choices": ["1", "0"], "answer": "1"}) == 1
    assert task.index({"choices": ["12", "7"], "answer": "7"}) == 1           # no such index: then it is the text


def test_problems_are_reported_by_row(tokenizer):
    rows = [*ROWS, ROWS[0] | {"text": ""}, ROWS[0] | {"choice2": "  "}, ROWS[0] | {"label": "sat"}, ROWS[0] | {"label": None},
            {"text": "x", "choice1": "y", "label": 0}]
    found = list(COPA.problems(Table(rows, "x")))
    assert [number for number, _ in found] == [3, 4, 5, 6, 7]
    for (_, said), words in zip(found, ["'text' is empty", "choice 1 is empty", "'sat' is none", "'label' is missing",
                                        "no column 'choice2'"], strict=True):
        assert words in said
    assert [number for number, _ in COPA.problems(Table(rows, "x"), labelled=False)] == [3, 4, 7]
    lists = [*LISTS, LISTS[0] | {"choices": ["one"]}, LISTS[0] | {"choices": "a, b"}]
    assert [number for number, _ in LISTED.problems(Table(lists, "x"), labelled=False)] == [3, 4]
    with pytest.raises(DataError, match="x row 3 has 1 choices"):
        LISTED.features(Table(lists[:3], "x"), tokenizer, 64, labelled=False)
    with pytest.raises(LabelError, match="x row 2 has no label in column 'label'"):
        COPA.features(Table([ROWS[0], ROWS[1] | {"label": None}], "x"), tokenizer, 64)


@pytest.mark.parametrize("labels, found", [
    (["1", "2", "3"], True), ([1, 3.0, None], True),
    ([1, 2, 2], False),                                             # of three choices: they may be indices
    ([0, 3, 1], False), ([1, 3, "red"], False), ([1, 3, 4], False)])
def test_labels_that_look_counted_from_one(labels, found):
    task = ChoiceTask(["q"], ["choices"], "label")
    rows = [{"q": "?", "choices": ["red", "green", "blue"], "label": label} for label in labels]
    assert any(number == 0 and "look 1-based" in what for number, what in task.problems(Table(rows, "x"))) is found
    rows = [row | {"choices": ["1", "2", "3"]} for row in rows]     # then a label may be a choice's text
    assert all(number for number, _ in task.problems(Table(rows, "x")))


def test_accuracy_leaves_out_choices_that_are_not_there():
    """A short row is filled with -10000 by the model, and with -100 where batches of different width were joined."""
    rng = np.random.default_rng(0)
    counts = rng.integers(2, 6, 50)
    real = [rng.normal(-150, 100, c) for c in counts]                          # many below -100
    labels = [int(rng.integers(c)) for c in counts]
    features = [{"row": i, "labels": label, "input_ids": [[0]] * c}
                for i, (label, c) in enumerate(zip(labels, counts, strict=True))]
    expected = np.mean([int(np.argmax(r)) == label for r, label in zip(real, labels, strict=True)])
    for fill in (-10000.0, -100.0):
        padded = np.array([[*r, *[fill] * (6 - len(r))] for r in real])
        assert COPA.metrics(Table([{}] * 50, "x"), features)(SimpleNamespace(predictions=padded)) == {"accuracy": expected}
    assert 0 < expected < 1


def test_answers_are_the_chosen_texts(tokenizer):
    table = Table(LISTS, "x")
    features = LISTED.features(table, tokenizer, 64, labelled=False)
    assert "labels" not in features[0]
    found = LISTED.answers(table, features, [np.array([0.0, 2.0, 0.0]), np.array([1.0, 0.0, -100.0])])
    assert found[0] == {"prediction": 1, "prediction_text": "a mat",
                        "probability": pytest.approx(np.exp(2) / (2 + np.exp(2)))}
    assert (found[1]["prediction_text"], found[1]["probability"]) == ("it ran", pytest.approx(np.e / (1 + np.e)))


def test_settings_and_the_head():
    for task in (COPA, LISTED):
        assert task_from(json.loads(json.dumps(settings_of(task)))) == task and settings_of(task)["kind"] == "choice"
        assert task.model_options(None) == {"num_labels": 1} and task.model_task == "multiple-choice"
    with pytest.raises(ConfigError, match="1 text columns and 0 choice columns"):
        ChoiceTask(["a"], [], "label")
