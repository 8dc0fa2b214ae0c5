"""GLUE's nine data sets from the hub's rows and from the download's own files, and how benchmarks are found and loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from ptv2_engine.errors import ConfigError, DataError
from ptv2_engine.tasks.benchmarks import BENCHMARKS, find_benchmark, load_benchmark
from ptv2_engine.tasks.data import Table
from ptv2_engine.tasks.glue import GLUE

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TEXT = Value("string")
ENTAILS = ["entailment", "not_entailment"]
# name -> (the hub's text columns, the hub's class names, metrics, best, the official file: header and rows)
SETS = {
    "cola": (("sentence",), ["unacceptable", "acceptable"], {"accuracy", "matthews"}, "matthews", None,
             ["gj04\t1\t\tIt is \"fine\".", "cj99\t0\t*\tFine it's is."]),
    "sst2": (("sentence",), ["negative", "positive"], {"accuracy"}, "accuracy", "sentence\tlabel", ["so \"good \t1", "bad \t0"]),
    "mrpc": (("sentence1", "sentence2"), ["not_equivalent", "equivalent"], {"accuracy", "f1"}, "accuracy",
             "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", ["1\t7\t8\tHe said \"a\tHe \"said\" a", "0\t5\t6\tb\tc"]),
    "qqp": (("question1", "question2"), ["not_duplicate", "duplicate"], {"accuracy", "f1"}, "accuracy",
            "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", ["0\t1\t2\twhat?\twhich?\t1", "1\t3\t4\twho?\twhy?\t0"]),
    "stsb": (("sentence1", "sentence2"), None, {"mse", "pearson", "spearman"}, "pearson",
             "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
             ["0\tg\tf\t2012\t1\tnone\tnone\ta b\tc d\t4.750", "1\tg\tf\t2012\t4\tnone\tnone\te\tf\t0.000"]),
    "mnli": (("premise", "hypothesis"), ["entailment", "neutral", "contradiction"], {"accuracy"}, "accuracy",
             "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\t"
             "sentence1\tsentence2\tlabel1\tgold_label",
             ["0\t1\t1n\tg\t( a )\t( b )\tx\ty\tp one\th one\tneutral\tcontradiction",
              "1\t2\t2n\tg\t( a )\t( b )\tx\ty\tp\th\tneutral\tneutral"]),
    "qnli": (("question", "sentence"), ENTAILS, {"accuracy"}, "accuracy", "index\tquestion\tsentence\tlabel",
             ["0\tq?\ts.\tentailment", "1\tq\ts\tnot_entailment"]),
    "rte": (("sentence1", "sentence2"), ENTAILS, {"accuracy"}, "accuracy", "index\tsentence1\tsentence2\tlabel",
            ["0\ta\tb\tnot_entailment", "1\tc\td\tentailment"]),
    "wnli": (("sentence1", "sentence2"), ENTAILS[::-1], {"accuracy"}, "accuracy", "index\tsentence1\tsentence2\tlabel",
             ["0\ta\tb\t1", "1\tc\td\t0"]),
}
# what the official rows above say: the texts and the label by the hub's name
EXPECTED = {
    "cola": [('It is "fine".', "acceptable"), ("Fine it's is.", "unacceptable")],
    "sst2": [('so "good ', "positive"), ("bad ", "negative")],
    "mrpc": [('He said "a', 'He "said" a', "equivalent"), ("b", "c", "not_equivalent")],
    "qqp": [("what?", "which?", "duplicate"), ("who?", "why?", "not_duplicate")],
    "stsb": [("a b", "c d", 4.75), ("e", "f", 0.0)],
    "mnli": [("p one", "h one", "contradiction"), ("p", "h", "neutral")],
    "qnli": [("q?", "s.", "entailment"), ("q", "s", "not_entailment")],
    "rte": [("a", "b", "not_entailment"), ("c", "d", "entailment")],
    "wnli": [("a", "b", "entailment"), ("c", "d", "not_entailment")],
}


def texts(table, columns):
    return [(*(row[c] for c in columns), row["label"]) for row in table.rows]


def official(folder, name, split="train"):
    header, lines = SETS[name][4:]
    (folder / f"{split}.tsv").write_text("\n".join([*([header] if header else []), *lines]) + "\n", encoding="utf-8")


def hub_split(name, known=True):
    columns, names = SETS[name][:2]
    rows = [dict(zip(columns, row, strict=False)) | {"idx": i, "label": (row[-1] if names is None else names.index(row[-1]))
                                                     if known else -1} for i, row in enumerate(EXPECTED[name])]
    label = Value("float32") if names is None else ClassLabel(names=names)
    return Dataset.from_list(rows, features=Features(dict.fromkeys(columns, TEXT) | {"idx": Value("int32"), "label": label}))


@pytest.mark.parametrize("name", SETS)
def test_official_files_and_hub_rows_are_the_same(monkeypatch, tmp_path, name):
    columns, names, kinds, best = SETS[name][:4]
    official(tmp_path, name)
    local = load_benchmark(GLUE[name], tmp_path)
    assert list(local) == ["train"] and texts(local["train"], columns) == EXPECTED[name]
    train, test = ("train", "test") if name != "mnli" else ("train", "test_matched")
    asked = []
    made = DatasetDict({train: hub_split(name), test: hub_split(name, known=False)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or made)
    from_hub = load_benchmark(find_benchmark("glue", name), None)
    assert texts(from_hub["train"], columns) == EXPECTED[name] and asked == [("nyu-mll/glue", name)]
    task = GLUE[name].make(local["train"], 0)
    assert task == GLUE[name].make(from_hub["train"], 0)
    assert (task.text_columns, task.names, task.best) == (list(columns), names or [], best)
    assert not list(task.problems(local["train"])) and "label" not in from_hub["test"].columns and len(from_hub["test"]) == 2
    # the epoch is chosen by a metric there is: the published trainer looks for accuracy alone and fails on CoLA and STS-B
    features = [{"row": i, "labels": task.labels.encode(row["label"], "x")} for i, row in enumerate(local["train"].rows)]
    scores = np.array([[f["labels"]] for f in features]) if names is None else np.eye(len(names))[[f["labels"] for f in features]]
    found = task.metrics(local["train"], features)(SimpleNamespace(predictions=scores))
    assert set(found) == kinds and found[task.best] == pytest.approx(1.0)


def test_mnli_has_two_validation_sets(monkeypatch, tmp_path):
    for split in ("train", "dev_matched", "dev_mismatched"):
        official(tmp_path, "mnli", split)
    text = (tmp_path / "dev_mismatched.tsv").read_text()
    (tmp_path / "dev_mismatched.tsv").write_text(text.replace("p one", "other genre"))
    (tmp_path / "test_matched.tsv").write_text("index\tsentence1\tsentence2\n0\ta\tb\n")
    local = load_benchmark(GLUE["mnli"], tmp_path)
    assert list(local) == ["train", "validation", "test", "validation_mismatched"]
    assert local["test"].columns == ["premise", "hypothesis"]
    assert [local[split].rows[0]["premise"] for split in ("validation", "validation_mismatched")] == ["p one", "other genre"]
    splits = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
    made = DatasetDict({split: hub_split("mnli", not split.startswith("test")) for split in splits})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: made)
    from_hub = load_benchmark(GLUE["mnli"], None)
    assert set(from_hub) == {"train", "validation", "validation_mismatched", "test", "test_mismatched"}
    assert from_hub["validation_mismatched"].source == "nyu-mll/glue/mnli validation_mismatched"


def test_own_copies_with_the_hubs_columns(tmp_path):
    (tmp_path / "train.csv").write_text('sentence,label\n"good, so good",1\nbad,negative\n')
    (tmp_path / "valid.jsonl").write_text('{"sentence": "fine", "label": "positive"}\n{"sentence": "dull", "label": -1}\n')
    tables = load_benchmark(GLUE["sst2"], tmp_path)
    assert texts(tables["train"], ["sentence"]) == [("good, so good", "positive"), ("bad", "negative")]
    assert texts(tables["validation"], ["sentence"]) == [("fine", "positive"), ("dull", None)]


def test_the_first_of_the_usual_names_is_the_validation_split(tmp_path):
    for name in ("train", "dev", "val"):
        (tmp_path / f"{name}.tsv").write_text(f"a\t1\t\t{name} one\nb\t0\t*\t{name} two\n")
    tables = load_benchmark(GLUE["cola"], tmp_path)
    assert list(tables) == ["train", "validation"] and tables["validation"].rows[0]["sentence"] == "val one"


@pytest.mark.parametrize(("name", "content", "words"), [
    ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\tc\td\n",
     "train.tsv row 2 has 3 fields where the header has 4"),
    ("rte", "0\ta\tb\tentailment\n", "has the columns 0, a, b, entailment, but rte needs sentence1 and sentence2"),
    ("sst2", "sentence\tlabel\n", "has 0 examples"),
    ("qnli", "index\tquestion\tlabel\n0\tq\tentailment\n", "row 1 has no column sentence"),
    ("sst2", b"sentence\tlabel\ncaf\xe9\t1\n", "cannot be read as tab separated UTF-8")])
def test_files_that_are_wrong(tmp_path, name, content, words):
    (tmp_path / "train.tsv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=words):
        load_benchmark(GLUE[name], tmp_path)


def test_labels_that_are_none_are_left_to_be_reported(tmp_path):
    (tmp_path / "train.tsv").write_text("sentence\tlabel\na\t1\nb\tpos\nc\t2\nd\tNEGATIVE\n")
    table = load_benchmark(GLUE["sst2"], tmp_path)["train"]
    assert [number for number, _ in GLUE["sst2"].make(table, 0).problems(table)] == [2, 3]


def test_qqps_broken_rows_are_left_out(tmp_path):
    lines = [SETS["qqp"][4], "0\t1\t2\ta?\tb?\t0", "1\t3\t4\tcut in", "two?\t1", "2\t5\t6\tc?\t\t0", "3\t7\t8\td?\te\rf\t1"]
    (tmp_path / "train.tsv").write_bytes("\r\n".join(lines).encode())
    assert texts(load_benchmark(GLUE["qqp"], tmp_path)["train"], ["question1", "question2"]) == [
        ("a?", "b?", "not_duplicate"), ("d?", "e\rf", "duplicate")]


@pytest.mark.parametrize(("name", "folder", "sizes", "column"), [
    ("cola", "cola", {"train": 7250, "validation": 1301}, 1), ("mrpc", "mrpc", {"train": 4076, "test": 1725}, 0),
    ("sst2", "sst2", {"train": 60614, "validation": 6735, "test": 872}, 1)])
def test_the_real_files(name, folder, sizes, column):
    if not SHARED.is_dir():
        pytest.skip("the shared data folder is not beside the checkout")
    tables = load_benchmark(GLUE[name], SHARED / folder)
    assert {split: len(table) for split, table in tables.items()} == sizes
    task = GLUE[name].make(tables["train"], 0)
    assert not [p for table in tables.values() for p in task.problems(table)]
    stem = "msr_paraphrase_train.txt" if name == "mrpc" else "train.tsv"
    lines = (SHARED / folder / stem).read_text(encoding="utf-8-sig").strip().split("\n")[name != "cola":]
    ones = sum(line.split("\t")[column].strip() == "1" for line in lines)
    assert sum(row["label"] == task.names[1] for row in tables["train"].rows) == ones > len(lines) / 2


def test_benchmarks_are_found_by_any_spelling():
    assert find_benchmark("GLUE", "SST-2") is find_benchmark("glue", "sst2") is BENCHMARKS["glue"]["sst2"]
    assert {task: set(sets) for task, sets in BENCHMARKS.items()} == {
        "glue": set(SETS), "superglue": {"boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"},
        "ner": {"conll2003", "conll2004", "ontonotes"}, "srl": {"conll2005", "conll2012"}, "qa": {"squad", "squad_v2"}}
    for task, sets in BENCHMARKS.items():
        for name, benchmark in sets.items():
            assert find_benchmark(task, name) is benchmark and benchmark.name == name and "train" in benchmark.splits
    for task, name in (("glue", "imdb"), ("superglue", "sst2"), ("sentiment", "sst2")):
        with pytest.raises(ConfigError, match=f"--dataset_name {name} is unknown; there are glue: cola"):
            find_benchmark(task, name)


def test_folders_without_data(tmp_path):
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\na\t1\n")
    with pytest.raises(DataError, match=r"holds no train file \(train, with the suffix .csv"):
        load_benchmark(GLUE["sst2"], tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        load_benchmark(GLUE["sst2"], tmp_path / "none")


def test_a_hub_that_fails_says_the_way_out(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nlong story")
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"nyu-mll/glue/rte cannot be loaded \(Couldn't reach the Hub\); download its files and"):
        load_benchmark(GLUE["rte"], None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: DatasetDict({"test": hub_split("rte", known=False)}))
    with pytest.raises(DataError, match="has the splits test, but no train"):
        load_benchmark(GLUE["rte"], None)


def test_a_data_set_that_no_hub_has():
    with pytest.raises(DataError, match="conll2005 may not be copied to the hub; .* pass --data_dir"):
        load_benchmark(find_benchmark("srl", "conll2005"), None)


def test_a_data_set_that_is_a_script_comes_from_its_parquet_copy(monkeypatch):
    asked = []

    def load(*names, **options):
        asked.append((names, options))
        if not options:
            raise RuntimeError("Dataset scripts are no longer supported, but found glue.py")
        return DatasetDict({"train": hub_split("rte")})
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts(load_benchmark(GLUE["rte"], None)["train"], ["sentence1", "sentence2"]) == EXPECTED["rte"]
    assert asked[1] == (("nyu-mll/glue",), {"data_dir": "rte", "revision": "refs/convert/parquet"})


def test_class_names_in_lists(monkeypatch):
    """Tags come as lists of numbers; their names lie one level deeper in the features."""
    names = ["O", "B-PER", "I-PER"]
    features = Features({"tokens": [TEXT], "ner_tags": [ClassLabel(names=names)], "note": TEXT})
    split = Dataset.from_list([{"tokens": ["Anna", "ran"], "ner_tags": [1, 0], "note": "n"}], features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: DatasetDict({"train": split}))
    seen = []
    plain = SimpleNamespace(hub=("some/ner",), splits={"train": "train"}, rows=lambda table, *more: seen.append(more) or table)
    table = load_benchmark(plain, None, 1)["train"]
    assert table.rows == [{"tokens": ["Anna", "ran"], "ner_tags": ["B-PER", "O"], "note": "n"}] and seen == [(1,)]
    assert isinstance(table, Table)
