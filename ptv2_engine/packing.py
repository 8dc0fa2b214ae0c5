"""Padded batch <-> packed batch: the tokens of all sequences end to end, without padding.

Packing happens once, at the door. Inside, every row is a real token: B x S becomes T. Outputs are put back into the
padded shape that a caller of transformers expects.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptv2_engine.errors import InputError
from ptv2_engine.ops import readable

IGNORE = -100      # transformers' label of positions that take no part in the loss


@dataclass(frozen=True)
class PackedBatch:
    """T tokens of B sequences.

    input_ids_T, position_ids_T: int64 [T]; positions are inside the sequence, from 0, before any offset or shift (-1 marks
    a real token that carries the pad id in a family that does not count those). token_type_ids_T: int64 [T] or None.
    cu_seqlens: int32 [B+1]. max_seqlen: int. prompt_ids: int64 [B] or None. grid_T: int64 [T], the cell of each token in
    the padded [B * S] grid, with its shape (B, S). num_positions: int, no position_ids_T reaches it; more than max_seqlen
    where masked cells stand before tokens.
    spare_tokens: whether rows of no sequence may stand behind the last one, which fill a batch up to a size that a CUDA graph was
    captured for. They are computed and belong to nothing: no sequence reads them, their cell is B * S. Sequences without tokens
    at the end are spare then too, and take no part in a loss.

    GLM: block_ids_T int64 [T] or None, the second position; causal_from int64 [B] or None, where part B starts;
    first_key_T int64 [T] or None, the first token of part B that a token there sees (see ops.key_ranges).
    """

    input_ids_T: Tensor
    position_ids_T: Tensor
    token_type_ids_T: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    prompt_ids: Tensor | None
    grid_T: Tensor
    shape: tuple[int, int]
    num_positions: int
    block_ids_T: Tensor | None = None
    causal_from: Tensor | None = None
    first_key_T: Tensor | None = None
    spare_tokens: bool = False

    @property
    def num_tokens(self) -> int:
        return self.input_ids_T.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def lengths(self) -> Tensor:
        """int64 [B]: tokens of each sequence."""
        return self.cu_seqlens.diff().long()

    def sequence_of_token(self) -> Tensor:
        """int64 [T]: the sequence each token belongs to; the last one for spare tokens."""
        if self.spare_tokens:
            return _owners(self.cu_seqlens, self.num_tokens).clamp(max=self.num_sequences - 1)
        return torch.repeat_interleave(torch.arange(self.num_sequences, device=self.cu_seqlens.device), self.lengths(),
                                       output_size=self.num_tokens)

    def rows_at(self, indices_B: Tensor | int) -> Tensor:
        """int64 [B]: the row of one token of each sequence, by its index there; of a spare sequence some row that exists."""
        return (self.cu_seqlens[:-1].long() + indices_B).clamp(max=self.num_tokens - 1)

    def first_without(self, indices_B: Tensor) -> int | None:
        """The first sequence, spare ones apart, that has no token of its index. For tensors on the host."""
        lengths = self.lengths()
        missing = (indices_B < 0) | (indices_B >= lengths) & ((lengths > 0) | (not self.spare_tokens))
        return int(missing.nonzero()[0]) if bool(missing.any()) else None

    def with_prompt_ids(self, prompt_ids: Tensor | None) -> PackedBatch:
        return replace(self, prompt_ids=prompt_ids)


def _check_ids(name: str, ids: Tensor, dims: int, shape: str) -> None:
    if ids.dim() != dims or ids.is_floating_point() or ids.dtype == torch.bool:
        dtype = str(ids.dtype).removeprefix("torch.")
        raise InputError(f"{name} is {tuple(ids.shape)} {dtype}, but integer ids of shape {shape} are expected; "
                         "pass the tokenizer's tensors (return_tensors='pt').")


def _check_like(name: str, tensor: Tensor | None, ids: Tensor) -> None:
    if tensor is not None and tensor.shape != ids.shape:
        raise InputError(f"{name} is {tuple(tensor.shape)}, but input_ids is {tuple(ids.shape)}; "
                         "both must come from the same tokenizer call.")


def pack(input_ids_BS: Tensor, attention_mask_BS: Tensor | None = None, token_type_ids_BS: Tensor | None = None,
         prompt_ids: Tensor | None = None, *, uncounted_id: int | None = None) -> PackedBatch:
    """Drop the padding of a batch.

    Arguments:
        input_ids_BS: integer [B, S]. attention_mask_BS: [B, S], non-zero marks a token; any pattern is legal (left padding,
            holes): masked tokens are left out. None: every position is a token.
        token_type_ids_BS: integer [B, S] or None. prompt_ids: integer [B] or None.
        uncounted_id: None: a token's position is its column, as in BERT. An id: positions count the tokens that are not
            this id, as RoBERTa does with its padding id.
    Raises:
        InputError: floating-point ids, or shapes that differ.
    """
    _check_ids("input_ids", input_ids_BS, 2, "[batch, sequence]")
    _check_like("attention_mask", attention_mask_BS, input_ids_BS)
    _check_like("token_type_ids", token_type_ids_BS, input_ids_BS)
    if token_type_ids_BS is not None:
        _check_ids("token_type_ids", token_type_ids_BS, 2, "[batch, sequence]")
    B, S = input_ids_BS.shape
    device = input_ids_BS.device
    if attention_mask_BS is None:
        grid_T = torch.arange(B * S, device=device)
        lengths = torch.full((B,), S, dtype=torch.int32, device=device)
    else:
        if attention_mask_BS.dim() != 2:
            raise InputError(f"attention_mask is {tuple(attention_mask_BS.shape)}, but [batch, sequence] of 0 and 1 is expected.")
        present = attention_mask_BS != 0
        grid_T = present.flatten().nonzero()[:, 0]
        lengths = present.sum(1, dtype=torch.int32)
    if uncounted_id is None:
        positions_T = grid_T % max(S, 1)
    else:
        counted = input_ids_BS != uncounted_id
        positions_T = torch.where(counted, counted.cumsum(1) - 1, -1).flatten()[grid_T]
    if attention_mask_BS is None or not positions_T.numel():
        max_seqlen = num_positions = S if positions_T.numel() else 0
    else:
        max_seqlen, num_positions = torch.stack((lengths.max().long(), positions_T.max() + 1)).tolist()     # one read-back
    return PackedBatch(
        input_ids_T=input_ids_BS.flatten()[grid_T].long(), position_ids_T=positions_T,
        token_type_ids_T=None if token_type_ids_BS is None else token_type_ids_BS.flatten()[grid_T].long(),
        cu_seqlens=_offsets(lengths), max_seqlen=max_seqlen, prompt_ids=_check_prompt_ids(prompt_ids, B), grid_T=grid_T,
        shape=(B, S), num_positions=num_positions)


def from_packed(input_ids_T: Tensor, seq_lengths: Tensor, token_type_ids_T: Tensor | None = None,
                prompt_ids: Tensor | None = None, *, max_seqlen: int | None = None,
                uncounted_id: int | None = None, spare_tokens: bool = False) -> PackedBatch:
    """A batch that comes packed: input_ids_T integer [T], seq_lengths integer [B] with sum T, or less with spare_tokens.

    max_seqlen spares the one read-back from a GPU when the caller knows it (PackedCollator does). Lengths on the host are
    checked; lengths on a GPU are taken on trust.
    Raises InputError.
    """
    _check_ids("input_ids", input_ids_T, 1, "[tokens]")
    _check_ids("seq_lengths", seq_lengths, 1, "[batch]")
    _check_like("token_type_ids", token_type_ids_T, input_ids_T)
    if token_type_ids_T is not None:
        _check_ids("token_type_ids", token_type_ids_T, 1, "[tokens]")
    T, B, device = input_ids_T.shape[0], seq_lengths.shape[0], input_ids_T.device
    if readable(seq_lengths):
        _check_lengths(seq_lengths, T, max_seqlen, spare_tokens)
    if max_seqlen is None:
        max_seqlen = int(seq_lengths.max()) if B else 0
    seq_lengths = seq_lengths.to(device)
    cu_seqlens = _offsets(seq_lengths.int())
    if spare_tokens:
        found = _owners(cu_seqlens, T)
        owner, spare = found.clamp(max=B - 1), found == B
    else:
        owner, spare = torch.repeat_interleave(torch.arange(B, device=device), seq_lengths.long(), output_size=T), None
    column = torch.arange(T, device=device) - cu_seqlens[:-1].long()[owner]
    grid_T = owner * max_seqlen + column
    if spare is not None:
        column, grid_T = torch.where(spare, 0, column), torch.where(spare, B * max_seqlen, grid_T)
    positions_T = column
    if uncounted_id is not None:
        counted = input_ids_T != uncounted_id
        before = torch.cat((counted.new_zeros(1, dtype=torch.long), counted.cumsum(0)))
        positions_T = torch.where(counted, before[1:] - before[cu_seqlens[:-1].long()][owner] - 1, -1)
        if spare is not None:
            positions_T = torch.where(spare, 0, positions_T)
    return PackedBatch(input_ids_T=input_ids_T.long(), position_ids_T=positions_T,
                       token_type_ids_T=None if token_type_ids_T is None else token_type_ids_T.long(), cu_seqlens=cu_seqlens,
                       max_seqlen=max_seqlen, prompt_ids=_check_prompt_ids(prompt_ids, B),
                       grid_T=grid_T, shape=(B, max_seqlen), num_positions=max_seqlen, spare_tokens=spare_tokens)


def flat_choices(input_ids_BCS: Tensor, mask_BCS: Tensor | None,
                 types_BCS: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """transformers' multiple choice as sequences: the choices of each example [B], then the ids, the attention mask and the token
    types [B * C, S]."""
    counts = input_ids_BCS.new_full(input_ids_BCS.shape[:1], input_ids_BCS.shape[1])
    mask, types = (None if t is None else t.flatten(0, 1) for t in (mask_BCS, types_BCS))
    return counts, input_ids_BCS.flatten(0, 1), mask, types


def rows_of(x: Tensor, batch: PackedBatch, name: str) -> Tensor:
    """A value a token, int64 [T], from the caller's padded [B, S] or packed [T]. Raises InputError for other shapes."""
    if x.shape == batch.shape:
        return cells(x, batch, 0).long()
    if x.shape != (batch.num_tokens,):
        raise InputError(f"{name} is {tuple(x.shape)}, but the batch is {batch.shape} padded or {(batch.num_tokens,)} packed; "
                         "pass one value a token.")
    return x.long()


def cells(x_BS: Tensor, batch: PackedBatch, spare: int) -> Tensor:
    """[T]: what a [B, S] tensor holds for each token, and `spare` for spare ones."""
    flat = x_BS.flatten()
    return (torch.nn.functional.pad(flat, (0, 1), value=spare) if batch.spare_tokens else flat)[batch.grid_T]


def with_parts(batch: PackedBatch, causal_from: Tensor | None = None, position_ids: Tensor | None = None,
               candidate_ids: Tensor | None = None) -> PackedBatch:
    """GLM's inputs: where part B starts, both positions of each token, and which candidate answer it belongs to.

    Arguments:
        causal_from: integer [B], tokens of part A; None: everything is part A.
        position_ids: [B, 2, S] or packed [2, T]: positions and block positions. None is legal without a part B only.
        candidate_ids: [B, S] or [T], the index of each part B token's candidate, -1 in part A; None: one answer.
    Raises:
        InputError.
    """
    if causal_from is None and position_ids is None:
        return batch
    if causal_from is not None:
        _check_ids("causal_from", causal_from, 1, "[batch]")
        if causal_from.shape != (batch.num_sequences,):
            raise InputError(f"causal_from is {tuple(causal_from.shape)}, but there are {batch.num_sequences} sequences; pass "
                             "the length of each one's part A.")
        if position_ids is None:
            raise InputError("causal_from was given without position_ids, but the tokens of part B take the position of their "
                             "[MASK]; pass both (cloze_features makes them).")
        causal_from = causal_from.to(batch.cu_seqlens.device).long()
    blocks_T = None
    if position_ids is not None:
        if position_ids.dim() not in (2, 3) or position_ids.shape[-2] != 2:
            raise InputError(f"position_ids is {tuple(position_ids.shape)}, but [batch, 2, sequence] or packed [2, tokens] is "
                             "expected: positions, then block positions.")
        positions_T, blocks_T = (rows_of(position_ids[..., i, :], batch, "position_ids") for i in range(2))
        batch = replace(batch, position_ids_T=positions_T, num_positions=batch.max_seqlen)
    first_T = None
    if candidate_ids is not None and causal_from is not None:
        first_T = _first_of_candidate(rows_of(candidate_ids, batch, "candidate_ids"), batch)
    return replace(batch, block_ids_T=blocks_T, causal_from=causal_from, first_key_T=first_T)


def _first_of_candidate(candidates_T: Tensor, batch: PackedBatch) -> Tensor:
    """int64 [T]: the index in its sequence where each token's candidate starts; candidates lie one after the other."""
    rows = torch.arange(batch.num_tokens, device=candidates_T.device)
    owner = batch.sequence_of_token()
    starts = torch.ones_like(candidates_T, dtype=torch.bool)
    starts[1:] = (candidates_T[1:] != candidates_T[:-1]) | (owner[1:] != owner[:-1])
    return torch.where(starts, rows, 0).cummax(0).values - batch.cu_seqlens[:-1].long()[owner]


def _check_lengths(seq_lengths: Tensor, num_tokens: int, max_seqlen: int | None, spare_tokens: bool) -> None:
    lengths = seq_lengths.tolist()
    if min(lengths, default=0) < 0:
        raise InputError(f"seq_lengths holds {min(lengths)}, but a length is 0 or more; pass the token count of each sequence.")
    if sum(lengths) > num_tokens or sum(lengths) < num_tokens and not spare_tokens:
        raise InputError(f"seq_lengths add up to {sum(lengths)}, but there are {num_tokens} packed tokens; "
                         "pass the lengths of exactly these sequences.")
    if max_seqlen is not None and max_seqlen < max(lengths, default=0):
        raise InputError(f"max_seqlen is {max_seqlen}, but a sequence has {max(lengths)} tokens; "
                         "pass the longest length, or None.")


def unpack(x_T: Tensor, batch: PackedBatch, fill: float = 0.0) -> Tensor:
    """[T, ...] -> [B, S, ...] in the caller's padded shape; cells without a token hold `fill`. Differentiable."""
    B, S = batch.shape
    out = x_T.new_full((B * S + batch.spare_tokens, *x_T.shape[1:]), fill)
    return out.index_copy(0, batch.grid_T, x_T)[:B * S].view(B, S, *x_T.shape[1:])


def _owners(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """int64 [T]: the sequence each row lies in, B behind the last. Sizes do not depend on values, so that a graph can hold it."""
    rows = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], rows, right=True)


def _offsets(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _check_prompt_ids(prompt_ids: Tensor | None, num_sequences: int) -> Tensor | None:
    if prompt_ids is not None and prompt_ids.shape != (num_sequences,):
        raise InputError(f"prompt_ids is {tuple(prompt_ids.shape)}, but one id for each of {num_sequences} sequences is needed.")
    if prompt_ids is not None:
        _check_ids("prompt_ids", prompt_ids, 1, "[batch]")
    return None if prompt_ids is None else prompt_ids.long()
