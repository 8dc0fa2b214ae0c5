"""ptv2 train: going on from a checkpoint, which epoch is saved, and sentences for what cannot be done."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from transformers import TrainerState

from ptv2_engine import cli_args
from ptv2_engine.cli import main
from ptv2_engine.cli_train import saved_line, settle_evaluation
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
    (("--num_train_epochs", "-1"), "trains nothing"),
    (("--load_best_model_at_end", "--save_strategy", "no"), "--save_strategy no is not --eval_strategy epoch; leave"),
    (("--load_best_model_at_end",), "there is no labelled validation data; give --validation_file"),
    (("--save_strategy", "best"), "--save_strategy best keeps the best by validation, but there is no labelled validation data"),
    (("--eval_steps", "2", "--save_steps", "3", "--eval_strategy", "steps", "--save_strategy", "steps",
      "--load_best_model_at_end"), "multiple of 2; see ptv2 train --help."),
    (("--hidden_dropout_prob", "3"), "--hidden_dropout_prob 3 is outside [0, 1)"),
    (("--epoch_decay", "-1"), "--epoch_decay -1 is outside 0 to 1"),
    (("--fp16",), "--fp16 asks for autocast"),
    (("--label_column", "y"), "has no column 'y' to learn from; it has 'text', 'label': name the one with the labels by"),
    (("--prompt_length", "0"), "--prompt_length 0 is below 1; use --method none to train the head only"),
    (("--init", "tokens", "--reparameterization", "mlp"), "use --init normal, or --reparameterization None"),
    (("--method", "lora", "--lora_rank", "0"), "--lora_rank 0 is below 1"),
    (("--model_name_or_path", "/nope"), "the folder '/nope' does not exist"),
    (("--prompt_lenght", "4"), "did you mean --prompt_length?")])
def test_one_sentence_before_any_work(backbone, data, words, sentence, tmp_path, capsys):  # noqa: F811
    assert train(backbone, data, tmp_path / "out", *words) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not list(tmp_path.glob("out/*.json"))


def test_what_the_best_is_by(backbone, data, tmp_path, capsys):  # noqa: F811
    words = ["--validation_file", str(data / "dev.jsonl"), "--load_best_model_at_end", "--metric_for_best_model"]
    assert train(backbone, data, tmp_path / "out", *words, "acc") == 2
    assert "--metric_for_best_model acc is not among what evaluations measure (accuracy, loss)" in capsys.readouterr().err
    for name, ours in (("loss", ("eval_loss", False)), ("mse", ("mse", False)), ("eval_f1", ("eval_f1", True))):
        args = cli_args.parse_train(words + [name])[3]
        assert (args.metric_for_best_model, args.greater_is_better) == ours
    args = cli_args.parse_train([])[3]
    settle_evaluation(args, True, "eval_f1", ("f1", "loss"))
    assert args.metric_for_best_model is None
    args = cli_args.parse_train(["--save_strategy", "best"])[3]
    settle_evaluation(args, True, "eval_f1", ("f1", "loss"))
    assert (args.metric_for_best_model, args.greater_is_better) == ("eval_f1", True)


def test_a_hub_that_may_not_be_asked_is_said(data, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert train("no/such-model", data, tmp_path / "out") == 2
    assert "'no/such-model' is no folder, and the hub's cache on this machine has" in capsys.readouterr().err


def test_a_head_alone_starts_no_prompt(backbone, data, tmp_path, capsys):  # noqa: F811
    assert train(backbone, data, tmp_path / "head", "--method", "head-only", "--max_steps", "1") == 0
    assert train(backbone, data, tmp_path / "out", "--init", str(tmp_path / "head"), "--max_steps", "1") == 2
    assert "holds no prompt to start from" in capsys.readouterr().err


def test_a_length_above_the_backbones_is_said(backbone, data, tmp_path, capsys):  # noqa: F811
    assert train(backbone, data, tmp_path, "--max_steps", "1", "--max_seq_length", "500") == 0
    assert "--max_seq_length 500 is cut to 76" in capsys.readouterr().out


def test_what_was_saved_is_said():
    history = [{"epoch": e, "step": 10 * e, "eval_f1": f1} for e, f1 in ((1, 0.3), (2, 0.5), (3, 0.4))]
    state = TrainerState(epoch=3.0, global_step=30, log_history=history, best_model_checkpoint="out/checkpoint-20")
    assert saved_line(state, "eval_f1", False) == (
        "saved: epoch 3 (f1 0.4000); best was epoch 2 (f1 0.5000): --load_best_model_at_end keeps that")
    assert saved_line(state, "eval_f1", True) == "saved: epoch 2 (f1 0.5000), none was better"
    state.best_model_checkpoint = "out/checkpoint-10"                          # the best by another metric
    assert saved_line(state, "eval_f1", True) == "saved: epoch 1 (f1 0.3000); best was epoch 2 (f1 0.5000)"
    state.global_step = 35
    assert saved_line(state, "eval_f1", False).startswith("saved: epoch 3, not evaluated; best was epoch 2")
    assert saved_line(TrainerState(epoch=3.0), "eval_f1", False) == "saved: epoch 3, not evaluated"


def test_the_best_is_kept_with_one_flag(backbone, data, tmp_path, capsys):  # noqa: F811
    """The adapter on disk is that of the evaluation the last line names."""
    words = ["--validation_file", str(data / "dev.jsonl"), "--learning_rate", "0.1", "--num_train_epochs", "4"]
    assert train(backbone, data, tmp_path, *words, "--load_best_model_at_end") == 0
    saved = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("saved: "))
    best = json.loads((tmp_path / "results.json").read_text())["best_evaluation"]
    assert saved == f"saved: epoch {best['epoch']:g} (accuracy {best['eval_accuracy']:.4f}), none was better"
    assert main(["evaluate", str(tmp_path), str(data / "dev.jsonl"), "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(best["eval_accuracy"])


def test_a_bare_resume_is_true_and_only_own_sentences_change():
    assert cli_args.parse_train(["--resume_from_checkpoint"])[3].resume_from_checkpoint == "True"
    assert cli_args.parse_train([])[3].save_strategy == "no"
    assert cli_args.parse_train(["--load_best_model_at_end", "--eval_strategy", "steps"])[3].save_strategy == "best"
    for sentence, ours in (("prompt_lengths [2] and --seed 3 stay", None), ("the task 'x' of method y", None),
                           ("stream_weights 'file' reads; use stream_weights='host'.",
                            "--stream_weights 'file' reads; use --stream_weights host.")):
        assert cli_args.as_flags(sentence) == (ours or sentence)


def test_several_data_sets_go_on_from_the_last_checkpoint(backbone, data, tmp_path, capsys):  # noqa: F811
    file = {"train_file": str(data / "train.jsonl"), "validation_file": str(data / "dev.jsonl"), "max_train_samples": 32}
    (tmp_path / "tasks.yaml").write_text(json.dumps({"data_sets": {"a": file, "b": file}}))
    words = ["train", "--model_name_or_path", str(backbone), "--multi_task", str(tmp_path / "tasks.yaml"), "--prompt_length", "4",
             "--output_dir", str(tmp_path / "out"), "--save_strategy", "epoch"]
    assert main([*words, "--num_train_epochs", "1"]) == 0 and "saved: epoch 1 (mean 0." in capsys.readouterr().out
    assert main([*words, "--num_train_epochs", "2", "--resume_from_checkpoint", "True"]) == 0
    shown = capsys.readouterr().out
    assert "saved: epoch 2 (mean 0." in shown and "epoch 1  mean" not in shown and "nothing was left" not in shown
    assert main([*words, "--num_train_epochs", "2", "--resume_from_checkpoint", "True"]) == 0
    assert "nothing was left to train" in capsys.readouterr().out


@pytest.mark.parametrize("logging_steps", ["100", "3"])
def test_lines_of_short_epochs_have_their_mean_loss(backbone, data, tmp_path, capsys, logging_steps):  # noqa: F811
    """Four steps an epoch: logged never but for this, or in the midst of each."""
    words = ["--validation_file", str(data / "dev.jsonl"), "--num_train_epochs", "2", "--logging_steps", logging_steps]
    assert train(backbone, data, tmp_path / "o", *words, "--save_strategy", "epoch") == 0
    shown = [float(loss) for loss in re.findall(r"\(train loss ([0-9.]+)", capsys.readouterr().out)]
    history = json.loads((tmp_path / "o" / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    assert [step for step, _ in losses] == ([4, 8] if logging_steps == "100" else [3, 4, 6, 8])
    means = [loss for _, loss in losses] if len(losses) == 2 else [
        (3 * losses[0][1] + losses[1][1]) / 4, (losses[2][1] + losses[3][1]) / 2]
    assert shown == pytest.approx(means, abs=1e-4)


def test_help_shows_our_defaults_and_other_spellings(capsys):
    cli_args.print_help()
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: runs/ptv2)" in shown and "(default: of the method: 0.005 (p-tuning-v2)" in shown
    assert "--pre_seq_len = --prompt_length" in shown and "--init = --prompt_init" in shown
    assert "(default: no; best with --load_best_model_at_end)" in shown and "(default: None)" not in shown
    assert "nothing, or True: the last one in --output_dir" in shown
    ours = [f for group in cli_args.GROUPS[:3] for f in dataclasses.fields(group)]
    assert all(f.metadata.get("help") for f in ours)


def test_the_nearest_name_or_all_of_them():
    assert did_you_mean("rte-bert", ["rte-bert-large", "cb"]) == "; did you mean rte-bert-large?"
    assert did_you_mean("zzz", ["a", "b"]) == "; there are a, b."
    assert did_you_mean("zzz", ["a"], "--", "--help lists them") == "; --help lists them."
