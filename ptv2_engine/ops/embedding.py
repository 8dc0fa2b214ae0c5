"""embedding: x = dropout(LayerNorm(word[ids] + position[positions] + type[types])), forward only.

The tables are frozen, so there is no backward and nothing is saved; only the `reference` backend knows tables that train.
Bytes: three gathered rows read, one row written; the sum and the norm are fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ptv2_engine.ops import _philox
from ptv2_engine.ops._dispatch import choose, launcher

torch.library.define(
    "ptv2::embedding",
    "(Tensor word_ids_T, Tensor position_ids_T, Tensor? token_type_ids_T, Tensor word_VE, Tensor? position_ME, "
    "Tensor? type_UE, Tensor weight_E, Tensor bias_E, float eps, float dropout_p, Tensor? seed, int site) -> Tensor x_TE")


@torch.library.register_fake("ptv2::embedding")
def _fake(word_ids_T, position_ids_T, token_type_ids_T, word_VE, position_ME, type_UE, weight_E, bias_E, eps, dropout_p,
          seed, site):  # type: ignore[no-untyped-def]
    return word_VE.new_empty(word_ids_T.shape[0], word_VE.shape[1])


def reference(word_ids_T: Tensor, position_ids_T: Tensor, token_type_ids_T: Tensor | None, word_VE: Tensor,
              position_ME: Tensor | None, type_UE: Tensor | None, weight_E: Tensor, bias_E: Tensor, eps: float, *,
              dropout_p: float = 0.0, seed: Tensor | None = None, site: int = 0) -> Tensor:
    """The same in plain PyTorch, differentiable in the tables, any dtype and device."""
    x_TE = word_VE[word_ids_T]
    if position_ME is not None:
        x_TE = x_TE + position_ME[position_ids_T]
    if type_UE is not None:
        x_TE = x_TE + (type_UE[0] if token_type_ids_T is None else type_UE[token_type_ids_T])
    x_TE = F.layer_norm(x_TE, weight_E.shape, weight_E, bias_E, eps)
    if dropout_p > 0:
        rows = torch.arange(x_TE.shape[0], device=x_TE.device)
        keep = _philox.keep_scale(rows, x_TE.shape[1], 0, p=dropout_p, seed=seed, site=site, stream=_philox.HIDDEN)
        x_TE = x_TE * keep.to(x_TE.dtype)
    return x_TE


def embedding(word_ids_T: Tensor, position_ids_T: Tensor, token_type_ids_T: Tensor | None, word_VE: Tensor,
              position_ME: Tensor | None, type_UE: Tensor | None, weight_E: Tensor, bias_E: Tensor, eps: float, *,
              dropout_p: float = 0.0, seed: int | Tensor | None = None, site: int = 0) -> Tensor:
    """Embedding rows of packed tokens, summed, normalised and dropped out.

    Arguments:
        word_ids_T, position_ids_T: int [T], rows of word_VE [V, E] and position_ME [M, E] (None: no position table).
        token_type_ids_T: int [T], rows of type_UE [U, E]; None means row 0. type_UE None: no type table.
        weight_E, bias_E, eps: the LayerNorm.
        dropout_p: drop probability; seed: int, int64 tensor [1] or None (drawn); site: the Philox call site.
    Returns:
        x_TE [T, E] in the tables' dtype. It requires grad on the `reference` backend only, where a table does.
    """
    seed = _philox.seed_tensor(seed, word_VE.device, dropout_p > 0)
    choice = choose("embedding", word_VE.device, word_VE.dtype)
    if choice.backend == "reference":
        return reference(word_ids_T, position_ids_T, token_type_ids_T, word_VE, position_ME, type_UE, weight_E, bias_E, eps,
                         dropout_p=dropout_p, seed=seed, site=site)
    with torch.no_grad():
        ids = [None if i is None else i.long() for i in (word_ids_T, position_ids_T, token_type_ids_T)]
        return launcher(choice.backend, word_VE.device, "embedding")(
            *ids, word_VE, position_ME, type_UE, weight_E, bias_E, eps, dropout_p, seed, site)
