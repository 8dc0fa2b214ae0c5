"""Frozen embeddings, and the rows of a shallow prompt that may stand in front of each sequence's tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptv2_engine.encoder.config import EncoderConfig
from ptv2_engine.encoder.layer import frozen, frozen_linear_of
from ptv2_engine.errors import InputError
from ptv2_engine.ops import add_norm, dropout, embedding
from ptv2_engine.packing import PackedBatch


class Embeddings(nn.Module):
    """word + position + type (the tables a family has), LayerNorm, dropout; for ELECTRA a projection to the hidden size."""

    late_dropout = False               # True: the first layer's add_norm draws the embeddings' dropout

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        E = config.embedding_size
        self.config = config
        self.word = frozen(config.vocab_size, E)
        self.position = frozen(config.max_positions, E) if config.absolute_positions else None
        self.token_type = frozen(config.type_vocab_size, E) if config.type_vocab_size else None
        self.norm_weight, self.norm_bias = frozen(E), frozen(E)
        self.project = frozen_linear_of(config.hidden_size, E) if config.hidden_size != E else None

    def positions(self, batch: PackedBatch, shift_T: Tensor | int) -> Tensor:
        """Rows of the position table, shifted by the prompt in front of the token."""
        if self.config.counts_pads:
            return batch.position_ids_T + shift_T
        rows = batch.position_ids_T + self.config.position_offset + shift_T
        return torch.where(batch.position_ids_T < 0, self.config.pad_token_id, rows)

    def forward(self, batch: PackedBatch, shift_T: Tensor | int, dropout_p: float, seed: Tensor | None, site: int) -> Tensor:
        """x_TH [T, H] of a packed batch, in the tables' dtype; it never requires grad."""
        x_TE = embedding(batch.input_ids_T, self.positions(batch, shift_T), batch.token_type_ids_T, self.word, self.position,
                         self.token_type, self.norm_weight, self.norm_bias, self.config.layer_norm_eps, dropout_p=dropout_p,
                         seed=seed, site=site)
        return x_TE if self.project is None else self.project(x_TE)

    def prompt_rows(self, prompt_KPE: Tensor) -> Tensor:
        """Trainable input embeddings [K, P, E] as hidden rows [K, P, H]: position 0..P-1, type 0, LayerNorm, with gradient."""
        K, P, E = prompt_KPE.shape
        offset = self.config.position_offset
        rest_PE = torch.zeros_like(prompt_KPE[0])
        if self.position is not None:
            rest_PE = rest_PE + self.position[offset:offset + P]
        if self.token_type is not None:
            rest_PE = rest_PE + self.token_type[0]
        rows = add_norm(prompt_KPE.reshape(K * P, E), rest_PE.repeat(K, 1), self.norm_weight, self.norm_bias,
                        self.config.layer_norm_eps)
        return (rows if self.project is None else self.project(rows)).view(K, P, -1)

    def validate(self, batch: PackedBatch) -> None:
        """Raises InputError for ids outside the tables. Reads the ids, so the stack calls it for CPU tensors only."""
        for name, ids, limit, way in (
                ("token id", batch.input_ids_T, self.config.vocab_size, "use the tokenizer that belongs to the backbone"),
                ("token type", batch.token_type_ids_T, self.config.type_vocab_size,
                 "leave token_type_ids out or use the tokenizer that belongs to the backbone")):
            if ids is None or not ids.numel() or not limit:      # token types of a family without them are not looked at
                continue
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= limit:
                raise InputError(f"{name} {low if low < 0 else high} is outside the table of {limit} rows; {way}.")


def insert_rows(x_TH: Tensor, batch: PackedBatch, rows_KPH: Tensor, prompt_lengths: Tensor | None,
                dropout_p: float, seed: Tensor | None, site: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Put each sequence's prompt rows, dropped out anew for each, in front of its tokens.

    Returns:
        x [T + sum of prompt lengths, H], cu_seqlens int32 [B+1] of the longer sequences, the rows [T] where the tokens
        went, and the longest sequence.
    """
    B, (K, P, H) = batch.num_sequences, rows_KPH.shape
    ids = torch.zeros(B, dtype=torch.long, device=x_TH.device) if batch.prompt_ids is None else batch.prompt_ids
    lengths_K = torch.full((K,), P, device=x_TH.device) if prompt_lengths is None else prompt_lengths
    added_B = lengths_K[ids]
    ends_B = added_B.cumsum(0)
    num_added = B * P if prompt_lengths is None else int(added_B.sum())
    token_rows_T = torch.arange(batch.num_tokens, device=x_TH.device) + ends_B[batch.sequence_of_token()]
    owner = torch.repeat_interleave(torch.arange(B, device=x_TH.device), added_B, output_size=num_added)
    inside = torch.arange(num_added, device=x_TH.device) - (ends_B - added_B)[owner]
    prompt_rows = batch.cu_seqlens[:-1].long()[owner] + (ends_B - added_B)[owner] + inside
    rows = dropout(rows_KPH[ids[owner], inside], dropout_p, seed, site)
    x = x_TH.new_zeros(batch.num_tokens + num_added, H).index_copy(0, token_rows_T, x_TH).index_copy(0, prompt_rows, rows)
    cu_seqlens = batch.cu_seqlens.clone()
    cu_seqlens[1:] += ends_B.int()
    return x, cu_seqlens, token_rows_T, batch.max_seqlen + P
