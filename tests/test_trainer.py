"""The drop-in trainer: resume, accumulation, best model, bf16, and the errors that come before any work."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
import transformers

from ptv2_engine import PromptConfig, PromptedModel, Trainer
from ptv2_engine.errors import ConfigError, DataError, NonFiniteLoss, OutputError
from ptv2_engine.tasks.metrics import metrics_for
from ptv2_engine.testing import tiny_model


def examples(count=48, seed=0, tokens=False):
    """A task a prompt can learn on a random encoder: the label is which half of the vocabulary the words come from."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = int(torch.randint(3, 20, (1,), generator=generator))
        ids = (torch.randint(8, 64, (length,), generator=generator) + 56 * (i % 2)).tolist()
        rows.append({"input_ids": ids, "labels": [t % 3 for t in ids] if tokens else i % 2})
    return rows


def arguments(folder, **changes):
    settings = {
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return transformers.TrainingArguments(str(folder), **settings | changes)


def model_for(seed=1, task="sequence-classification", num_labels=2, **options):
    torch.manual_seed(seed)
    return PromptedModel.from_pretrained(tiny_model("bert"), task=task, num_labels=num_labels, prompt=PromptConfig(4), **options)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_resume_equals_never_stopping(tmp_path):
    """Dropout on: optimizer, schedule, random state and the sampler's place all come back, to the last bit."""
    whole = Trainer(model_for(), arguments(tmp_path / "a", save_strategy="steps", save_steps=3), train_dataset=examples())
    whole.train()
    resumed = Trainer(model_for(seed=99), arguments(tmp_path / "b"), train_dataset=examples())
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(whole) == losses(resumed) and len(losses(whole)) == 6
    for (name, a), b in zip(whole.model.trained_parameters().items(), resumed.model.trained_parameters().values(), strict=True):
        assert torch.equal(a, b), name


def test_resume_across_an_epoch(tmp_path):
    changes = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch"}
    whole = Trainer(model_for(), arguments(tmp_path / "a", **changes), train_dataset=examples())
    whole.train()
    resumed = Trainer(model_for(seed=99), arguments(tmp_path / "b", **changes), train_dataset=examples())
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert losses(whole) == losses(resumed)


def test_checkpoints_hold_the_adapter_not_the_model(tmp_path):
    trainer = Trainer(
        model_for(), arguments(tmp_path, save_strategy="steps", save_steps=3, max_steps=3), train_dataset=examples()
    )
    trainer.train()
    files = set(os.listdir(tmp_path / "checkpoint-3"))
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= files
    assert not files & {"model.safetensors", "pytorch_model.bin"}
    optimizer = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == 3      # bank, classifier weight and bias
    assert PromptedModel.from_adapter(tmp_path / "checkpoint-3", backbone=tiny_model("bert")).num_labels == 2


def test_accumulated_batches_equal_large_ones(tmp_path):
    """Same examples a step, in one batch of 8 or two of 4, with labels that are partly ignored, dropout off."""
    def run(size, accumulate):
        model = model_for(task="token-classification", num_labels=3, head_dropout=0.0)
        model.encoder.hidden_dropout = model.encoder.attention_dropout = model.prompt_config.prompt_dropout = 0.0
        rows = examples(16, tokens=True)
        for i, row in enumerate(rows):
            row["labels"] = [-100 if (i + j) % 3 else t for j, t in enumerate(row["labels"])]
        trainer = Trainer(model, arguments(tmp_path / str(size), per_device_train_batch_size=size, max_steps=2,
                                           gradient_accumulation_steps=accumulate), train_dataset=rows)
        trainer._get_dataloader = lambda *_, **__: torch.utils.data.DataLoader(rows, size, collate_fn=trainer.data_collator)
        trainer.train()
        return model.prompt.bank.detach(), losses(trainer)

    one, two = run(8, 1), run(4, 2)
    torch.testing.assert_close(one[0], two[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(one[1], two[1], rtol=1e-4)


def test_learns_and_keeps_the_best_model(tmp_path):
    """A random frozen encoder can at least be made to remember its training set."""
    model, rows = model_for(head_dropout=0.0), examples(32)
    model.set_hidden_dropout(0.0)
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            max_steps=-1,
            num_train_epochs=40,
            learning_rate=2e-2,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            save_total_limit=1,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=metrics_for("classes", ["no", "yes"]),
        callbacks=[transformers.EarlyStoppingCallback(early_stopping_patience=20)],
    )
    trainer.train()
    scores = [e["eval_accuracy"] for e in trainer.state.log_history if "eval_accuracy" in e]
    assert max(scores) >= 0.9, scores
    assert trainer.evaluate()["eval_accuracy"] == max(scores)


def test_logs_throughput_and_memory(tmp_path):
    trainer = Trainer(model_for(), arguments(tmp_path), train_dataset=examples())
    trainer.train()
    assert all(e["tokens_per_second"] > 0 and e["peak_memory_mib"] > 50 for e in trainer.state.log_history if "loss" in e)
    per_epoch = sum(len(e["input_ids"]) for e in examples())
    assert trainer.tokens_seen == per_epoch      # 48 examples in 6 steps of 8


def test_optimizer_has_prompt_and_head_with_their_own_rates(tmp_path):
    trainer = Trainer(model_for(), arguments(tmp_path), train_dataset=examples(), head_learning_rate=1e-4)
    optimizer = trainer.create_optimizer()
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    groups = {g["name"]: ({names[id(p)] for p in g["params"]}, g["lr"]) for g in optimizer.param_groups}
    assert groups == {"prompt": ({"prompt.bank"}, 1e-2), "head": ({"head.classifier.weight", "head.classifier.bias"}, 1e-4)}
    assert optimizer.defaults["fused"]


def test_epoch_decay_is_the_published_schedule(tmp_path):
    trainer = Trainer(
        model_for(), arguments(tmp_path, max_steps=-1, num_train_epochs=3), train_dataset=examples(), epoch_decay=0.95
    )
    trainer.train()
    rates = [e["learning_rate"] for e in trainer.state.log_history if "loss" in e]
    np.testing.assert_allclose(rates, [1e-2 * 0.95 ** (i // 6) for i in range(18)], rtol=1e-6)


def test_epoch_decay_counts_real_epochs_and_warms_up(tmp_path):
    """With max_steps an epoch is still the data set's, and a warm-up is not forgotten."""
    args = arguments(tmp_path, max_steps=14, gradient_accumulation_steps=2, warmup_steps=2)
    trainer = Trainer(model_for(), args, train_dataset=examples(), epoch_decay=0.5)
    trainer.train()
    rates = [e["learning_rate"] for e in trainer.state.log_history if "loss" in e]
    np.testing.assert_allclose(rates, [1e-2 * min(1, i / 2) * 0.5 ** (i // 3) for i in range(14)], rtol=1e-6)


def test_bf16_casts_the_backbone_and_keeps_prompt_and_head_in_fp32(tmp_path):
    trainer = Trainer(model_for(), arguments(tmp_path, bf16=True), train_dataset=examples(), eval_dataset=examples())
    trainer.train()
    assert trainer.model.dtype == torch.bfloat16 and trainer.accelerator.mixed_precision == "no"
    assert {p.dtype for p in trainer.model.trained_parameters().values()} == {torch.float32}
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_wraps_a_transformers_model(tmp_path):
    base = tiny_model("roberta", "SequenceClassification", num_labels=3)
    trainer = Trainer(base, arguments(tmp_path, max_steps=1), prompt=PromptConfig(3), train_dataset=examples())
    assert isinstance(trainer.model, PromptedModel) and trainer.model.num_labels == 3
    trainer.train()
    with pytest.raises(ConfigError, match="this model is a PromptedModel already"):
        Trainer(trainer.model, arguments(tmp_path), prompt=PromptConfig(3))


def test_the_stock_trainer_takes_a_prompted_model(tmp_path):
    """Padded batches, transformers' own collator and Trainer: same class of results, nothing of ours needed."""
    rows = [{"input_ids": r["input_ids"], "attention_mask": [1] * len(r["input_ids"]), "labels": r["labels"]} for r in examples()]

    def collate(features):
        longest = max(len(f["input_ids"]) for f in features)
        pad = lambda name: torch.tensor([f[name] + [0] * (longest - len(f[name])) for f in features])
        return {
            "input_ids": pad("input_ids"),
            "attention_mask": pad("attention_mask"),
            "labels": torch.tensor([f["labels"] for f in features]),
        }

    trainer = transformers.Trainer(model_for(), arguments(tmp_path), train_dataset=rows, eval_dataset=rows, data_collator=collate,
                                   compute_metrics=metrics_for("classes", ["no", "yes"]))
    trainer.train()
    assert len(losses(trainer)) == 6 and 0 <= trainer.evaluate()["eval_accuracy"] <= 1


def test_token_classification_scores(tmp_path):
    trainer = Trainer(
        model_for(task="token-classification", num_labels=3),
        arguments(tmp_path),
        train_dataset=examples(tokens=True),
        eval_dataset=examples(24, tokens=True),
        compute_metrics=metrics_for("tags", ["O", "B-X", "I-X"]),
    )
    trainer.train()
    assert {"eval_f1", "eval_precision", "eval_recall", "eval_accuracy"} <= set(trainer.evaluate())


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    model = model_for()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=examples())
    with torch.no_grad():
        model.head.classifier.weight.fill_(float("nan"))
    before = model.prompt.bank.detach().clone()
    with pytest.raises(NonFiniteLoss, match="the loss is nan at step 1; nothing was updated with it. Lower the learning rate"):
        trainer.train()
    assert torch.equal(model.prompt.bank, before)


def test_errors_come_before_work(tmp_path):
    with pytest.raises(DataError, match="the training data set has 0 examples"):
        Trainer(model_for(), arguments(tmp_path), train_dataset=[])
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written .* choose another --output_dir"):
        Trainer(model_for(), arguments(tmp_path / "file" / "out"), train_dataset=examples())
