"""Every family with every head: trains, is resumed to the same bits, is saved, and predicts the same from its adapter."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from ptv2_engine import PromptConfig, PromptedModel, Trainer
from ptv2_engine.adapter import TENSORS, read_tensors
from ptv2_engine.batches import PackedCollator
from ptv2_engine.testing import tiny_model
from tests.encoder.plain_glm import PlainGLM
from tests.test_cloze import example

FAMILIES = ("bert", "roberta", "electra", "deberta", "deberta-v2", "modernbert", "glm")
CASES = [(f, t) for f in FAMILIES for t in ("sequence-classification", "token-classification", "question-answering",
                                            "multiple-choice")]
CASES += [("glm", "cloze"), ("glm", "candidates")]
METHODS = ("deep", "shallow")


def backbone(family):
    return PlainGLM() if family == "glm" else tiny_model(family)


def features(task, count=16):
    generator = torch.Generator().manual_seed(3)

    def ids(n):
        return torch.randint(5, 120, (n,), generator=generator).tolist()

    rows = []
    for i in range(count):
        words = ids(4 + i % 7)
        if task == "cloze":
            rows.append(example(words, 2, label=i % 2))
        elif task == "candidates":
            rows.append(example(words, 2, [ids(1 + (i + c) % 3) for c in range(2 + i % 2)], label=i % 2))
        elif task == "question-answering":
            rows.append({"input_ids": words, "start_positions": i % 3, "end_positions": 2})
        elif task == "multiple-choice":
            rows.append({"input_ids": [words, *(ids(3 + c) for c in range(1 + i % 2))], "label": i % 2})
        else:
            label = i % 3 if task.startswith("sequence") else [n % 3 for n in range(len(words))]
            rows.append({"input_ids": words, "label": label})
    return rows


def build(family, task, method):
    torch.manual_seed(0)
    options = {"verbalizer_ids": [11, 12]} if task == "cloze" else {"num_labels": 3} if task.endswith("classification") else {}
    prompt = PromptConfig(prompt_length=4, method=method)
    task = "cloze" if task == "candidates" else task
    return PromptedModel.from_pretrained(backbone(family), task=task, prompt=prompt, **options)


def trainer_of(model, folder, task):
    args = TrainingArguments(str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, seed=1,
                             report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1)
    return Trainer(model, args, train_dataset=features(task), eval_dataset=features(task, 5))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "task"), CASES)
def test_train_resume_save_predict(family, task, method, tmp_path):
    model = build(family, task, method)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = trainer_of(model, tmp_path / "a", task)
    trainer.train()
    for name, p in model.named_parameters():
        assert torch.equal(before[name], p) != p.requires_grad, name      # what trains has moved, what is frozen has not
    trainer.save_model(str(tmp_path / "done"))

    resumed = build(family, task, method)
    trainer_of(resumed, tmp_path / "b", task).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, p in model.trained_parameters().items():
        assert torch.equal(p, resumed.trained_parameters()[name]), name

    again = PromptedModel.from_adapter(tmp_path / "done", backbone=backbone(family))
    batch = PackedCollator()(features(task, 5))
    for mine, theirs in zip(again(**batch).to_tuple(), model.eval()(**batch).to_tuple(), strict=True):
        assert torch.equal(mine, theirs)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(again(**batch).loss.item(), rel=1e-3)
    saved, _ = read_tensors(tmp_path / "done" / TENSORS)
    assert sum(t.numel() for t in saved.values()) < 40_000


def test_an_adapter_of_another_family_is_refused(tmp_path):
    from ptv2_engine.errors import AdapterMismatch

    build("deberta", "sequence-classification", "deep").save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterMismatch, match="other weights"):
        PromptedModel.from_adapter(tmp_path / "a", backbone=backbone("deberta-v2"))
