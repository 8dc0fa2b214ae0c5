"""The command line on small local files: train, evaluate, predict, info, the published spelling, and the errors."""

from __future__ import annotations

import csv
import io
import json
import random

import pytest
import transformers

from ptv2_engine.cli import main
from ptv2_engine.cli_args import parse_train
from ptv2_engine.errors import ConfigError
from ptv2_engine.testing import tiny_model

GOOD = ["great", "fine", "lovely", "superb", "warm"]
BAD = ["awful", "dull", "poor", "cold", "weak"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A tiny random BERT with a WordPiece vocabulary of its own."""
    folder = tmp_path_factory.mktemp("backbone")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "is", "and", "##s", *GOOD, *BAD]
    (folder / "vocab.txt").write_text("\n".join(words + [f"w{i}" for i in range(120 - len(words))]))
    tiny_model("bert").save_pretrained(folder)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def rows(count, seed=0):
    rng = random.Random(seed)
    return [{"text": "the film is " + " and ".join(rng.choices(GOOD if i % 2 else BAD, k=rng.randint(1, 4))),
             "label": "good" if i % 2 else "bad"} for i in range(count)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, part in (("train", rows(128)), ("dev", rows(32, 1)), ("test", rows(32, 2))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    return folder


@pytest.fixture(scope="module")
def adapter(backbone, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("adapter")
    code = main(
        [
            "train",
            "--model_name_or_path",
            str(backbone),
            "--train_file",
            str(data / "train.jsonl"),
            "--validation_file",
            str(data / "dev.jsonl"),
            "--test_file",
            str(data / "test.jsonl"),
            "--output_dir",
            str(output),
            "--prompt_length",
            "4",
            "--num_train_epochs",
            "20",
            "--per_device_train_batch_size",
            "16",
            "--learning_rate",
            "3e-2",
            "--use_cpu",
            "--hidden_dropout_prob",
            "0.0",
        ]
    )
    assert code == 0
    return output


def test_train_writes_adapter_tokenizer_settings_and_results(adapter):
    results = json.loads((adapter / "results.json").read_text())
    assert results["test"]["test_accuracy"] > 0.6  # the encoder is random; test_demo.py learns on a real one
    assert {"adapter_model.safetensors", "adapter_config.json", "ptv2_data.json", "tokenizer.json"} <= {
        p.name for p in adapter.iterdir()
    }
    assert json.loads((adapter / "ptv2_data.json").read_text())["task"]["text_columns"] == ["text"]
    assert results["metric"] == "accuracy" and results["trained_parameters"] == 4 * 2 * 3 * 64 + 2 * 64 + 2
    assert results["best_evaluation"]["eval_accuracy"] >= results["last_evaluation"]["eval_accuracy"] > 0


def test_evaluate_equals_what_training_reported(adapter, data, capsys):
    assert main(["evaluate", str(adapter), str(data / "test.jsonl"), "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["examples"] == 32
    assert found["accuracy"] == pytest.approx(json.loads((adapter / "results.json").read_text())["test"]["test_accuracy"])


def test_predict_texts_files_and_standard_input(adapter, data, capsys, monkeypatch, tmp_path):
    assert main(["predict", str(adapter), "the film is great", "the film is awful", "--format", "jsonl", "--device", "cpu"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = [f["prediction"] for f in found]
    assert set(expected) <= {"good", "bad"} and all(0.5 <= f["probability"] <= 1 for f in found)
    monkeypatch.setattr("sys.stdin", io.StringIO("the film is great\n\nthe film is awful\n"))
    assert main(["predict", str(adapter), "--format", "csv", "--device", "cpu"]) == 0
    assert [r["prediction"] for r in csv.DictReader(io.StringIO(capsys.readouterr().out))] == [expected[0], "", expected[1]]
    assert (
        main(
            [
                "predict",
                str(adapter),
                "--file",
                str(data / "test.jsonl"),
                "--output",
                str(tmp_path / "out.txt"),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert (tmp_path / "out.txt").read_text().count("the film") == 32


def test_a_yaml_file_and_the_command_line_on_top(tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-3\nprompt_length: 7\ntext_columns: [a, b]\nbf16: true\nmax_steps: 5\n")
    model, data, prompt, training, _ = parse_train(
        ["--config", str(tmp_path / "c.yaml"), "--prompt_length", "9", "--warmup_steps", "3"]
    )
    assert (prompt.prompt_length, training.learning_rate, data.text_columns) == (9, 1e-3, ["a", "b"])
    assert training.bf16 and training.max_steps == 5 and training.warmup_steps == 3


def test_a_published_run_script_works_unchanged():
    """run_script/run_rte_roberta.sh of the published code, word for word behind `python3 run.py`."""
    words = (
        "--model_name_or_path roberta-large --task_name superglue --dataset_name rte --do_train --do_eval --max_seq_length 128 "
        "--per_device_train_batch_size 32 --learning_rate 5e-3 --num_train_epochs 100 --pre_seq_len 128 --output_dir x/ "
        "--overwrite_output_dir --hidden_dropout_prob 0.1 --seed 11 --save_strategy no --evaluation_strategy epoch --prefix"
    )
    model, data, prompt, training, notes = parse_train(words.split())
    assert (model.model_name_or_path, model.hidden_dropout_prob) == ("roberta-large", 0.1)
    assert (data.task_name, data.dataset_name) == ("superglue", "rte")
    assert (prompt.method, prompt.prompt_length, prompt.reparameterization) == ("p-tuning-v2", 128, None)
    assert prompt.prompt_config().method == "deep"
    assert (training.learning_rate, training.num_train_epochs, training.seed) == (5e-3, 100, 11)
    assert any("overwrite_output_dir" in n for n in notes)
    assert (
        parse_train(words.replace("--prefix", "--prefix_projection --prefix_hidden_size 300").split())[2].reparameterization
        == "mlp"
    )
    assert parse_train(words.replace("--prefix", "--prompt").split())[2].prompt_config().method == "shallow"


def test_unknown_flags_name_the_nearest():
    with pytest.raises(ConfigError, match="--promt_length is not a flag of ptv2 train; did you mean --prompt_length"):
        parse_train(["--promt_length", "3"])


def test_tagging_and_regression_end_to_end(backbone, tmp_path, capsys):
    tagged = [{"words": r["text"].split(), "tags": ["B-X" if w in GOOD else "O" for w in r["text"].split()]} for r in rows(48)]
    valued = [{"text": r["text"], "label": 1.5 if r["label"] == "good" else -0.5} for r in rows(48)]
    for name, part in (("tags", tagged), ("values", valued)):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
        common = ["--output_dir", str(tmp_path / name), "--prompt_length", "4", "--num_train_epochs", "2", "--use_cpu"]
        file = str(tmp_path / f"{name}.json")
        assert (
            main(["train", "--model_name_or_path", str(backbone), "--train_file", file, "--validation_file", file, *common]) == 0
        )
        assert main(["evaluate", str(tmp_path / name), file, "--device", "cpu"]) == 0
        assert main(["predict", str(tmp_path / name), "the film is great", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert '"f1"' in out and '"pearson"' in out


@pytest.mark.parametrize("change, words", [
    ({"--train_file": "none.csv"}, "none.csv does not exist; check the path"),
    ({"--text_columns": "txt"}, "has no column 'txt'; it has 'text', 'label'"),
    ({"--output_dir": "/dev/null/x"}, "output folder /dev/null/x cannot be written"),
    ({"--prompt_length": "79"}, "--prompt_length 79 leave 1 tokens for text"),
    ({"--prompt_layers": "9"}, "asks for the top 9 layers, but the encoder has 3"),
    ({"--model_name_or_path": "/nowhere"}, "'/nowhere'"),
    ({"--learning_rate": "fast"}, "invalid float value: 'fast'"),
])
def test_errors_are_one_sentence_and_exit_code_2(change, words, backbone, data, capsys, tmp_path):
    flags = {
        "--model_name_or_path": str(backbone),
        "--train_file": str(data / "train.jsonl"),
        "--output_dir": str(tmp_path / "o"),
    } | change
    assert main(["train", *(word for pair in flags.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and len(error.strip().splitlines()) == 1


def test_unseen_labels_and_unknown_commands(adapter, capsys, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "the film", "label": "odd"}))
    assert main(["evaluate", str(adapter), str(tmp_path / "x.jsonl"), "--device", "cpu"]) == 2
    assert "row 1: label 'odd' is not one of bad, good" in capsys.readouterr().err
    assert main(["fly"]) == 2 and "'fly' is not a command" in capsys.readouterr().err
    assert main([]) == 0 and main(["--version"]) == 0


def test_info_says_what_runs_and_why(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for op in ("prefix_attention", "add_norm", "linear_gelu", "frozen_linear", "embedding"):
        assert op in out
    assert "native" in out and "torch 2" in out
