"""Padded batch <-> packed batch: the tokens of all sequences end to end, without padding.

Packing happens once, at the door. Inside, every row is a real token: B x S becomes T. Outputs are put back into the
padded shape that a caller of transformers expects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ptv2_engine.errors import DataError, InputError
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
        """int64 [T]: the sequence each token belongs to."""
        return torch.repeat_interleave(torch.arange(self.num_sequences, device=self.cu_seqlens.device), self.lengths(),
                                       output_size=self.num_tokens)

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
                uncounted_id: int | None = None) -> PackedBatch:
    """A batch that comes packed: input_ids_T integer [T], seq_lengths integer [B] with sum T.

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
        _check_lengths(seq_lengths, T, max_seqlen)
    if max_seqlen is None:
        max_seqlen = int(seq_lengths.max()) if B else 0
    seq_lengths = seq_lengths.to(device)
    cu_seqlens = _offsets(seq_lengths.int())
    owner = torch.repeat_interleave(torch.arange(B, device=device), seq_lengths.long(), output_size=T)
    column = torch.arange(T, device=device) - cu_seqlens[:-1].long()[owner]
    positions_T = column
    if uncounted_id is not None:
        counted = input_ids_T != uncounted_id
        before = torch.cat((counted.new_zeros(1, dtype=torch.long), counted.cumsum(0)))
        positions_T = torch.where(counted, before[1:] - before[cu_seqlens[:-1].long()][owner] - 1, -1)
    return PackedBatch(input_ids_T=input_ids_T.long(), position_ids_T=positions_T,
                       token_type_ids_T=None if token_type_ids_T is None else token_type_ids_T.long(), cu_seqlens=cu_seqlens,
                       max_seqlen=max_seqlen, prompt_ids=_check_prompt_ids(prompt_ids, B),
                       grid_T=owner * max_seqlen + column, shape=(B, max_seqlen), num_positions=max_seqlen)


def rows_of(x: Tensor, batch: PackedBatch, name: str) -> Tensor:
    """A value a token, int64 [T], from the caller's padded [B, S] or packed [T]. Raises InputError for other shapes."""
    if x.shape == batch.shape:
        return x.flatten()[batch.grid_T].long()
    if x.shape != (batch.num_tokens,):
        raise InputError(f"{name} is {tuple(x.shape)}, but the batch is {batch.shape} padded or {(batch.num_tokens,)} packed; "
                         "pass one value a token.")
    return x.long()


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


def _check_lengths(seq_lengths: Tensor, num_tokens: int, max_seqlen: int | None) -> None:
    lengths = seq_lengths.tolist()
    if min(lengths, default=0) < 0:
        raise InputError(f"seq_lengths holds {min(lengths)}, but a length is 0 or more; pass the token count of each sequence.")
    if sum(lengths) != num_tokens:
        raise InputError(f"seq_lengths add up to {sum(lengths)}, but there are {num_tokens} packed tokens; "
                         "pass the lengths of exactly these sequences.")
    if max_seqlen is not None and max_seqlen < max(lengths, default=0):
        raise InputError(f"max_seqlen is {max_seqlen}, but a sequence has {max(lengths)} tokens; "
                         "pass the longest length, or None.")


def unpack(x_T: Tensor, batch: PackedBatch, fill: float = 0.0) -> Tensor:
    """[T, ...] -> [B, S, ...] in the caller's padded shape; cells without a token hold `fill`. Differentiable."""
    B, S = batch.shape
    out = x_T.new_full((B * S, *x_T.shape[1:]), fill)
    return out.index_copy(0, batch.grid_T, x_T).view(B, S, *x_T.shape[1:])


def _offsets(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _check_prompt_ids(prompt_ids: Tensor | None, num_sequences: int) -> Tensor | None:
    if prompt_ids is not None and prompt_ids.shape != (num_sequences,):
        raise InputError(f"prompt_ids is {tuple(prompt_ids.shape)}, but one id for each of {num_sequences} sequences is needed.")
    if prompt_ids is not None:
        _check_ids("prompt_ids", prompt_ids, 1, "[batch]")
    return None if prompt_ids is None else prompt_ids.long()


class PackedCollator:
    """Features of tokenised examples -> one packed batch, as a dictionary that PromptedModel.forward takes.

    Each feature holds input_ids (a list, not padded) and optionally token_type_ids, label / labels / label_ids (a number,
    or a list for token classification), prompt_ids (the example's prompt in a bank) and for cloze causal_from, position_ids (two
    lists), candidate_ids and target_ids. The result holds
    seq_lengths [B] first (transformers takes the batch size from the first tensor), input_ids [T], max_seqlen, and labels
    [B], or [B, S] filled with -100.

    `vocab_size` and `max_length` make the ids and lengths be checked here, on the host, so that a GPU step need not.
    """

    def __init__(self, *, vocab_size: int | None = None, max_length: int | None = None) -> None:
        self.vocab_size = vocab_size
        self.max_length = max_length

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ids = [list(feature["input_ids"]) for feature in features]
        lengths = [len(i) for i in ids]
        batch: dict[str, Any] = {"seq_lengths": torch.tensor(lengths),
                                 "input_ids": torch.tensor([i for row in ids for i in row], dtype=torch.long),
                                 "max_seqlen": max(lengths, default=0)}
        self._check(batch)
        if features and "token_type_ids" in features[0]:
            batch["token_type_ids"] = torch.tensor([t for f in features for t in f["token_type_ids"]], dtype=torch.long)
        if features and "prompt_ids" in features[0]:
            batch["prompt_ids"] = torch.tensor([int(f["prompt_ids"]) for f in features])
        if features and "position_ids" in features[0]:
            batch["position_ids"] = torch.tensor([[p for f in features for p in f["position_ids"][i]] for i in range(2)])
        if features and "causal_from" in features[0]:
            batch["causal_from"] = torch.tensor([int(f["causal_from"]) for f in features])
        for key in ("candidate_ids", "target_ids"):
            if features and key in features[0]:
                batch[key] = torch.tensor([t for f in features for t in f[key]], dtype=torch.long)
        name = next((n for n in ("labels", "label", "label_ids") if features and n in features[0]), None)
        if name is not None:
            batch["labels"] = _labels([f[name] for f in features], batch["max_seqlen"])
        return batch

    def _check(self, batch: dict[str, Any]) -> None:
        ids, longest = batch["input_ids"], batch["max_seqlen"]
        if self.max_length is not None and longest > self.max_length:
            raise InputError(f"an example has {longest} tokens, but the model takes {self.max_length} beside its prompt; "
                             f"truncate to {self.max_length} (--max_seq_length {self.max_length}).")
        if self.vocab_size is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise InputError(f"token id {int(ids.max()) if int(ids.max()) >= self.vocab_size else int(ids.min())} is outside the "
                             f"vocabulary of {self.vocab_size}; use the tokenizer that belongs to the backbone.")


def _labels(values: list[Any], longest: int) -> Tensor:
    values = [v.tolist() if isinstance(v, Tensor) else v for v in values]
    if values and isinstance(values[0], (list, tuple)):
        return torch.tensor([list(v) + [IGNORE] * (longest - len(v)) for v in values])
    return torch.tensor(values)


class TokenBalancedBatchSampler(Sampler[list[int]]):
    """Batches of exactly `batch_size` examples in random order whose token counts are nearly equal.

    Packed batches waste nothing on padding whatever their composition, so there is no reason to group by length; but a
    step's time and memory follow its token count. Examples are shuffled, cut into mega-batches, and dealt inside each one
    longest first to the batch with the fewest tokens so far. Every epoch visits each example once; batch statistics stay
    those of random sampling to the size of a mega-batch.

    Arguments:
        lengths: tokens of each example. batch_size: examples in a batch. shuffle: False keeps the given order, unbalanced.
        mega: most batches in a mega-batch. drop_last: leave out an incomplete last batch. set_epoch(e) seeds an epoch's order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, shuffle: bool = True, seed: int = 0, mega: int = 16,
                 drop_last: bool = False) -> None:
        if batch_size < 1:
            raise DataError(f"batch size {batch_size} is below 1; pass --per_device_train_batch_size 1 or more.")
        self.lengths, self.batch_size, self.shuffle, self.seed = list(lengths), batch_size, shuffle, seed
        self.mega, self.drop_last, self.epoch = mega, drop_last, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def sampler(self) -> TokenBalancedBatchSampler:
        """Itself: where accelerate, over several processes, looks for set_epoch."""
        return self

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[list[int]]:
        if not self.shuffle:
            order = list(range(len(self.lengths)))
            yield from (order[i:i + self.batch_size] for i in range(0, len(self) * self.batch_size, self.batch_size))
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        full = len(order) // self.batch_size * self.batch_size
        # at least four mega-batches, so that a small data set is not dealt into the same batches every epoch
        step = self.batch_size * max(1, min(self.mega, full // self.batch_size // 4))
        for start in range(0, full, step):
            dealt = self._deal(order[start:min(start + step, full)])
            yield from (dealt[i] for i in torch.randperm(len(dealt), generator=generator).tolist())
        if full < len(order) and not self.drop_last:
            yield order[full:]

    def _deal(self, examples: list[int]) -> list[list[int]]:
        batches: list[list[int]] = [[] for _ in range(len(examples) // self.batch_size)]
        tokens = [0] * len(batches)
        for example in sorted(examples, key=lambda i: -self.lengths[i]):
            open_batches = [b for b in range(len(batches)) if len(batches[b]) < self.batch_size]
            lightest = min(open_batches, key=lambda b: tokens[b])
            batches[lightest].append(example)
            tokens[lightest] += self.lengths[example]
        return batches
