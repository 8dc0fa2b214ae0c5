"""The cloze head: class scores from the backbone's own, frozen language-model head. Nothing of it trains.

One token an answer (a verbalizer): the scores are the logits of those tokens at GLM's <sop>, or at the blank of a masked language
model, B rows times C vocabulary rows.
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
        mix_loss: the right candidate's negative score is added to the cross-entropy (WSC, as published).
        masked_lm: a masked language model's head (masked_lm.py), in place of GLM's tied word embeddings.
    """

    verbalizer_ids: Tensor | None

    def __init__(self, vocab_size: int, verbalizer_ids: list[int] | None = None, length_penalty: float = 0.0,
                 mix_loss: bool = False, masked_lm: nn.Module | None = None) -> None:
        super().__init__()
        if masked_lm is not None and verbalizer_ids is None:
            raise ConfigError("a masked language model fills its blank with one token, so it takes no candidate answers; pass "
                              "verbalizer_ids, or use a GLM backbone.")
        wrong = [i for i in verbalizer_ids or [] if not 0 <= i < vocab_size]
        if wrong:
            raise ConfigError(f"verbalizer id {wrong[0]} is outside the vocabulary of {vocab_size}; use ids of the backbone's "
                              "tokenizer.")
        if verbalizer_ids is not None and len(set(verbalizer_ids)) < len(verbalizer_ids):
            raise ConfigError(f"verbalizer_ids {verbalizer_ids} name one token twice; each class needs a token of its own.")
        ids = None if verbalizer_ids is None else torch.tensor(verbalizer_ids)
        self.register_buffer("verbalizer_ids", ids, persistent=False)
        self.length_penalty, self.mix_loss, self.masked_lm = length_penalty, mix_loss, masked_lm

    def blank_rows(self, batch: PackedBatch, mask_positions: Tensor | None) -> Tensor:
        """int64 [B]: the row whose state fills each sequence's blank. Raises InputError (on the host)."""
        if self.masked_lm is None:
            return self.sop_rows(batch)
        if mask_positions is None or mask_positions.shape != (batch.num_sequences,):
            found = None if mask_positions is None else tuple(mask_positions.shape)
            raise InputError(f"mask_positions is {found}, but a masked language model needs the index of the mask token in each "
                             f"of {batch.num_sequences} sequences; make the features with ClozeTask.")
        if readable(mask_positions) and (b := batch.first_without(mask_positions)) is not None:
            raise InputError(f"mask_positions[{b}] is {int(mask_positions[b])}, but the sequence has {int(batch.lengths()[b])} "
                             "tokens; make the features with ClozeTask.")
        return batch.rows_at(mask_positions.long())

    def sop_rows(self, batch: PackedBatch) -> Tensor:
        """int64 [B]: the row of each sequence's first token of part B. Raises InputError without one (on the host)."""
        if batch.causal_from is None:
            raise InputError("a cloze batch needs causal_from and position_ids; make the features with cloze_features.")
        if readable(batch.causal_from) and (b := batch.first_without(batch.causal_from)) is not None:
            raise InputError(f"sequence {b} has {int(batch.lengths()[b])} tokens and causal_from {int(batch.causal_from[b])}, so "
                             "no <sop> stands behind its context; make the features with cloze_features.")
        return batch.rows_at(batch.causal_from)

    def verbalize(self, h_BH: Tensor, word_VH: Tensor) -> Tensor:
        """fp32 logits [B, C] of the verbalizers' tokens."""
        if self.verbalizer_ids is None:
            raise InputError("this cloze model has no verbalizers and the batch has no target_ids; set verbalizer_ids, or pass "
                             "candidates.")
        if self.masked_lm is not None:
            return self.masked_lm(h_BH, word_VH, self.verbalizer_ids)
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
