"""Examples -> packed batches for a Trainer: the collator, the sampler that balances tokens, and cutting a batch into pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ptv2_engine.errors import DataError, InputError
from ptv2_engine.packing import IGNORE


class PackedCollator:
    """Features of tokenised examples -> one packed batch, as a dictionary that PromptedModel.forward takes.

    Each feature holds input_ids (a list; padding on the right that an attention_mask marks is cut) and optionally token_type_ids,
    label / labels / label_ids (a number, or a list for token classification), start_positions and end_positions, prompt_ids (the
    example's prompt in a bank), mask_positions (the blank of a masked language model), and for GLM's cloze causal_from,
    position_ids (two lists), candidate_ids and target_ids. Multiple choice: input_ids (and token_type_ids) is a list of lists,
    one a choice.

    The result holds first what has an entry for each example (transformers takes the batch size from the first tensor):
    seq_lengths [B], or choice_counts [B] in front of the seq_lengths of all choices; then input_ids [T], max_seqlen, and labels
    [B], or [B, S] filled with -100.

    `vocab_size` and `max_length` make the ids and lengths be checked here, on the host, so that a GPU step need not.
    """

    def __init__(self, *, vocab_size: int | None = None, max_length: int | None = None) -> None:
        self.vocab_size = vocab_size
        self.max_length = max_length

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        features = [without_padding(feature) for feature in features]
        if features and is_choice(features[0]):
            counts = [len(f["input_ids"]) for f in features]
            batch = {"choice_counts": torch.tensor(counts), "max_choices": max(counts)}
        ids = [list(row) for feature in features for row in sequences_of(feature)]
        lengths = [len(i) for i in ids]
        batch |= {"seq_lengths": torch.tensor(lengths),
                  "input_ids": torch.tensor([i for row in ids for i in row], dtype=torch.long),
                  "max_seqlen": max(lengths, default=0)}
        self._check(batch)
        if features and "token_type_ids" in features[0]:
            types = [t for f in features for row in sequences_of(f, "token_type_ids") for t in row]
            batch["token_type_ids"] = torch.tensor(types, dtype=torch.long)
        if features and "prompt_ids" in features[0]:
            batch["prompt_ids"] = torch.tensor([int(f["prompt_ids"]) for f in features for _ in sequences_of(f)])
        for key in ("start_positions", "end_positions", "mask_positions"):
            if features and key in features[0]:
                batch[key] = torch.tensor([int(f[key]) for f in features])
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


def real_length(mask: Sequence[int]) -> int:
    """Tokens of an attention mask. Raises InputError where padding stands in front of one."""
    count = sum(1 for m in mask if m)
    if not all(mask[:count]):
        raise InputError(f"an example's attention_mask has a 0 in front of its last token (position {list(mask).index(0)}), but "
                         "only padding on the right can be cut; tokenise without padding, or with padding_side='right'.")
    return count


def without_padding(feature: Mapping[str, Any]) -> Mapping[str, Any]:
    """A feature without what its attention_mask leaves out, as transformers' scripts make it with padding="max_length"."""
    mask = feature.get("attention_mask")
    if mask is None or not len(mask):
        return feature
    nested = is_choice(feature)
    lengths = [real_length(row) for row in (mask if nested else [mask])]
    widths = [len(row) for row in (mask if nested else [mask])]
    if lengths == widths:
        return feature
    cut = dict(feature)
    for name in ("input_ids", "token_type_ids"):
        if name in cut:
            cut[name] = [row[:n] for row, n in zip(cut[name], lengths, strict=True)] if nested else cut[name][:lengths[0]]
    for name in ("labels", "label", "label_ids"):           # one a token
        if not nested and hasattr(cut.get(name), "__len__") and len(cut[name]) == widths[0]:
            cut[name] = cut[name][:lengths[0]]
    return cut


def is_choice(feature: Mapping[str, Any]) -> bool:
    """Whether an example is several sequences, one a choice."""
    ids = feature["input_ids"]
    return len(ids) > 0 and isinstance(ids[0], (list, tuple))


def sequences_of(feature: Mapping[str, Any], key: str = "input_ids") -> list[Sequence[int]]:
    """The sequences of an example: one, or one a choice."""
    return feature[key] if is_choice(feature) else [feature[key]]


def _labels(values: list[Any], longest: int) -> Tensor:
    values = [v.tolist() if isinstance(v, Tensor) else v for v in values]
    if values and isinstance(values[0], (list, tuple)):
        return torch.tensor([list(v) + [IGNORE] * (longest - len(v)) for v in values])
    return torch.tensor(values)


_OF_TOKENS = ("input_ids", "token_type_ids", "candidate_ids", "target_ids", "position_ids")     # in a packed batch
_OF_SEQUENCES = ("seq_lengths", "prompt_ids")      # where an example has several


def split_inputs(inputs: Mapping[str, Any], pieces: int) -> list[dict[str, Any]]:
    """A model's keyword arguments, cut by sequences into up to `pieces` batches of about equal size; together they are the batch.

    inputs: packed (PackedCollator's) or padded. Every tensor but those of the tokens has the examples in its first dimension;
    where an example has several sequences (choice_counts), those of the sequences have them.
    """
    packed, counts = inputs.get("seq_lengths") is not None, inputs.get("choice_counts")
    count = inputs["seq_lengths" if packed else "input_ids"].shape[0] if counts is None else counts.shape[0]
    pieces = max(1, min(pieces, count))
    ends = [count * i // pieces for i in range(pieces + 1)]
    sequences = list(range(count + 1)) if counts is None else [0, *counts.cumsum(0).tolist()]
    tokens = [0, *inputs["seq_lengths"].cumsum(0).tolist()] if packed else sequences

    def part(name: str, value: Any, first: int, last: int) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if packed and name in _OF_TOKENS:
            return value[..., tokens[sequences[first]]:tokens[sequences[last]]]
        if counts is not None and name in _OF_SEQUENCES:
            return value[sequences[first]:sequences[last]]
        return value[first:last]

    shared = ("seed",)                          # one for the batch, though it looks like one for the first sequence
    return [{name: value if name in shared else part(name, value, first, last) for name, value in inputs.items()}
            for first, last in zip(ends[:-1], ends[1:], strict=True)]


class TokenBalancedBatchSampler(Sampler[list[int]]):
    """Batches of exactly `batch_size` examples in random order whose token counts are nearly equal.

    Packed batches waste nothing on padding whatever their composition, so there is no reason to group by length; but a
    step's time and memory follow its token count. Examples are shuffled, cut into mega-batches, and dealt inside each one
    longest first to the batch with the fewest tokens so far. Every epoch visits each example once; batch statistics stay
    those of random sampling to the size of a mega-batch.

    Arguments:
        lengths: tokens of each example. batch_size: examples in a batch. shuffle: False keeps the given order, unbalanced.
        mega: most batches in a mega-batch. drop_last: leave out an incomplete last batch. set_epoch(e) seeds an epoch's order.
        pieces: a divisor of batch_size; each batch comes as that many micro-batches of batch_size / pieces examples. Which
        examples make a batch does not depend on it. self.batch_size is the micro-batch's, where accelerate looks for it.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, shuffle: bool = True, seed: int = 0, mega: int = 16,
                 drop_last: bool = False, pieces: int = 1) -> None:
        if batch_size < 1:
            raise DataError(f"batch size {batch_size} is below 1; pass --per_device_train_batch_size 1 or more.")
        self.lengths, self.whole, self.shuffle, self.seed = list(lengths), batch_size, shuffle, seed
        self.mega, self.drop_last, self.epoch, self.pieces = mega, drop_last, 0, pieces
        self.batch_size = batch_size // pieces

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def sampler(self) -> TokenBalancedBatchSampler:
        """Itself: where accelerate, over several processes, looks for set_epoch."""
        return self

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.whole)
        return full * self.pieces + (0 if self.drop_last else -(-rest // self.batch_size))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches():
            if len(batch) == self.whole:                    # dealt longest first: every piece gets its share
                yield from (batch[i::self.pieces] for i in range(self.pieces))
            else:                                           # only the very last may be smaller
                yield from (batch[i:i + self.batch_size] for i in range(0, len(batch), self.batch_size))

    def _batches(self) -> Iterator[list[int]]:
        count = len(self.lengths)
        if not self.shuffle:
            last = count // self.whole * self.whole if self.drop_last else count
            yield from (list(range(i, min(i + self.whole, count))) for i in range(0, last, self.whole))
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(count, generator=generator).tolist()
        full = count // self.whole * self.whole
        # at least four mega-batches, so that a small data set is not dealt into the same batches every epoch
        step = self.whole * max(1, min(self.mega, full // self.whole // 4))
        for start in range(0, full, step):
            dealt = self._deal(order[start:min(start + step, full)])
            yield from (dealt[i] for i in torch.randperm(len(dealt), generator=generator).tolist())
        if full < count and not self.drop_last:
            yield order[full:]

    def _deal(self, examples: list[int]) -> list[list[int]]:
        batches: list[list[int]] = [[] for _ in range(len(examples) // self.whole)]
        tokens = [0] * len(batches)
        for example in sorted(examples, key=lambda i: -self.lengths[i]):
            open_batches = [b for b in range(len(batches)) if len(batches[b]) < self.whole]
            lightest = min(open_batches, key=lambda b: tokens[b])
            batches[lightest].append(example)
            tokens[lightest] += self.lengths[example]
        return batches
