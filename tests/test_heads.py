"""Losses against transformers' own, and labels that do not fit."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers

from ptv2_engine import ops
from ptv2_engine.errors import ConfigError, LabelError
from ptv2_engine.heads import SequenceClassificationHead, TokenClassificationHead, classification_loss
from ptv2_engine.testing import tiny_config, tiny_model


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
    (torch.tensor([0.5, 1.0]), "regression", LabelError, r"regression on 3 outputs needs 3 values .* set num_labels"),
    (torch.tensor([0.5, 1.0]), "single_label_classification", LabelError, "3 classes need integers"),
    (torch.tensor([0.5, 1.0]), "multi_label_classification", LabelError, r"pass a \[batch, 3\] float tensor"),
    (torch.tensor([0, 1]), "ranking", ConfigError, "problem_type 'ranking' does not exist"),
])
def test_labels_that_do_not_fit(labels, kind, error, words):
    with pytest.raises(error, match=words):
        classification_loss(torch.randn(2, 3), labels, kind)


@pytest.mark.parametrize("family, kind, activation", [("roberta", "Roberta", "tanh"), ("electra", "Electra", "gelu")])
@pytest.mark.parametrize("training", [False, True])
def test_the_trained_head_equals_transformers_dropout_included(family, kind, activation, training):
    module = getattr(transformers.models, family)
    theirs = getattr(getattr(module, f"modeling_{family}"), f"{kind}ClassificationHead")(tiny_config(family, num_labels=3))
    ours = SequenceClassificationHead(64, 3, dropout_p=0.1, std=0.2, activation=activation)
    ours.dense.load_state_dict(theirs.dense.state_dict())
    ours.classifier.load_state_dict(theirs.out_proj.state_dict())
    seed, sites = torch.tensor([5]), itertools.count(40)
    theirs.dropout.forward = lambda x: ops.dropout(x, 0.1 * training, seed, next(sites))         # their places, our masks
    x_BH = torch.randn(6, 64)
    torch.testing.assert_close(ours.train(training)(x_BH, seed, 40), theirs(x_BH[:, None]), rtol=1e-6, atol=1e-6)
    assert next(sites) == 42


@pytest.mark.parametrize("kind, labels", [("regression", torch.randn(6)), ("regression", torch.randn(6, 3)),
                                          ("multi_label_classification", torch.rand(6, 3).round())])
@pytest.mark.parametrize("num_items", [None, 9])
def test_rows_that_do_not_count(kind, labels, num_items):
    logits, counted = torch.randn(6, labels.shape[1] if labels.dim() > 1 else 1), torch.tensor([1, 1, 0, 1, 0, 0]).bool()
    wild = labels.clone()
    wild[~counted] = torch.inf
    torch.testing.assert_close(classification_loss(logits, wild, kind, num_items, counted),
                               classification_loss(logits[counted], labels[counted], kind, num_items))


@pytest.mark.parametrize("make", [SequenceClassificationHead, TokenClassificationHead])
def test_heads_are_initialised_as_published_and_widen_bf16(make):
    head = make(256, 40, dropout_p=0.5, std=0.02).eval()
    assert set(dict(head.named_parameters())) == {"classifier.weight", "classifier.bias"}
    assert abs(head.classifier.weight.detach().std() - 0.02) < 1e-3 and not head.classifier.bias.any()
    x_RH = torch.randn(3, 256).bfloat16()
    logits = head(x_RH)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, head.classifier(x_RH.float()))
    assert (head.train()(torch.ones(3, 256)) - head.eval()(torch.ones(3, 256))).abs().max() > 1e-3
