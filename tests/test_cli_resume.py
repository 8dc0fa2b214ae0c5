"""ptv2 train: going on from a checkpoint, which epoch is saved, and sentences for what cannot be done."""

from __future__ import annotations

import json

import pytest

from ptv2_engine import cli_args
from ptv2_engine.cli import main
from ptv2_engine.cli_train import saved_line
from ptv2_engine.errors import did_you_mean
from tests.test_cli import backbone, data  # noqa: F401  (fixtures)


def train(backbone, data, output, *words):  # noqa: F811
    return main(["train", "--model_name_or_path", str(backbone), "--train_file", str(data / "train.jsonl"), "--output_dir",
                 str(output), "--max_seq_length", "24", "--prompt_length", "4", *words])


@pytest.fixture(scope="module")
def checkpointed(backbone, data, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("checkpointed")
    assert train(backbone, data, folder, "--validation_file", str(data / "dev.jsonl"), "--num_train_epochs", "2",
                 "--save_strategy", "epoch") == 0
    return folder


def test_resume_true_is_the_last_checkpoint_and_old_evaluations_are_not_this_runs(backbone, data, checkpointed, capsys):  # noqa: F811
    assert train(backbone, data, checkpointed, "--num_train_epochs", "3", "--resume_from_checkpoint", "True") == 0
    results = json.loads((checkpointed / "results.json").read_text())
    assert "last_evaluation" not in results and "nothing was left" not in capsys.readouterr().out
    assert train(backbone, data, checkpointed, "--num_train_epochs", "2", "--resume_from_checkpoint", "true") == 0
    assert "nothing was left to train" in capsys.readouterr().out


@pytest.mark.parametrize("words, sentence", [
    (("--resume_from_checkpoint", "true"), "holds no checkpoint"),
    (("--resume_from_checkpoint", "nowhere"), "nowhere is no checkpoint of a run"),
    (("--num_train_epochs", "0"), "trains nothing"),
    (("--load_best_model_at_end", "true"), "requires the save and eval strategy to match"),
    (("--model_name_or_path", "/nope"), "the folder '/nope' does not exist"),
    (("--prompt_lenght", "4"), "did you mean --prompt_length?")])
def test_one_sentence_before_any_work(backbone, data, words, sentence, tmp_path, capsys):  # noqa: F811
    assert train(backbone, data, tmp_path / "out", *words) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not list(tmp_path.glob("out/*.json"))


def test_a_head_alone_starts_no_prompt(backbone, data, tmp_path, capsys):  # noqa: F811
    assert train(backbone, data, tmp_path / "head", "--method", "head-only", "--max_steps", "1") == 0
    assert train(backbone, data, tmp_path / "out", "--init", str(tmp_path / "head"), "--max_steps", "1") == 2
    assert "holds no prompt to start from" in capsys.readouterr().err


def test_a_length_above_the_backbones_is_said(backbone, data, tmp_path, capsys):  # noqa: F811
    assert train(backbone, data, tmp_path, "--max_steps", "1", "--max_seq_length", "500") == 0
    assert "--max_seq_length 500 is cut to 76" in capsys.readouterr().out


def test_what_was_saved_is_said():
    evaluations = {"best_evaluation": {"epoch": 2.0, "eval_f1": 0.5}, "last_evaluation": {"epoch": 3.0, "eval_f1": 0.4}}
    assert saved_line(evaluations, "eval_f1", False) == (
        "saved: epoch 3 (f1 0.4000); the best was epoch 2 (f1 0.5000), which --load_best_model_at_end true --save_strategy epoch "
        "would keep")
    assert saved_line(evaluations, "eval_f1", True) == "saved: the best, epoch 2 (f1 0.5000)"
    evaluations["last_evaluation"] = evaluations["best_evaluation"]
    assert saved_line(evaluations, "eval_f1", False) == "saved: epoch 2 (f1 0.5000), none was better"
    assert saved_line({}, "eval_f1", False) == "saved: the last epoch's adapter"


def test_help_shows_our_defaults_and_other_spellings(capsys):
    cli_args.print_help()
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: runs/ptv2)" in shown and "(default: of the method: 0.005 (p-tuning-v2)" in shown
    assert "--pre_seq_len = --prompt_length" in shown and "--init = --prompt_init" in shown


def test_the_nearest_name_or_all_of_them():
    assert did_you_mean("rte-bert", ["rte-bert-large", "cb"]) == "; did you mean rte-bert-large?"
    assert did_you_mean("zzz", ["a", "b"]) == "; there are a, b."
    assert did_you_mean("zzz", ["a"], "--", "--help lists them") == "; --help lists them."
