"""GLM on the command line, from a folder with config.json, pytorch_model.bin and GPT-2's vocabulary files."""

from __future__ import annotations

import json

import pytest
import torch

from ptv2_engine.cli import main
from ptv2_engine.encoder.glm_sizes import glm_config
from tests.encoder.plain_glm import PlainGLM
from tests.tasks import glm_vocabulary
from tests.tasks.test_cloze_features import ROWS


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = glm_vocabulary.write(tmp_path_factory.mktemp("glm"), 600)
    config = glm_config(2, 32, 4, 640, 127)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(PlainGLM(config).state_dict(), folder / "pytorch_model.bin")
    return folder


def data(folder, name, count=12):
    """Rows of a task, some with other labels, as train.jsonl and validation.jsonl."""
    folder.mkdir(exist_ok=True)
    other = {"rte": {"label": "not_entailment"}, "copa": {"label": 1}, "record": {"answers": ["Pete"]}, "multirc": {"label": 0},
             "boolq": {"label": 0}, "wic": {"label": True}, "cb": {"label": 0}, "wsc": {"label": False}}[name]
    rows = [ROWS[name] | (other if i % 3 == 0 else {}) for i in range(count)]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(backbone, output, *words):
    return main(["train", "--model_name_or_path", str(backbone), "--output_dir", str(output), "--num_train_epochs", "1",
                 "--per_device_train_batch_size", "4", "--prompt_length", "4", "--head", "cloze", *words])


@pytest.mark.parametrize("name", ["rte", "cb", "boolq", "wic", "multirc", "copa", "wsc", "record"])
def test_every_superglue_task_trains_evaluates_and_predicts(backbone, name, tmp_path, capsys):
    folder = data(tmp_path / "data", name)
    assert train(backbone, tmp_path / "out", "--task_name", "superglue", "--dataset_name", name, "--data_dir", str(folder)) == 0
    printed = capsys.readouterr().out
    results = json.loads(printed[printed.index("{"):])
    accuracy = results["last_evaluation"]["eval_accuracy"]
    assert 0 <= accuracy <= 1
    assert main(["evaluate", str(tmp_path / "out"), str(folder / "validation.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(accuracy)
    assert main(["predict", str(tmp_path / "out"), "--file", str(folder / "validation.jsonl"), "--format", "jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    given = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert all(row | own == row and 0 < row["probability"] <= 1 for row, own in zip(rows, given, strict=True))
    answers = {"copa": {"the sun was rising", "the grass was cut"}, "wsc": {"Mark", "Pete", "lies"},
               "rte": {"entailment", "not_entailment"}}
    if name in answers:
        assert {row.get("prediction_text", row["prediction"]) for row in rows} <= answers[name]


def test_a_pattern_and_words_of_ones_own(backbone, tmp_path, capsys):
    file = data(tmp_path, "rte") / "train.jsonl"
    words = ("--train_file", str(file), "--pattern", "{premise} Question: {hypothesis}? Answer: {mask}.",
             "--verbalizers", "entailment= Yes", "not_entailment= No")
    assert train(backbone, tmp_path / "out", *words) == 0
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "out"), "--file", str(file), "--format", "jsonl"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert first["prediction"] in ("entailment", "not_entailment") and first["premise"].startswith("It rained")


def test_glm_takes_a_trained_classifier_too(backbone, tmp_path, capsys):
    folder = data(tmp_path / "data", "rte")
    assert main(["train", "--model_name_or_path", str(backbone), "--output_dir", str(tmp_path / "out"), "--num_train_epochs", "1",
                 "--task_name", "superglue", "--dataset_name", "rte", "--data_dir", str(folder), "--prompt_length", "4"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "out"), str(folder / "validation.jsonl")]) == 0


@pytest.mark.parametrize(("words", "sentence"), [
    (("--head", "fill", "--train_file", "x"), "--head 'fill' does not exist"),
    (("--train_file", "x.jsonl"), "needs --pattern"),
    (("--train_file", "x.jsonl", "--pattern", "{a}", "--verbalizers", "a=b", "c=d"), "exactly one {mask}"),
    (("--task_name", "glue", "--dataset_name", "sst2"), "no published pattern for 'sst2'"),
])
def test_what_cannot_be_is_one_sentence(backbone, words, sentence, tmp_path, capsys):
    assert train(backbone, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_info_reads_a_glm_folder(backbone, capsys):
    assert main(["info", str(backbone), "--prompt_length", "10"]) == 0
    out = capsys.readouterr().out
    assert "family glm" in out and "1,280 trained parameters" in out
