"""From a head's scores to what transformers' models return: logits in the caller's shape, and the loss.

Question answering's softmax goes over a sequence's real tokens. transformers' goes over the padding too, whose scores depend on
what a padded batch happens to hold; without padding both are the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ptv2_engine.cloze import ABSENT
from ptv2_engine.errors import InputError, LabelError
from ptv2_engine.heads import classification_loss
from ptv2_engine.ops import readable
from ptv2_engine.packing import IGNORE, PackedBatch, cells, unpack


class Targets(NamedTuple):
    """labels [B], [B, C] or [B, S]; for question answering start_positions and end_positions [B]."""

    labels: Tensor | None = None
    start_positions: Tensor | None = None
    end_positions: Tensor | None = None


class Scored(NamedTuple):
    """loss: a scalar or None. logits: one tensor, or for question answering start [B, S] and end [B, S]."""

    loss: Tensor | None
    logits: tuple[Tensor, ...]


def score(task: str, scores: Tensor, batch: PackedBatch, targets: Targets, *, problem_type: str | None = None,
          num_items: int | Tensor | None = None, choice_counts: Tensor | None = None, max_choices: int | None = None,
          mix_loss: bool = False) -> Scored:
    """Logits and loss of a head's scores: [B, C] of sequences, [T, C] of tokens, [T, 2] of spans, [N, 1] of N choices.

    num_items: divide the summed loss by this (transformers' num_items_in_batch). choice_counts [B]: sequences of each example.
    mix_loss: of cloze.ClozeHead.
    Raises InputError, LabelError.
    """
    if task == "question-answering":
        return _spans(scores, batch, targets, num_items)
    labels = targets.labels
    if task == "token-classification":
        labels = _packed_labels(labels, batch)
        loss = None if labels is None else classification_loss(scores, labels, problem_type, num_items)
        return Scored(loss, (unpack(scores, batch),))
    if task == "multiple-choice":
        scores = of_choices(scores, choice_counts, max_choices, batch.spare_tokens)
    # One candidate a row is a choice too, and no regression
    if task in ("cloze", "multiple-choice"):
        problem_type = "single_label_classification"
    counted = batch.lengths() > 0 if batch.spare_tokens and task == "sequence-classification" else None
    loss = None if labels is None else classification_loss(scores, labels, problem_type, num_items, counted)
    if mix_loss and labels is not None and loss is not None:
        known = labels != IGNORE
        right = torch.where(known, scores.gather(1, labels.clamp(min=0)[:, None].long())[:, 0], 0.0)
        loss = loss - right.sum() / (known.sum().clamp(min=1) if num_items is None else num_items)
    return Scored(loss, (scores,))


def as_output(task: str, scored: Scored, return_dict: bool) -> Any:
    """transformers' ModelOutput of the task, or its tuple."""
    if not return_dict:
        return scored.logits if scored.loss is None else (scored.loss, *scored.logits)
    from transformers import modeling_outputs as outputs

    if task == "question-answering":
        return outputs.QuestionAnsweringModelOutput(loss=scored.loss, start_logits=scored.logits[0], end_logits=scored.logits[1])
    cls = {"token-classification": outputs.TokenClassifierOutput,
           "multiple-choice": outputs.MultipleChoiceModelOutput}.get(task, outputs.SequenceClassifierOutput)
    return cls(loss=scored.loss, logits=scored.logits[0])


def _packed_labels(labels: Tensor | None, batch: PackedBatch) -> Tensor | None:
    if labels is None or labels.dim() == 1:
        return labels
    if labels.shape != batch.shape:
        raise InputError(f"labels are {tuple(labels.shape)}, but the batch is {batch.shape}; "
                         "pad them with -100 to one label a token.")
    return cells(labels, batch, IGNORE)


def _spans(scores_T2: Tensor, batch: PackedBatch, targets: Targets, num_items: int | Tensor | None) -> Scored:
    start_BS, end_BS = unpack(scores_T2, batch, fill=ABSENT).unbind(-1)
    logits = (start_BS.contiguous(), end_BS.contiguous())
    positions = (targets.start_positions, targets.end_positions)
    if positions[0] is None or positions[1] is None:
        if positions != (None, None):
            raise InputError("start_positions and end_positions belong together; pass both.")
        return Scored(None, logits)
    losses = [_position_loss(logits[i], where, batch, name, num_items)
              for i, (where, name) in enumerate(zip(positions, ("start", "end"), strict=True)) if where is not None]
    return Scored((losses[0] + losses[1]) / 2, logits)


def _position_loss(logits_BS: Tensor, positions: Tensor, batch: PackedBatch, name: str, num_items: int | Tensor | None) -> Tensor:
    """Cross-entropy of one end. As in transformers, a position behind the last cell takes no part."""
    B, S = batch.shape
    if positions.numel() != B:
        raise LabelError(f"{name}_positions are {tuple(positions.shape)}, but there are {B} sequences; pass one position each.")
    positions = positions.view(-1).long()
    if readable(positions) and (batch.spare_tokens or batch.grid_T.numel() < B * S):    # a target in padding is -10000 nats away
        _check_real(positions, batch, name)
    positions = positions.clamp(0, S)
    if num_items is None:
        return F.cross_entropy(logits_BS, positions, ignore_index=S)
    return F.cross_entropy(logits_BS, positions, ignore_index=S, reduction="sum") / num_items


def _check_real(positions: Tensor, batch: PackedBatch, name: str) -> None:
    B, S = batch.shape
    real = torch.zeros(B * S + 1, dtype=torch.bool)
    real[batch.grid_T] = True
    cells = torch.where(positions < S, torch.arange(B) * S + positions.clamp(min=0), 0)
    wrong = ((positions < S) & ~real[cells]).nonzero()
    if wrong.numel():
        b = int(wrong[0])
        raise LabelError(f"{name}_positions[{b}] is {int(positions[b])}, but the sequence has {int(batch.lengths()[b])} tokens; "
                         "make positions and features with the same tokenizer call.")


def of_choices(scores_N1: Tensor, counts_B: Tensor | None, most: int | None = None, spare: bool = False) -> Tensor:
    """[B, most]: the choices of each example side by side; examples with fewer hold -10000 behind them.

    counts_B: int64 [B] with sum N; None: all N are one example's. most: the largest count; None: read from counts_B. spare: their
    sum may be less, and the scores behind it are no example's.
    Raises InputError.
    """
    N = scores_N1.shape[0]
    if counts_B is None:
        return scores_N1.view(1, N)
    if readable(counts_B) and (int(counts_B.sum()) > N or int(counts_B.sum()) < N and not spare):
        raise InputError(f"choice_counts add up to {int(counts_B.sum())}, but the batch has {N} sequences; pass how many each "
                         "example has.")
    B = counts_B.shape[0]
    if most is None:
        most = int(counts_B.max()) if B else 0
    counts_B = counts_B.to(scores_N1.device).long()
    ends_B, places_N = counts_B.cumsum(0), torch.arange(N, device=scores_N1.device)
    owner_N = torch.searchsorted(ends_B, places_N, right=True)             # B behind the last
    column_N = places_N - F.pad(ends_B, (1, 0))[owner_N]
    cells_N = torch.where(owner_N < B, owner_N * most + column_N, B * most)
    return scores_N1.new_full((B * most + 1,), ABSENT).index_copy(0, cells_N, scores_N1[:, 0])[:-1].view(B, most)
