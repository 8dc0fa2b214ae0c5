"""Seconds: train three steps, save, load, predict."""

from __future__ import annotations

import torch

from ptv2_engine import PromptConfig, PromptedModel
from ptv2_engine.optim import adamw
from ptv2_engine.testing import padded_batch, tiny_model


def test_train_save_load_predict(tmp_path):
    base = tiny_model("bert")
    model = PromptedModel.from_pretrained(base, num_labels=2, prompt=PromptConfig(4)).train()
    optimizer, batch, labels = adamw(model, 1e-2), padded_batch([8, 3, 6, 1]), torch.tensor([0, 1, 1, 0])
    before = model.eval()(**batch, labels=labels).loss.detach()         # without dropout, which drowns three steps
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(**batch, labels=labels).loss.backward()
        optimizer.step()
    assert model.eval()(**batch, labels=labels).loss < 0.9 * before
    model.save_pretrained(tmp_path)
    assert torch.equal(PromptedModel.from_adapter(tmp_path, backbone=base)(**batch).logits, model.eval()(**batch).logits)
