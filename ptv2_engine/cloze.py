"""The cloze head: class scores from the backbone's own, frozen language-model head. It has no parameters.

One token an answer (a verbalizer): the scores are the logits of those tokens at <sop>, B rows times C vocabulary rows.
Answers of several tokens: all candidates lie behind one context and do not see each other; a candidate's score is the sum
of its tokens' log-probabilities over the vocabulary (PET, arXiv 2001.07676; GLM, arXiv 2103.10360, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptv2_engine.errors import ConfigError, InputError
from ptv2_engine.ops import readable, vocabulary_log_prob
from ptv2_engine.packing import IGNORE, PackedBatch, rows_of

ABSENT = -10000.0      # the published score of candidates that an example does not have


class ClozeHead(nn.Module):
    """Scores fp32 [B, C] over verbalizers, or over each example's candidates.

    Arguments:
        vocab_size: rows of the word embeddings.
        verbalizer_ids: the token of each class, or None where examples bring candidates.
        length_penalty: candidate scores are divided by their token count to this power (WSC uses 1 as published); 0: sums.
    """

    verbalizer_ids: Tensor | None

    def __init__(self, vocab_size: int, verbalizer_ids: list[int] | None = None, length_penalty: float = 0.0) -> None:
        super().__init__()
        wrong = [i for i in verbalizer_ids or [] if not 0 <= i < vocab_size]
        if wrong:
            raise ConfigError(f"verbalizer id {wrong[0]} is outside the vocabulary of {vocab_size}; use ids of the backbone's "
                              "tokenizer.")
        if verbalizer_ids is not None and len(set(verbalizer_ids)) < len(verbalizer_ids):
            raise ConfigError(f"verbalizer_ids {verbalizer_ids} name one token twice; each class needs a token of its own.")
        ids = None if verbalizer_ids is None else torch.tensor(verbalizer_ids)
        self.register_buffer("verbalizer_ids", ids, persistent=False)
        self.length_penalty = length_penalty

    def sop_rows(self, batch: PackedBatch) -> Tensor:
        """int64 [B]: the row of each sequence's first token of part B. Raises InputError without one (on the host)."""
        if batch.causal_from is None:
            raise InputError("a cloze batch needs causal_from and position_ids; make the features with cloze_features.")
        if readable(batch.causal_from) and bool((batch.causal_from >= batch.lengths()).any()):
            b = int((batch.causal_from >= batch.lengths()).nonzero()[0])
            raise InputError(f"sequence {b} has {int(batch.lengths()[b])} tokens and causal_from {int(batch.causal_from[b])}, so "
                             "no <sop> stands behind its context; make the features with cloze_features.")
        return batch.cu_seqlens[:-1].long() + batch.causal_from

    def verbalize(self, h_BH: Tensor, word_VH: Tensor) -> Tensor:
        """fp32 logits [B, C] of the verbalizers' tokens."""
        if self.verbalizer_ids is None:
            raise InputError("this cloze model has no verbalizers and the batch has no target_ids; set verbalizer_ids, or pass "
                             "candidates.")
        return h_BH.float() @ word_VH[self.verbalizer_ids].float().t()

    def target_rows(self, target_ids: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """(rows, targets), int64 [R] each: the tokens that predict one, and which."""
        targets_T = rows_of(target_ids, batch, "target_ids")
        rows_R = (targets_T != IGNORE).nonzero()[:, 0]
        return rows_R, targets_T[rows_R]

    def score(self, h_RH: Tensor, word_VH: Tensor, rows_R: Tensor, targets_R: Tensor, candidate_ids: Tensor | None,
              batch: PackedBatch) -> Tensor:
        """fp32 [B, C]: each candidate's log-probability; candidates that an example lacks get -10000."""
        logp_R = vocabulary_log_prob(h_RH, word_VH, targets_R)
        candidates_R = torch.zeros_like(rows_R)
        if candidate_ids is not None:
            candidates_R = rows_of(candidate_ids, batch, "candidate_ids")[rows_R]
        count = int(candidates_R.max()) + 1 if rows_R.numel() else 1
        cells_R = batch.sequence_of_token()[rows_R] * count + candidates_R
        size = batch.num_sequences * count
        scores = logp_R.new_zeros(size).index_add(0, cells_R, logp_R)
        tokens = torch.zeros_like(scores).index_add(0, cells_R, torch.ones_like(logp_R))
        scores = scores / tokens.clamp(min=1) ** self.length_penalty
        return torch.where(tokens > 0, scores, ABSENT).view(batch.num_sequences, count)
