"""What a captured step reads: batches filled up to a bucket of sizes, as one block of memory that takes one copy to fill."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptv2_engine.packing import IGNORE

# What stands behind the tokens, the sequences and the examples of a batch that is filled up
_OF_TOKENS = {"input_ids": 0, "token_type_ids": 0, "position_ids": 0, "candidate_ids": -1, "target_ids": IGNORE}
_OF_SEQUENCES = {"seq_lengths": 0, "prompt_ids": 0}
_OF_EXAMPLES = {"choice_counts": 0, "labels": IGNORE, "mask_positions": 0, "causal_from": 0, "start_positions": 0,
                "end_positions": 0}
_ALIGNED = 16                    # bytes; where a tensor starts in the block that a batch is copied as


def bucket_of_tokens(count: int) -> int:
    """The bucket of a packed batch's tokens: m * 2^e with m in 9..16, at least 16, less than 1/8 above any count over 128."""
    grain = 16
    while -(-count // grain) > 16:
        grain *= 2
    return max(-(-count // grain), 1) * grain


def bucket_of_longest(length: int, limit: int) -> int:
    """The bucket of the longest sequence: a power of two from 16, or the most tokens the model takes."""
    return min(max(16, 1 << (length - 1).bit_length()), max(limit, length))


class Bucket(NamedTuple):
    """What a graph is captured for: tensors by name with shape and dtype, and what is not a tensor."""

    tensors: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    others: tuple[tuple[str, Any], ...]


def fill_up(inputs: Mapping[str, Any], limit: int, per_token_labels: bool, examples: int = 0) -> dict[str, Any]:
    """A packed batch (PackedCollator's) with spare tokens up to its bucket, and spare sequences, which have no tokens.

    limit: the most tokens a sequence may have. per_token_labels: labels are [B, S], of a batch whose S is the longest sequence.
    examples: how many to fill up to; a batch with more keeps its own.
    """
    made = {k: v for k, v in inputs.items() if v is not None}
    count, longest = inputs["input_ids"].shape[0], int(inputs["max_seqlen"])
    spare, bucket = bucket_of_tokens(count) - count, bucket_of_longest(longest, limit)
    if per_token_labels and "labels" in made:
        made["labels"] = nn.functional.pad(made["labels"], (0, bucket - made["labels"].shape[1]), value=IGNORE)
    for name in ("start_positions", "end_positions"):            # behind the last cell means: takes no part
        if name in made:
            made[name] = torch.where(made[name] >= longest, bucket, made[name])
    missing = dict.fromkeys(_OF_TOKENS, spare) | _missing(made, examples)
    fill = _OF_TOKENS | _OF_SEQUENCES | _OF_EXAMPLES | {"start_positions": bucket, "end_positions": bucket}
    for name, more in missing.items():
        if name in made and more > 0:
            last = made[name].dim() - 1 if name in _OF_TOKENS else 0         # positions are [2, T]
            made[name] = nn.functional.pad(made[name], (0, 0) * (made[name].dim() - 1 - last) + (0, more), value=fill[name])
    return made | {"max_seqlen": bucket, "spare_tokens": True}


def _missing(inputs: Mapping[str, Any], examples: int) -> dict[str, int]:
    """How many entries each tensor of the examples, and of their sequences, lacks for so many examples."""
    sequences = examples
    if "choice_counts" in inputs:                                # where examples have several sequences, up to max_choices
        sequences = examples * inputs["max_choices"]
    return {name: wanted - inputs[name].shape[0] for names, wanted in ((_OF_SEQUENCES, sequences), (_OF_EXAMPLES, examples))
            for name in names if name in inputs}


def bucket_of(inputs: Mapping[str, Any]) -> Bucket:
    return Bucket(tuple((k, tuple(v.shape), v.dtype) for k, v in sorted(inputs.items()) if isinstance(v, Tensor)),
                  tuple((k, v) for k, v in sorted(inputs.items()) if not isinstance(v, Tensor)))


def places_of(bucket: Bucket) -> list[int]:
    """Bytes at which the tensors of a bucket start in one block of memory, and at last its size: a batch is one copy then."""
    sizes = (dtype.itemsize * torch.Size(shape).numel() for _, shape, dtype in bucket.tensors)
    return [0, *accumulate(-(-size // _ALIGNED) * _ALIGNED for size in sizes)]


def views_of(bucket: Bucket, memory: Tensor) -> dict[str, Tensor]:
    """The tensors of a bucket where they lie in a block of memory, uint8 [bytes]."""
    return {name: memory[place:place + dtype.itemsize * torch.Size(shape).numel()].view(dtype).view(shape)
            for (name, shape, dtype), place in zip(bucket.tensors, places_of(bucket), strict=False)}


class Staging:
    """Pinned host memory that batches pass through, in turns, so that filling one does not wait for the copy before it."""

    def __init__(self, device: torch.device, turns: int = 3) -> None:
        self.device, self.memory, self.turn = device, [torch.empty(0, dtype=torch.uint8)] * turns, 0
        self.copied: list[torch.cuda.Event | None] = [None] * turns

    def upload(self, values: Mapping[str, Any], bucket: Bucket, target: Tensor) -> None:
        """Copy a batch into a block on the device."""
        self.turn = (self.turn + 1) % len(self.memory)
        event = self.copied[self.turn]
        if event is not None:
            event.synchronize()
        size = places_of(bucket)[-1]
        if self.memory[self.turn].numel() < size:
            self.memory[self.turn] = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        for name, view in views_of(bucket, self.memory[self.turn]).items():
            view.copy_(values[name])
        target.copy_(self.memory[self.turn][:size], non_blocking=True)
        if self.device.type == "cuda":
            self.copied[self.turn] = event = torch.cuda.Event()
            event.record()
