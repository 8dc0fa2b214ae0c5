"""Data flags on the command line: what goes together, what is guessed, what is cut, and what checkpoints remember."""

from __future__ import annotations

import argparse
import json
import re

import pytest
import transformers

from ptv2_engine.cli import main
from ptv2_engine.cli_args import DataArguments, parse_train
from ptv2_engine.cli_predict import Predictor
from ptv2_engine.cli_tables import load_data
from ptv2_engine.errors import ConfigError, DataError
from ptv2_engine.tasks import Table
from ptv2_engine.tasks.custom import task_for
from ptv2_engine.testing import tiny_model
from tests.test_cli_tasks import backbone, files, rows, train  # noqa: F401
from tests.test_multitask import plan


def write(path, made):
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A tiny RoBERTa with a byte-level BPE tokenizer, as the hub's, which glues words that are split already."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("roberta")
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    plain.train_from_iterator([" ".join(row["words"]) for row in rows("tags", 50)] * 3, trainer)
    plain.model.save(str(folder))
    transformers.RobertaTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    tiny_model("roberta", vocab_size=310).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["tags", "srl"])
def test_words_are_read_as_in_a_text_in_training_and_after(byte_level, kind, tmp_path, capsys):
    assert train(byte_level, tmp_path / "a", *files(tmp_path, kind), epochs=1) == 0
    arguments = argparse.Namespace(adapter=str(tmp_path / "a"), backbone=None, text_columns=None, batch_size=4, device="cpu",
                                   max_seq_length=None, dtype=None, frozen_dtype=None, stream_weights=None)
    predictor = Predictor(arguments)
    table = predictor._taken(predictor._given(str(tmp_path / "dev.jsonl")))
    (feature, *_), words = predictor.task.features(table, predictor.tokenizer, 64), table.rows[0]["words"]
    text = predictor.tokenizer(" " + " ".join(words))["input_ids"]
    assert feature["input_ids"][:len(text) - 1] == text[:-1]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "a"), str(tmp_path / "dev.jsonl"), "--device", "cpu"]) == 0
    trained = json.loads((tmp_path / "a" / "results.json").read_text())["last_evaluation"]["eval_f1"]
    assert json.loads(capsys.readouterr().out)["f1"] == pytest.approx(trained, abs=1e-6)


@pytest.mark.parametrize(("flags", "sentence"), [
    ({"dataset_name": "rte", "task_name": "superglue", "train_file": "x.jsonl"}, "--train_file is for files of your own"),
    ({"dataset_name": "rte", "task_name": "superglue", "text_columns": ["a"]}, "--text_columns is for files of your own"),
    ({"dataset_name": "rte", "task_name": "superglue", "label_column": "a"}, "--label_column a is for files"),
    ({"dataset_name": "rte"}, "belong together"), ({}, "no training data"),
    ({"train_file": "x.jsonl", "data_dir": "d"}, "--data_dir d holds a published data set's files"),
    ({"train_file": "x.jsonl", "max_train_samples": -1}, "--max_train_samples -1 is below 1"),
    ({"train_file": "x.jsonl", "head": "poetry"}, "--head 'poetry' does not exist"),
])
def test_flags_that_do_not_go_together(flags, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_data(DataArguments(**flags))


def test_files_of_ones_own_beside_a_preset():
    _, data, prompt, training, _ = parse_train(["--preset", "wsc-roberta-large", "--train_file", "mine.jsonl"])
    assert (data.task_name, data.dataset_name, data.train_file) == (None, None, "mine.jsonl")
    assert (prompt.prompt_length, training.learning_rate, training.num_train_epochs) == (8, 1e-2, 10)


def test_a_preset_inside_a_config_file(tmp_path):
    (tmp_path / "c.yaml").write_text("preset: rte-bert-large\nprompt_length: 7\n")
    model, data, prompt, training, _ = parse_train(["--config", str(tmp_path / "c.yaml"), "--seed", "5"])
    assert (model.model_name_or_path, data.dataset_name) == ("bert-large-cased", "rte")
    assert (prompt.prompt_length, training.learning_rate, training.seed) == (7, 1e-2, 5)
    with pytest.raises(ConfigError, match="--config takes one value, but got 0"):
        parse_train(["--config"])


@pytest.mark.parametrize(("method", "rate"), [("p-tuning-v2", 5e-3), ("fine-tuning", 2e-5), ("lora", 3e-4), ("bitfit", 1e-3)])
def test_a_method_brings_its_learning_rate(method, rate):
    assert parse_train(["--method", method])[3].learning_rate == rate
    assert parse_train(["--method", method, "--learning_rate", "7e-3"])[3].learning_rate == 7e-3


def test_no_reparameterization_can_be_asked_for():
    prompt = parse_train(["--preset", "wic-bert-large", "--reparameterization", "none"])[2]
    assert prompt.prompt_config().reparameterization is None
    assert parse_train(["--preset", "wic-bert-large"])[2].prompt_config().reparameterization == "mlp"


@pytest.mark.parametrize(("row", "texts"), [
    ({"id": "a1", "review": "fine words", "label": "x"}, ["review"]),
    ({"idx": 3, "premise": "a b", "hypothesis": "c d", "label": "x"}, ["premise", "hypothesis"]),
    ({"text": "a b", "score": 3, "label": "x"}, ["text"]),
    ({"text": "a b", "score": "3.5", "label": "x"}, ["text"]),
])
def test_ids_and_numbers_are_no_text(row, texts):
    assert task_for(Table([row, row | {"label": "y"}], "t")).text_columns == texts


@pytest.mark.parametrize("row", [{"question": "who", "sentence": "a b", "source": "web"},
                                 {"text": "a", "summary": "b", "more": "c"}])
def test_what_could_be_meant_otherwise_is_asked_for(row):
    with pytest.raises(DataError, match="which of the columns .* Give --text_columns"):
        task_for(Table([row | {"label": "x"}, row | {"label": "y"}], "t"))


def test_numbers_are_classes_unless_regression_is_asked_for():
    table = Table([{"text": f"t {i}", "label": i} for i in range(5)], "t")
    assert task_for(table).label_kind == "classes"
    task = task_for(table, task="regression")
    assert (task.label_kind, task.best) == ("values", "pearson") and task.model_options(None)["num_labels"] == 1


def test_cutting_leaves_something_to_learn_and_whole_questions(tmp_path):
    made = sorted(rows("pair", 24), key=lambda r: r["label"])
    write(tmp_path / "train.jsonl", made)
    with pytest.raises(DataError, match="every one of the 4 rows has the label 'no'"):
        load_data(DataArguments(train_file=str(tmp_path / "train.jsonl"), max_train_samples=4))
    answers = [{"text": f"a{i}", "label": i % 2} for i in range(4)]
    nested = [{"idx": p, "passage": {"text": "p", "questions": [{"idx": 3 * p + q, "question": "q", "answers": [
        answer | {"idx": 12 * p + 4 * q + i} for i, answer in enumerate(answers)]} for q in range(3)]}} for p in range(2)]
    for split in ("train", "val"):
        write(tmp_path / f"{split}.jsonl", nested)
    tables, _ = load_data(DataArguments(task_name="superglue", dataset_name="multirc", data_dir=str(tmp_path),
                                        max_train_samples=5, max_eval_samples=8))
    assert (len(tables["train"]), len(tables["validation"])) == (8, 8)


def test_a_validation_file_without_entities_is_scored_and_a_training_file_is_refused(tmp_path):
    made = rows("tags", 4)
    empty = [row | {"tags": ["O"] * len(row["words"])} for row in made]
    train_file, validation = write(tmp_path / "train.jsonl", made), write(tmp_path / "dev.jsonl", empty)
    tables, _ = load_data(DataArguments(train_file=str(train_file), validation_file=str(validation)))
    assert len(tables["validation"]) == 4
    with pytest.raises(DataError, match="tagged 'O' throughout"):
        load_data(DataArguments(train_file=str(validation)))


@pytest.mark.parametrize("kind", ["tags", "span", "pair"])
def test_a_test_file_without_labels_is_not_scored(backbone, kind, tmp_path, capsys):  # noqa: F811
    empty = {"tags": {"tags": []}, "span": {"answers": {"text": [], "answer_start": []}}, "pair": {"label": None}}[kind]
    test = write(tmp_path / "test.jsonl", [{k: v for k, v in row.items() if k != "answer"} | empty for row in rows(kind, 5)])
    assert train(backbone, tmp_path / "a", *files(tmp_path, kind), "--test_file", test, epochs=1) == 0
    assert "test: 5 rows without labels, which are not scored" in capsys.readouterr().out
    assert "test" not in json.loads((tmp_path / "a" / "results.json").read_text())


def test_a_checkpoint_reads_files_as_its_run_did(backbone, tmp_path, capsys):  # noqa: F811
    words = [*files(tmp_path, "pair"), "--save_strategy", "epoch", "--max_seq_length", "9"]
    assert train(backbone, tmp_path / "a", *words, epochs=1) == 0
    capsys.readouterr()
    found = []
    for folder in (tmp_path / "a", tmp_path / "a" / "checkpoint-3"):
        assert main(["evaluate", str(folder), str(tmp_path / "dev.jsonl"), "--device", "cpu"]) == 0
        captured = capsys.readouterr()
        found.append(json.loads(captured.out))
        assert "taking" not in captured.err
    assert found[0] == found[1]


def test_brackets_in_a_text_are_no_markup(backbone, tmp_path, capsys):  # noqa: F811
    made = [{"text": r["premise"], "label": r["label"]} for r in rows("pair", 24)]
    write(tmp_path / "train.jsonl", made)
    assert train(backbone, tmp_path / "a", "--train_file", tmp_path / "train.jsonl", epochs=1) == 0
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "a"), "rome [red] city [/b]", "--device", "cpu"]) == 0
    assert "rome [red] city [/b]" in capsys.readouterr().out


def test_a_run_is_not_resumed_with_other_labels(backbone, tmp_path, capsys):  # noqa: F811
    assert train(backbone, tmp_path / "a", *files(tmp_path, "pair"), "--save_strategy", "epoch", epochs=1) == 0
    other = [row | {"label": {"yes": "aye", "no": "zero"}[row["label"]]} for row in rows("pair", 24)]
    words = ["--train_file", write(tmp_path / "other.jsonl", other), "--resume_from_checkpoint", tmp_path / "a" / "checkpoint-3"]
    assert train(backbone, tmp_path / "b", *words) == 2
    assert "with the labels no, yes, but this model is for sequence-classification with aye, zero" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "sentence"), [
    (["--learning_rate", "-1"], "--learning_rate -1 is outside"),
    (["--label_smoothing_factor", "0.1"], "smooths over classes, but multiple-choice"),
    (["--batch_eval_metrics", "True"], "batch by batch"),
])
def test_trainer_flags_that_would_compute_something_else(backbone, words, sentence, tmp_path, capsys):  # noqa: F811
    assert train(backbone, tmp_path / "a", *files(tmp_path, "choice"), *words, epochs=1) == 2
    assert sentence in capsys.readouterr().err


def test_data_sets_take_the_command_lines_flags_unless_they_have_their_own(backbone, tmp_path, capsys):  # noqa: F811
    yaml = plan(tmp_path, ("pair", "cloze"))
    content = json.loads(yaml.read_text())
    content["data_sets"]["cloze"] |= {"head": "cloze", "pattern": "{text} ? {mask} .", "verbalizers": ["yes=yes", "no=no"],
                                      "max_seq_length": 20}
    yaml.write_text(json.dumps(content))
    common = ["--max_seq_length", "11", "--max_train_samples", "16"]
    assert train(backbone, tmp_path / "a", "--multi_task", yaml, *common, epochs=1) == 0
    lengths = {name: json.loads((tmp_path / "a" / name / "ptv2_data.json").read_text())["max_seq_length"]
               for name in ("pair", "cloze")}
    assert lengths == {"pair": 11, "cloze": 20}
    assert "16 examples" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "a" / "cloze"), str(tmp_path / "cloze" / "dev.jsonl"), "--device", "cpu"]) == 0


@pytest.mark.parametrize(("change", "flags", "sentence"), [
    ({"max_seq_length": "long"}, [], "data set pair: .*invalid int value: 'long'"),
    ({}, ["--dataset_name", "rte"], "leave --dataset_name out"),
    ({}, ["--auto_batch", "True"], "--auto_batch cannot plan batches of several data sets"),
])
def test_wrong_values_for_several_data_sets(backbone, change, flags, sentence, tmp_path, capsys):  # noqa: F811
    yaml = plan(tmp_path, ("pair",))
    content = json.loads(yaml.read_text())
    content["data_sets"]["pair"] |= change
    yaml.write_text(json.dumps(content))
    assert train(backbone, tmp_path / "a", "--multi_task", yaml, *flags) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error) and error.count("\n") == 1
