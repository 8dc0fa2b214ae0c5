"""vocabulary_log_prob: log softmax(h E^T)[target] for some rows, E the frozen word embeddings (a tied language-model head).

Only the rows that have a target come here, a few a sequence, and in chunks: [CHUNK, V] is the largest tensor there ever is.
Saved for backward: h, the targets and one log-sum-exp a row; the probabilities are made again.
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
        lse, picked = [], []
        ctx.dtype, ctx.word_VH = h_RH.dtype, word_VH
        if widens(h_RH):
            h_RH, word_VH = h_RH.float(), word_VH.float()
        for h, targets in zip(h_RH.split(CHUNK), targets_R.split(CHUNK), strict=True):
            logits = F.linear(h, word_VH).float()
            lse.append(logits.logsumexp(1))
            picked.append(logits.gather(1, targets[:, None])[:, 0])
        lse_R = torch.cat(lse)
        ctx.save_for_backward(h_RH, targets_R, lse_R)
        return torch.cat(picked) - lse_R

    @staticmethod
    def backward(ctx: Any, dlogp_R: Tensor) -> tuple[Tensor, None, None]:
        h_RH, targets_R, lse_R = ctx.saved_tensors
        word_VH = ctx.word_VH.to(h_RH.dtype)
        dh_RH = torch.empty_like(h_RH, dtype=ctx.dtype)
        for i in range(0, h_RH.shape[0], CHUNK):
            part = slice(i, i + CHUNK)
            dlogits = (F.linear(h_RH[part], word_VH).float() - lse_R[part, None]).exp_().neg_()
            dlogits.scatter_add_(1, targets_R[part, None], torch.ones_like(lse_R[part, None]))
            dh_RH[part] = (dlogits * dlogp_R[part, None]).to(h_RH.dtype) @ word_VH
        return dh_RH, None, None


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
    return _VocabularyLogProb.apply(h_RH, word_VH, targets_R)
