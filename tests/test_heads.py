"""Losses against transformers' own, and labels that do not fit."""

from __future__ import annotations

import pytest
import torch

from ptv2_engine.errors import ConfigError, LabelError
from ptv2_engine.heads import classification_loss
from ptv2_engine.testing import tiny_model


@pytest.mark.parametrize("labels, num_labels, problem", [
    (torch.tensor([0, 2, 1, 2]), 3, "single_label_classification"),
    (torch.tensor([0.5, -2.0, 1.0, 3.0]), 1, "regression"),
    (torch.tensor([[0.0, 1.0, 1.0]] * 4), 3, "multi_label_classification"),
])
def test_losses_equal_transformers(labels, num_labels, problem):
    model = tiny_model("bert", "SequenceClassification", num_labels=num_labels, problem_type=problem)
    out = model(input_ids=torch.randint(5, 120, (4, 6)), labels=labels)
    for stated in (problem, None):
        torch.testing.assert_close(classification_loss(out.logits, labels, stated), out.loss)


def test_accumulated_batches_add_up_to_the_large_one():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, -100, 2, 2, 1])
    whole = classification_loss(logits, labels)
    parts = sum(classification_loss(logits[s], labels[s], num_items=5) for s in (slice(0, 2), slice(2, 6)))
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("labels, kind, error, words", [
    (torch.tensor([0, 3]), None, LabelError, r"label 3 is outside the head's 3 classes \(0 to 2\)"),
    (torch.tensor([0, -1]), None, LabelError, "label -1 is outside"),
    (torch.tensor([0, 1, 2]), None, LabelError, "there are 3 labels for 2 rows of logits"),
    (torch.tensor([0.5]), "regression", LabelError, "there are 1 labels for 2 rows of logits"),
    (torch.tensor([0.5, 1.0]), "single_label_classification", LabelError, "3 classes need integers"),
    (torch.tensor([0.5, 1.0]), "multi_label_classification", LabelError, r"pass a \[batch, 3\] float tensor"),
    (torch.tensor([0, 1]), "ranking", ConfigError, "problem_type 'ranking' does not exist"),
])
def test_labels_that_do_not_fit(labels, kind, error, words):
    with pytest.raises(error, match=words):
        classification_loss(torch.randn(2, 3), labels, kind)
