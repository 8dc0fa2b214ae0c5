"""What evaluate and predict read, refuse and write, and the predictions of a training run."""

from __future__ import annotations

import csv
import io
import json

import pytest

from ptv2_engine.cli import main
from ptv2_engine.cli_args import DataArguments
from ptv2_engine.cli_predictions import beside, form_of, own_rows, render
from ptv2_engine.cli_tables import check_columns, load_data
from ptv2_engine.errors import ConfigError, DataError, OutputError
from ptv2_engine.tasks import Table
from ptv2_engine.tasks.choices import ChoiceTask
from ptv2_engine.tasks.cloze_task import ClozeTask
from ptv2_engine.tasks.sequences import SequenceTask
from ptv2_engine.tasks.spans import SpanTask
from ptv2_engine.tasks.tags import TagTask
from tests.test_cli_tasks import backbone, files, rows, train  # noqa: F401


def write(path, made):
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(backbone, tmp_path_factory):  # noqa: F811
    """A folder with an adapter for one text, trained with --do_predict on a test table without labels."""
    folder = tmp_path_factory.mktemp("run")
    for name, count in (("train", 16), ("test", 5)):
        made = [{"id": f"{name}{i}", "text": row["premise"]} | ({"label": row["label"]} if name == "train" else {})
                for i, row in enumerate(rows("pair", count))]
        write(folder / f"{name}.jsonl", made)
    words = ["--train_file", folder / "train.jsonl", "--test_file", folder / "test.jsonl", "--do_predict"]
    assert train(backbone, folder / "a", *words, epochs=1) == 0
    return folder


def predict(run, *words):
    return main(["predict", str(run / "a"), *map(str, words), "--device", "cpu"])


def test_a_training_run_writes_what_predict_writes(run, tmp_path):
    written = read(run / "a" / "predictions.jsonl")
    assert [row["id"] for row in written] == [f"test{i}" for i in range(5)]
    assert predict(run, "--file", run / "test.jsonl", "--output", tmp_path / "p.jsonl") == 0
    for ours, theirs in zip(written, read(tmp_path / "p.jsonl"), strict=True):
        assert list(ours) == ["id", "text", "prediction", "probability"]
        assert theirs == ours | {"probability": pytest.approx(ours["probability"], abs=1e-5)}


def test_labelled_test_tables_are_predicted_too(backbone, tmp_path, capsys):  # noqa: F811
    test = write(tmp_path / "test.jsonl", rows("tags", 6))
    assert train(backbone, tmp_path / "a", *files(tmp_path, "tags"), "--test_file", test, "--do_predict", epochs=1) == 0
    written = read(tmp_path / "a" / "predictions.jsonl")
    assert [{k: row[k] for k in ("words", "tags")} for row in written] == rows("tags", 6)
    right = [t == p for row in written for t, p in zip(row["tags"], row["prediction"], strict=True)]
    metrics = json.loads((tmp_path / "a" / "results.json").read_text())["test"]
    assert sum(right) / len(right) == pytest.approx(metrics["test_accuracy"])
    assert "test: predictions of 6 rows in" in capsys.readouterr().out


def test_words_of_an_unlabelled_test_file_are_split(tmp_path):
    write(tmp_path / "train.jsonl", [{"words": "ann went", "tags": "B-PER O"}])
    write(tmp_path / "test.jsonl", [{"words": "bob saw paris"}])
    tables, _ = load_data(DataArguments(train_file=str(tmp_path / "train.jsonl"), test_file=str(tmp_path / "test.jsonl")))
    assert tables["test"].rows == [{"words": ["bob", "saw", "paris"]}]


def test_every_data_set_of_a_run_has_its_predictions(backbone, tmp_path):  # noqa: F811
    sets = {}
    for kind in ("pair", "tags"):
        (tmp_path / kind).mkdir()
        files(tmp_path / kind, kind)
        sets[kind] = {"train_file": str(tmp_path / kind / "train.jsonl"), "test_file": str(tmp_path / kind / "dev.jsonl")}
    together = tmp_path / "sets.yaml"
    together.write_text(json.dumps({"data_sets": sets}))            # JSON is YAML
    assert train(backbone, tmp_path / "a", "--multi_task", together, "--do_predict", epochs=1) == 0
    for kind, made in ((kind, rows(kind, 10, 1)) for kind in sets):
        again = tmp_path / f"{kind}.jsonl"
        assert main(["predict", str(tmp_path / "a" / kind), "--file", sets[kind]["test_file"], "--output", str(again),
                     "--device", "cpu"]) == 0
        written, theirs = read(tmp_path / "a" / kind / "predictions.jsonl"), read(again)
        assert [{name: row[name] for name in own} for row, own in zip(written, made, strict=True)] == made
        assert [row["prediction"] for row in written] == [row["prediction"] for row in theirs]


def test_the_outputs_name_says_its_form_and_lines_stay_lines(run, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ann went\n\n  \nbob, \"saw\"\n"))
    assert predict(run, "--output", tmp_path / "p.csv") == 0
    found = list(csv.DictReader(io.StringIO((tmp_path / "p.csv").read_text())))
    assert [row["text"] for row in found] == ["ann went", "", "  ", 'bob, "saw"']
    assert [bool(row["prediction"]) for row in found] == [True, False, False, True]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert predict(run, "--output", tmp_path / "p.jsonl") == 0
    assert read(tmp_path / "p.jsonl") == [{"text": "", "prediction": None}]


def refuse(*_words, **_named):
    raise AssertionError("a model is loaded before the file was looked at")


def test_wrong_columns_are_one_sentence_before_a_model_is_loaded(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ptv2_engine.cli_predict._load_model", refuse)
    other = write(tmp_path / "other.jsonl", [{"sentence": "ann went", "gold": "yes"}] * 9)
    assert predict(run, "--file", other) == 2
    error = capsys.readouterr().err
    assert f"{other} has no column 'text', only 'sentence', 'gold', but this task reads 'text'; rename" in error
    assert "--text_columns" in error and "row" not in error
    evaluate = ["evaluate", str(run / "a"), str(other), "--text_columns", "sentence"]
    assert main(evaluate) == 2
    assert "has no labels in a column 'label' to score against, only 'sentence', 'gold'; name" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="a model is loaded"):
        main([*evaluate, "--label_column", "gold"])


@pytest.mark.parametrize(("task", "missing"), [
    (SequenceTask(["a", "b"], "label", "classes", ["x", "y"]), "'b'"),
    (TagTask("a", "tags", ["O", "B-X"], "verb"), "'verb'"), (SpanTask(question_column="a"), "'context'"),
    (ChoiceTask(["a"], ["c1", "c2"], "label"), "'c1' and no column 'c2'"),
    (ClozeTask({"template": "{a} {b} {mask}", "verbalizers": ["x=x", "y=y"]}), "'b'"),
])
def test_columns_that_no_row_has(task, missing):
    with pytest.raises(DataError, match=f"file has no column {missing}, only 'a', 'd', but this task reads 'a', "):
        check_columns(task, Table([{"a": "t"}, {"a": "t", "d": 1}], "file"))


def test_folders_that_do_not_exist(run, capsys):
    assert main(["predict", "/nope", "ann"]) == 2
    assert "the adapter folder /nope does not exist" in capsys.readouterr().err
    assert predict(run, "ann", "--backbone", "/nope") == 2
    error = capsys.readouterr().err
    assert "the folder '/nope' does not exist" in error and "tokenizer" not in error


def test_what_cannot_be_written_or_read_is_refused_first(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ptv2_engine.cli_predict._load_model", refuse)
    assert predict(run, "ann", "--file", run / "test.jsonl") == 2
    assert "1 texts and --file" in capsys.readouterr().err
    with pytest.raises(OutputError, match="its folder is missing"):
        form_of(str(tmp_path / "no" / "p.csv"), None)
    with pytest.raises(ConfigError, match=r"the suffix '.json', but predictions are written as .jsonl, .csv"):
        form_of(str(tmp_path / "p.json"), None)
    forms = [form_of(str(tmp_path / name), form) for name, form in (("p.CSV", None), ("p.json", "jsonl"), ("p", None))]
    assert forms == ["csv", "jsonl", "table"] and form_of(None, None) == "table"


def test_rows_of_a_file_or_what_was_made_of_them():
    given, made = Table([{"id": 1, "#1 String": "a"}], "x"), Table([{"sentence1": "a"}], "x")
    assert own_rows(given, made) == given.rows
    assert own_rows(Table(given.rows * 2, "x"), made) == made.rows              # QQP's empty questions are left out
    for nested in ({"paragraphs": []}, {"passage": {"text": "a"}}):
        assert own_rows(Table([nested], "x"), made) == made.rows


def test_columns_of_the_same_name_are_replaced_and_said(capsys):
    assert beside([{"id": 1, "prediction": "old"}], [{"prediction": "new"}]) == [{"id": 1, "prediction": "new"}]
    assert "that predictions replace in the output: prediction" in capsys.readouterr().err


def test_cells_of_any_value():
    made = [{"id": 1, "words": ["a", "b"], "text": "c\n\"d\""}, {"id": 2, "score": 0.123456, "text": "q" * 300}]
    first, second = csv.DictReader(io.StringIO(render(made, "csv"), newline=""))
    assert json.loads(first["words"]) == ["a", "b"] and first["text"] == made[0]["text"] and first["score"] == ""
    assert second == {"id": "2", "words": "", "text": "q" * 300, "score": "0.123456"}
    drawn = render(made, "table")
    assert '["a", "b"]' in drawn and "0.1235" in drawn and drawn.count("q") == 200
    assert [json.loads(line) for line in render(made, "jsonl").splitlines()] == made
