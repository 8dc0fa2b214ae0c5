"""The trained output layers and their losses, as transformers and the published code have them.

Sequence classification on BERT and RoBERTa: frozen pretrained pooler -> dropout -> Linear(H, C). Where a checkpoint has no
pooler (ELECTRA), or on request, a dense layer is trained in its place: dropout -> Linear(H, H) -> tanh or gelu -> dropout ->
Linear(H, C). That is transformers' RobertaClassificationHead, and with DeBERTa's pooler_dropout its ContextPooler. Token
classification: dropout -> Linear(H, C). Question answering: Linear(H, 2), without dropout. Multiple choice: as sequence
classification with one output, for every choice.
Head parameters are fp32 and hidden states are widened to them: C columns cost nothing, and the logits are exact.
Dropout masks are those of the seed at the Philox call sites `site` and site + 1 (None: a seed is drawn).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptv2_engine.encoder import EncoderConfig
from ptv2_engine.errors import ConfigError, LabelError
from ptv2_engine.ops import dropout, readable
from ptv2_engine.packing import IGNORE

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "gelu": F.gelu}


class SequenceClassificationHead(nn.Module):
    """[B, H] -> fp32 logits [B, C]; takes the frozen pooler's output, or the first token where `activation` trains a dense."""

    def __init__(self, hidden_size: int, num_labels: int, dropout_p: float, std: float, activation: str | None = None,
                 pooler_dropout: float | None = None) -> None:
        super().__init__()
        self.dropout_p = dropout_p
        self.pooler_dropout = pooler_dropout      # in front of the trained dense; None: the head's
        self.activation = activation
        self.dense = _linear(hidden_size, hidden_size, std) if activation else None
        self.classifier = _linear(hidden_size, num_labels, std)

    def forward(self, x_BH: Tensor, seed: Tensor | None = None, site: int = 0) -> Tensor:
        x_BH = x_BH.to(self.classifier.weight.dtype)
        first = self.dropout_p if self.pooler_dropout is None else self.pooler_dropout
        x_BH = dropout(x_BH, first * self.training, seed, site)
        if self.dense is not None and self.activation is not None:
            x_BH = dropout(_ACTIVATIONS[self.activation](self.dense(x_BH)), self.dropout_p * self.training, seed, site + 1)
        return self.classifier(x_BH)


class TokenClassificationHead(nn.Module):
    """[T, H] -> fp32 logits [T, C]."""

    def __init__(self, hidden_size: int, num_labels: int, dropout_p: float, std: float) -> None:
        super().__init__()
        self.dropout_p = dropout_p
        self.classifier = _linear(hidden_size, num_labels, std)

    def forward(self, x_TH: Tensor, seed: Tensor | None = None, site: int = 0) -> Tensor:
        return self.classifier(dropout(x_TH.to(self.classifier.weight.dtype), self.dropout_p * self.training, seed, site))


class SpanHead(nn.Module):
    """[T, H] -> fp32 logits [T, 2]: start and end of the answer. No dropout, as published."""

    def __init__(self, hidden_size: int, std: float) -> None:
        super().__init__()
        self.qa_outputs = _linear(hidden_size, 2, std)

    def forward(self, x_TH: Tensor, seed: Tensor | None = None, site: int = 0) -> Tensor:
        return self.qa_outputs(x_TH.to(self.qa_outputs.weight.dtype))


def make_head(task: str, config: EncoderConfig, num_labels: int, dropout_p: float,
              trained_pooler: bool) -> SequenceClassificationHead | TokenClassificationHead | SpanHead:
    """A fresh head for a task. trained_pooler: it trains a dense layer in the pretrained pooler's place."""
    size, std = config.hidden_size, config.initializer_range
    if task == "token-classification":
        return TokenClassificationHead(size, num_labels, dropout_p, std)
    if task == "question-answering":
        return SpanHead(size, std)
    activation = config.pooler_activation if trained_pooler else None
    return SequenceClassificationHead(size, num_labels, dropout_p, std, activation, config.pooler_dropout)


def _linear(in_features: int, out_features: int, std: float) -> nn.Linear:
    linear = nn.Linear(in_features, out_features)
    nn.init.normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
    return linear


def problem_type_of(labels: Tensor, num_labels: int) -> str:
    """transformers' rule: one output is regression, integer labels are classes, float labels are independent yes/no."""
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def check_labels(labels: Tensor, num_labels: int) -> None:
    """Raises LabelError for class labels outside [0, C); -100 is ignored. Reads them: for CPU tensors."""
    real = labels[labels != IGNORE]
    if real.numel() and not 0 <= int(real.min()) <= int(real.max()) < num_labels:
        wrong = int(real.max()) if int(real.max()) >= num_labels else int(real.min())
        raise LabelError(f"label {wrong} is outside the head's {num_labels} classes (0 to {num_labels - 1}); "
                         "set num_labels, or map the labels.")


def classification_loss(logits_RC: Tensor, labels: Tensor, problem_type: str | None = None,
                        num_items: int | Tensor | None = None, counted_R: Tensor | None = None) -> Tensor:
    """The loss transformers computes: MSE, cross-entropy over labels that are not -100, or binary cross-entropy.

    Arguments:
        logits_RC: [R, C]. labels: [R] integers (classes), [R] or [R, C] floats (regression), [R, C] floats (multi-label).
        num_items: divide the sum by this instead of taking the mean (transformers' num_items_in_batch: the labels of the
            whole accumulated batch, so that gradient accumulation equals one large batch).
        counted_R: bool [R], rows that take part; None: all. Classes say the same by -100.
    """
    C = logits_RC.shape[1]
    kind = problem_type or problem_type_of(labels, C)
    if labels.shape[:1] != logits_RC.shape[:1]:
        raise LabelError(f"there are {labels.shape[0] if labels.dim() else 1} labels for {logits_RC.shape[0]} rows of logits; "
                         "pass one label for each sequence, or each token.")
    reduction = "mean" if num_items is None else "sum"
    if kind == "single_label_classification":
        if labels.is_floating_point():
            raise LabelError(f"labels are {labels.dtype}, but {C} classes need integers; use problem_type='regression' with "
                             "num_labels=1, or integer labels.")
        if readable(labels):
            check_labels(labels, C)
        loss = F.cross_entropy(logits_RC, labels.view(-1).long(), ignore_index=IGNORE, reduction=reduction)
        loss = torch.where((labels == IGNORE).all(), 0.0, loss)       # nothing to score: 0, not the mean of nothing
    elif kind == "regression":
        if labels.numel() != logits_RC.numel():
            raise LabelError(f"labels are {tuple(labels.shape)}, but regression on {C} outputs needs {C} values for each of "
                             f"{logits_RC.shape[0]} rows; pass a [batch, {C}] float tensor, or set num_labels.")
        loss = _of_counted(F.mse_loss, logits_RC, labels.view(logits_RC.shape), reduction, counted_R)
    elif kind == "multi_label_classification":
        if labels.shape != logits_RC.shape:
            raise LabelError(f"labels are {tuple(labels.shape)}, but multi-label classification needs one 0 or 1 for each of "
                             f"{C} labels; pass a [batch, {C}] float tensor.")
        loss = _of_counted(F.binary_cross_entropy_with_logits, logits_RC, labels, reduction, counted_R)
    else:
        raise ConfigError(f"problem_type {kind!r} does not exist; choose one of {', '.join(PROBLEM_TYPES)}.")
    return loss if num_items is None else loss / num_items


def _of_counted(function: Callable[..., Tensor], logits_RC: Tensor, labels_RC: Tensor, reduction: str,
                counted_R: Tensor | None) -> Tensor:
    """A loss by elements, reduced over the rows that take part."""
    labels_RC = labels_RC.to(logits_RC.dtype)
    if counted_R is None:
        return function(logits_RC, labels_RC, reduction=reduction)
    total = torch.where(counted_R[:, None], function(logits_RC, labels_RC, reduction="none"), 0.0).sum()
    return total if reduction == "sum" else total / (counted_R.sum() * logits_RC.shape[1])
