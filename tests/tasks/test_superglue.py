"""SuperGLUE's eight data sets, from the hub's rows and from the official files: the published inputs, written out here."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from ptv2_engine.errors import ConfigError, DataError
from ptv2_engine.tasks.benchmarks import find_benchmark, load_benchmark
from ptv2_engine.tasks.data import Table, read_table
from ptv2_engine.tasks.superglue import SUPERGLUE, multirc_rows, record_rows, wsc_words

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TEXT, INT, TRUTH = Value("string"), Value("int32"), ClassLabel(names=["False", "True"])
PASSAGE = "Anna met Bob in Rome.\n@highlight\nRome is old\n@highlight\nBob left"
# name -> (the hub's features, its rows, template -> the text columns of each row as published, the label of each row)
HUB = {
    "boolq": ({"question": TEXT, "passage": TEXT, "label": TRUTH},
              [{"question": "is it wet", "passage": "It rains.", "label": 1}, {"question": "q", "passage": "p", "label": 0}],
              {0: [("is it wet", "It rains."), ("q", "p")]}, ["True", "False"]),
    "cb": ({"premise": TEXT, "hypothesis": TEXT, "label": ClassLabel(names=["entailment", "contradiction", "neutral"])},
           [{"premise": "p", "hypothesis": "h", "label": 2}, {"premise": "a", "hypothesis": "b", "label": 0}],
           {0: [("p", "h"), ("a", "b")]}, ["neutral", "entailment"]),
    "rte": ({"premise": TEXT, "hypothesis": TEXT, "label": ClassLabel(names=["entailment", "not_entailment"])},
            [{"premise": "p", "hypothesis": "h", "label": 1}, {"premise": "a", "hypothesis": "b", "label": 0}],
            {0: [("p", "h"), ("a", "b")]}, ["not_entailment", "entailment"]),
    "wic": ({"word": TEXT, "sentence1": TEXT, "sentence2": TEXT, "start1": INT, "label": TRUTH},
            [{"word": "bank", "sentence1": "A bank.", "sentence2": "The bank.", "start1": 2, "label": 0},
             {"word": "run", "sentence1": "I run.", "sentence2": "We run.", "start1": 2, "label": 1}],
            {0: [("A bank. The bank. Does bank have the same meaning in both sentences?",),
                 ("I run. We run. Does run have the same meaning in both sentences?",)],
             1: [("bank: A bank.", "bank: The bank."), ("run: I run.", "run: We run.")]}, ["False", "True"]),
    "wsc": ({"text": TEXT, "span1_index": INT, "span2_index": INT, "span1_text": TEXT, "span2_text": TEXT, "label": TRUTH},
            [{"text": "Bob hit Al. He ran.", "span1_index": 0, "span2_index": 3, "span1_text": "Bob", "span2_text": "He",
              "label": 1},
             {"text": "Al saw him, too.", "span1_index": 0, "span2_index": 1, "span1_text": "Al", "span2_text": "him",
              "label": 0}],
            {0: [("He: Bob hit Al. He ran.", "Bob"), ("him: Al saw him, too.", "Al")],
             1: [("Bob hit Al. *He* ran.", "Bob"), ("Al saw *him* , too.", "Al")]}, ["True", "False"]),
    "copa": ({"premise": TEXT, "choice1": TEXT, "choice2": TEXT, "question": TEXT,
              "label": ClassLabel(names=["choice1", "choice2"])},
             [{"premise": "It fell.", "choice1": "a", "choice2": "b", "question": "cause", "label": 1},
              {"premise": "It broke.", "choice1": "c", "choice2": "d", "question": "effect", "label": 0}],
             {0: [("It fell. because", "a", "b"), ("It broke. so", "c", "d")]}, ["choice2", "choice1"]),
    "multirc": ({"paragraph": TEXT, "question": TEXT, "answer": TEXT, "label": TRUTH,
                 "idx": {"paragraph": INT, "question": INT, "answer": INT}},
                [{"paragraph": "P.", "question": "Q?", "answer": "x", "label": 1,
                  "idx": {"paragraph": 0, "question": 0, "answer": 0}},
                 {"paragraph": "P.", "question": "Q?", "answer": "y", "label": 0,
                  "idx": {"paragraph": 0, "question": 0, "answer": 1}}],
                {0: [("P.", "Q? x"), ("P.", "Q? y")]}, ["True", "False"]),
    "record": ({"passage": TEXT, "query": TEXT, "entities": [TEXT], "answers": [TEXT], "idx": {"passage": INT, "query": INT}},
               [{"passage": PASSAGE, "query": "@placeholder is old", "entities": ["Anna", "Bob", "Rome"], "answers": ["Rome"],
                 "idx": {"passage": 0, "query": 0}}],
               {0: [("Anna met Bob in Rome.\n- Rome is old\n- Bob left", f"{e} is old") for e in ("Anna", "Bob", "Rome")]},
               ["0", "0", "1"]),
}
CASES = [(name, template) for name, (_, _, inputs, _) in HUB.items() for template in inputs]


def hub(monkeypatch, name):
    """load_dataset gives small splits with the hub's features; the test split has no labels."""
    features, rows, _, _ = HUB[name]
    hidden = [row | ({"answers": []} if name == "record" else {"label": -1}) for row in rows]
    made = DatasetDict({split: Dataset.from_list(some, features=Features(features))
                        for split, some in (("train", rows), ("validation", rows), ("test", hidden))})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or made)
    return asked


def write(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(("name", "template"), CASES)
def test_the_published_inputs_from_the_hub(monkeypatch, name, template):
    asked = hub(monkeypatch, name)
    benchmark = find_benchmark("SuperGLUE", name.upper())
    tables = load_benchmark(benchmark, None, template)
    task = benchmark.make(tables["train"], template)
    columns = [*task.text_columns, *getattr(task, "choice_columns", [])]
    for split in ("train", "validation"):
        assert [tuple(row[c] for c in columns) for row in tables[split].rows] == HUB[name][2][template]
        assert [row["label"] for row in tables[split].rows] == HUB[name][3]
        assert not list(task.problems(tables[split]))
    # -1 is no label, and a table without any has no column for them
    assert "label" not in tables["test"].columns and not task.has_labels(tables["test"])
    assert not list(task.problems(tables["test"], labelled=False)) and len(tables["test"]) == len(tables["train"])
    assert asked == [(("aps/super_glue", name), {})]


def official(name):
    """The hub's rows above as the official download nests them, with its own spelling of labels."""
    rows = HUB[name][1]
    if name == "multirc":
        answers = [{"text": row["answer"], "label": row["label"], "idx": i} for i, row in enumerate(rows)]
        return [{"idx": 0, "passage": {"text": "P.", "questions": [{"question": "Q?", "answers": answers, "idx": 0}]}}]
    if name == "record":         # "end" is the entity's last character; Rome comes twice
        spans = [{"start": s, "end": e} for s, e in ((16, 19), (0, 3), (9, 11), (33, 36))]
        answers = [{"start": 16, "end": 19, "text": "Rome"}, {"start": 33, "end": 36, "text": "Rome"}]
        return [{"source": "CNN", "passage": {"text": PASSAGE, "entities": spans}, "idx": 0,
                 "qas": [{"query": "@placeholder is old", "answers": answers, "idx": 0}]}]
    if name == "wsc":
        spans = ("span1_index", "span2_index", "span1_text", "span2_text")
        return [{"text": r["text"], "target": {k: r[k] for k in spans}, "idx": i, "label": bool(r["label"])}
                for i, r in enumerate(rows)]
    if name in ("boolq", "wic"):
        return [row | {"label": bool(row["label"])} for row in rows]
    if name in ("cb", "rte"):
        return [row | {"label": label} for row, label in zip(rows, HUB[name][3], strict=True)]
    return rows


@pytest.mark.parametrize(("name", "template"), CASES)
def test_official_files_give_the_hubs_rows(monkeypatch, tmp_path, name, template):
    hub(monkeypatch, name)
    benchmark = SUPERGLUE[name]
    theirs = load_benchmark(benchmark, None, template)["train"]
    write(tmp_path, "train.jsonl", official(name))
    write(tmp_path, "val.jsonl", official(name))
    ours = load_benchmark(benchmark, tmp_path, template)
    task = benchmark.make(theirs, template)
    # COPA's files have 0 and 1 where the hub has names
    keys = [*task.text_columns, "label", *{"record": ["entity", "answers", "idx"], "multirc": ["idx"]}.get(name, [])]
    assert [{k: row[k] for k in keys} for row in ours["train"].rows] == [{k: row[k] for k in keys} for row in theirs.rows]
    assert list(ours) == ["train", "validation"] and benchmark.make(ours["train"], template) == task


def test_metrics_and_best_epochs():
    def task(name):
        return SUPERGLUE[name].make(Table([{"label": None}], "x"), 0)
    best = dict.fromkeys(SUPERGLUE, "accuracy") | {"multirc": "f1", "record": "f1"}
    assert {name: task(name).best for name in SUPERGLUE} == best
    assert task("cb").extra_metrics == ["f1_macro"] and task("cb").names == ["entailment", "contradiction", "neutral"]
    assert {name: task(name).group for name in ("multirc", "record", "boolq")} == {"multirc": "multirc", "record": "record",
                                                                                   "boolq": None}
    assert task("copa").model_task == "multiple-choice" and set(SUPERGLUE) == set(HUB)


def test_multirc_rows_number_their_questions():
    nested = [{"idx": 7, "passage": {"text": "P", "questions": [
        {"question": "q0", "idx": 3, "answers": [{"text": "a", "label": 1, "idx": 5}, {"text": "b"}]},
        {"question": "q1", "answers": [{"text": "c", "label": 0}]}]}}]
    assert multirc_rows(nested) == [
        {"paragraph": "P", "question": "q0", "answer": "a", "label": 1, "idx": {"paragraph": 7, "question": 3, "answer": 5}},
        {"paragraph": "P", "question": "q0", "answer": "b", "idx": {"paragraph": 7, "question": 3, "answer": 1}},
        {"paragraph": "P", "question": "q1", "answer": "c", "label": 0, "idx": {"paragraph": 7, "question": 1, "answer": 0}}]
    flat = multirc_rows([{"paragraph": p, "question": q, "answer": "a"} for p, q in ("PQ", "PQ", "PR", "SQ")])
    questions = [(row["idx"]["paragraph"], row["idx"]["question"]) for row in flat]
    assert questions[0] == questions[1] and len(set(questions)) == 3            # without idx, the texts say which question it is
    with pytest.raises(DataError, match="MultiRC row 2 is neither the hub's nor the official form"):
        multirc_rows([nested[0], {"text": "?"}])


def test_record_rows_cut_entities_with_their_last_character():
    row = official("record")[0]
    found = record_rows([row, row | {"qas": [{"query": "@placeholder left"}]}])
    assert [r["entities"] for r in found] == [["Anna", "Bob", "Rome"]] * 2      # each once, in the order of the text
    assert [r["answers"] for r in found] == [["Rome"], []] and found[0]["idx"] == {"passage": 0, "query": 0}
    with pytest.raises(DataError, match="ReCoRD row 1 is neither the hub's nor the official form"):
        record_rows([{"passage": "p", "entities": []}])
    bad = Table([HUB["record"][1][0] | {"query": "who is old"}], "x")
    with pytest.raises(DataError, match="x query 1: 'who is old' has no @placeholder"):
        SUPERGLUE["record"].rows(bad, 0)


@pytest.mark.parametrize(("text", "pronoun", "index", "words", "at"), [
    ("Bob saw him and left him there", "him", 5, "Bob saw him and left him there", 5),
    ("Bob saw him and left him there", "him", 1, "Bob saw him and left him there", 2),        # off by one, to the nearest
    ('he said "Good for him," he', "him", 4, 'he said "Good for him ," he', 4),               # joined to punctuation
    ('"He left', "He", 0, '" He left', 1),
    ("he's gone", "he", 0, "he 's gone", 0),
    ("They saw it, they left", "it,", 2, "They saw it, they left", 2),                        # span2_text has the comma too
    ("They left", "they", 0, "They left", 0)])                                                # another case
def test_the_pronoun_is_found_by_its_text(text, pronoun, index, words, at):
    row = {"text": text, "target": {"span2_text": pronoun, "span2_index": index}}
    assert wsc_words(row) == (words.split(), at) == wsc_words({"text": text} | row["target"])


def test_a_pronoun_that_is_not_there():
    with pytest.raises(DataError, match="the pronoun 'them' is not a word of the text 'They left'"):
        wsc_words({"text": "They left", "span2_text": "them", "span2_index": 0})
    table = Table([HUB["wsc"][1][0], HUB["wsc"][1][0] | {"span2_text": "them"}], "x")
    with pytest.raises(DataError, match="x row 2: the pronoun 'them'"):
        SUPERGLUE["wsc"].rows(table, 1)


@pytest.mark.parametrize("name", ["wic", "wsc"])
def test_templates_there_are_not(name):
    table = Table(HUB[name][1], "x")
    with pytest.raises(ConfigError, match="--template_id 2 does not exist; WiC and WSC have 0 and 1"):
        SUPERGLUE[name].rows(table, 2)
    with pytest.raises(ConfigError, match="--template_id 2"):
        SUPERGLUE[name].make(table, 2)


@pytest.mark.parametrize("folder", ["superglue-rte", "superglue-wsc"])
def test_the_real_files(folder):
    if not SHARED.is_dir():
        pytest.skip("the shared data folder is not beside the checkout")
    benchmark = find_benchmark("superglue", folder.removeprefix("superglue-"))
    sizes = {"superglue-rte": [2490, 277, 3000], "superglue-wsc": [554, 104, 146]}[folder]
    for template in (0, 1):
        tables = load_benchmark(benchmark, SHARED / folder, template)
        task = benchmark.make(tables["train"], template)
        assert [len(tables[s]) for s in ("train", "validation", "test")] == sizes and "label" not in tables["test"].columns
        lines = (SHARED / folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
        labels = [str(json.loads(line)["label"]) for line in lines]
        assert [row["label"] for row in tables["train"].rows] == labels
        assert not [p for split, table in tables.items() for p in task.problems(table, labelled=split != "test")]
    if folder == "superglue-wsc":
        for row in (row for table in tables.values() for row in table.rows):
            assert row["marked_text"].count("*") == 2
        raw = [row for name in ("train", "val", "test") for row in read_table(SHARED / folder / f"{name}.jsonl").rows]
        found = [wsc_words(row) for row in raw]
        assert all(words[at] == row["target"]["span2_text"] for row, (words, at) in zip(raw, found, strict=True))
        assert sum(at != row["target"]["span2_index"] for row, (_, at) in zip(raw, found, strict=True)) == 1
