"""vocabulary_log_prob: log softmax(h E^T)[target] for some rows, E the frozen word embeddings (a tied language-model head).

Only the rows that have a target come here, a few a sequence, and in chunks: [CHUNK, V] is the largest tensor there ever is.
E is frozen and a row's gradient is dlogp times (E[target] - softmax(h E^T) E), so forward makes the latter while it has the
probabilities: two products in all, and [R, H] is all that is saved.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptv2_engine.ops.frozen_linear import widens

CHUNK = 256


def reference(h_RH: Tensor, word_VH: Tensor, targets_R: Tensor) -> Tensor:
    """The same in plain PyTorch: differentiable in h and E."""
    wide = torch.float64 if h_RH.dtype == torch.float64 else torch.float32
    return F.linear(h_RH, word_VH).to(wide).log_softmax(-1).gather(1, targets_R[:, None])[:, 0]


class _VocabularyLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_RH: Tensor, word_VH: Tensor, targets_R: Tensor) -> Tensor:
        logp_R, slope_RH = _by_chunks(h_RH, word_VH, targets_R, with_slope=True)
        ctx.save_for_backward(slope_RH)
        ctx.dtype = h_RH.dtype
        return logp_R

    @staticmethod
    def backward(ctx: Any, dlogp_R: Tensor) -> tuple[Tensor, None, None]:
        slope_RH, = ctx.saved_tensors
        return (slope_RH * dlogp_R[:, None]).to(ctx.dtype), None, None


def _by_chunks(h_RH: Tensor, word_VH: Tensor, targets_R: Tensor, with_slope: bool) -> tuple[Tensor, Tensor]:
    """log p(target), fp32 [R], and its gradient by h, [R, H]; without it empty."""
    if widens(h_RH):
        h_RH, word_VH = h_RH.float(), word_VH.float()
    found, slopes = [], []
    for h, targets in zip(h_RH.split(CHUNK), targets_R.split(CHUNK), strict=True):
        logits = F.linear(h, word_VH).float()
        lse = logits.logsumexp(1, keepdim=True)
        found.append((logits.gather(1, targets[:, None]) - lse)[:, 0])
        if with_slope:              # 1 - p before it is rounded: where p is nearly 1, a difference of two products would be noise
            left = logits.sub_(lse).exp_().neg_().scatter_add_(1, targets[:, None], torch.ones_like(lse))
            slopes.append(left.to(h.dtype) @ word_VH)
    return torch.cat(found), torch.cat(slopes) if slopes else h_RH[:0]


def vocabulary_log_prob(h_RH: Tensor, word_VH: Tensor, targets_R: Tensor) -> Tensor:
    """log p(target) of R rows under softmax(h E^T), without ever holding [R, V] for more than 256 rows.

    Arguments:
        h_RH: [R, H]. word_VH: [V, H], h's dtype. targets_R: int64 [R], each below V.
    Returns:
        fp32 [R]; the gradient reaches h, and E where it trains (autograd then keeps [R, V]).
    """
    if not h_RH.shape[0]:
        return h_RH.sum(1).float()
    if h_RH.dtype == torch.float64 or word_VH.requires_grad and torch.is_grad_enabled():
        return reference(h_RH, word_VH, targets_R)
    if not (torch.is_grad_enabled() and h_RH.requires_grad):
        return _by_chunks(h_RH.detach(), word_VH, targets_R, with_slope=False)[0]
    return _VocabularyLogProb.apply(h_RH, word_VH, targets_R)
