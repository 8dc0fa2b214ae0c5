"""Multi-task P-Tuning v2 (arXiv 2110.07602, section 3.3): data sets share one prompt, and each has a head of its own.

A batch is of one data set, as published, or mixes them: then all its sequences go through the encoder as one packed batch and
each head reads its own. A data set is drawn with probability proportional to its size to the power 1 / temperature: 1 is by size,
large is uniform. What is saved is an ordinary adapter for every data set; each can be used, or start a prompt of its own
(PromptConfig.init), which is the second stage of the published recipe.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from ptv2_engine.adapter import DATA_SETS, POOLED, TENSORS, refill, replace_file
from ptv2_engine.batches import PackedCollator, TokenBalancedBatchSampler
from ptv2_engine.errors import AdapterError, ConfigError, InputError
from ptv2_engine.model import PromptedModel
from ptv2_engine.outputs import Scored, Targets, as_output
from ptv2_engine.packing import from_packed


class MultiTaskModel(nn.Module):
    """Several PromptedModels on one encoder with one prompt.

    members: data set's name -> PromptedModel. The prompt of the first becomes everybody's; the encoder must be one already.
    Raises ConfigError.
    """

    main_input_name = "input_ids"
    accepts_loss_kwargs = False
    is_outside = True                     # Trainer: no PromptedModel
    task = "multi-task"

    def __init__(self, members: Mapping[str, PromptedModel]) -> None:
        super().__init__()
        if not members:
            raise ConfigError("0 data sets were given; multi-task training needs one or more.")
        for name in members:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ConfigError(f"the data set's name {name!r} becomes a folder; use letters, digits, - and _.")
        first = next(iter(members.values()))
        for name, member in members.items():
            if member.encoder is not first.encoder:
                raise ConfigError(f"{name} has another encoder than {next(iter(members))}; build all members on one.")
            member.prompt = first.prompt
        self.encoder, self.prompt, self.prompt_config = first.encoder, first.prompt, first.prompt_config
        self.head = nn.ModuleDict({name: member.head for name, member in members.items()})
        self.members, self.config = dict(members), first.config         # a plain dict: what trains is registered above, once
        self.names = list(members)
        self.train(first.training)
        if first.encoder.trained_backbone and first.encoder.pooler is not None:
            first.encoder.train_backbone(first.encoder.trained_backbone)
            reads = any(m.task in POOLED and m.pooler_kind == "frozen" for m in members.values())
            if not reads:
                first.encoder.pooler.requires_grad_(False)

    @classmethod
    def from_first(cls, name: str, first: PromptedModel, others: Mapping[str, dict[str, Any]]) -> MultiTaskModel:
        """The first data set's model, and the others' tasks and options (task=, id2label=, ...) on its encoder."""
        prompt = replace(first.prompt_config, init="normal")
        shared: dict[str, Any] = {"shift_positions": first.shift_positions, "trained_backbone": first.encoder.trained_backbone}
        return cls({name: first} | {other: PromptedModel(first.encoder, first.origin, prompt, **shared | options)
                                    for other, options in others.items()})

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype

    def max_length(self) -> int:
        return self._first.max_length()

    @property
    def _first(self) -> PromptedModel:
        return self.members[self.names[0]]

    def set_backbone_dtype(self, dtype: torch.dtype) -> None:
        self._first.set_backbone_dtype(dtype)

    def set_hidden_dropout(self, p: float) -> None:
        for member in self.members.values():
            member.set_hidden_dropout(p)

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        self._first.gradient_checkpointing_enable()

    def print_trainable_parameters(self) -> str:
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        line = f"trained parameters: {trained:,} (one prompt, {len(self.names)} heads: {', '.join(self.names)})"
        print(line)
        return line

    def forward(self, input_ids: Tensor | None = None, *, data_set: int | None = None, parts: list[dict[str, Any]] | None = None,
                return_dict: bool = True, **inputs: Any) -> Any:
        """One data set's batch (data_set: its index, and what its PromptedModel.forward takes), or parts: such batches, packed,
        of different data sets, which go through the encoder together.

        Returns:
            The data set's output; of parts, (loss,) or an output with loss alone: the mean over all examples.
        """
        if parts is None:
            if data_set is None:
                raise InputError("the batch does not say which data set it is of; pass data_set, an index into names.")
            return self.members[self.names[data_set]](input_ids, return_dict=return_dict, **inputs)
        scored = [self._score(part, x_TH) for part, x_TH in zip(parts, self._hidden(parts), strict=True)]
        counts = [_examples(part) for part in parts]
        losses = [s.loss * n for s, n in zip(scored, counts, strict=True) if s.loss is not None]
        loss = torch.stack(losses).sum() / sum(counts) if losses else None
        return as_output("sequence-classification", Scored(loss, (loss if loss is not None else torch.zeros(()),)), return_dict)

    def _hidden(self, parts: list[dict[str, Any]]) -> list[Tensor]:
        """The last hidden states [T, H] of each part, computed as one packed batch."""
        ids, lengths = (torch.cat([part[key] for part in parts]) for key in ("input_ids", "seq_lengths"))
        types = None
        if any("token_type_ids" in part for part in parts):
            types = torch.cat([part.get("token_type_ids", torch.zeros_like(part["input_ids"])) for part in parts])
        batch = from_packed(ids, lengths, types, max_seqlen=max(part["max_seqlen"] for part in parts),
                            uncounted_id=self.encoder.config.uncounted_id)
        x_TH = self._first.hidden_states(batch)
        return list(x_TH.split([part["input_ids"].shape[0] for part in parts]))

    def _score(self, part: dict[str, Any], x_TH: Tensor) -> Scored:
        member = self.members[self.names[part["data_set"]]]
        if member.task == "cloze":
            raise InputError(f"{self.names[part['data_set']]} is a cloze task, which cannot share a packed batch with others; "
                             "train without mix.")
        batch = from_packed(part["input_ids"], part["seq_lengths"], max_seqlen=part["max_seqlen"])
        targets = Targets(*(part.get(name) for name in Targets._fields))
        return member.score_hidden(x_TH, batch, targets, choice_counts=part.get("choice_counts"),
                                   max_choices=part.get("max_choices"))

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """An adapter for each data set in a folder of its name, and the list of them. Raises OutputError."""
        folder = Path(folder)
        for name, member in self.members.items():
            member.save_pretrained(folder / name)
        replace_file(folder / DATA_SETS, json.dumps(self.names).encode())

    def load_adapter(self, folder: str | Path) -> None:
        """Prompt and heads of what save_pretrained wrote. Raises AdapterError."""
        folder = Path(folder)
        for name, member in self.members.items():
            if not (folder / name / TENSORS).is_file():
                raise AdapterError(f"{folder} holds no adapter of the data set {name}; it was saved with other data sets.")
            refill(member, folder / name)


def _examples(part: Mapping[str, Any]) -> int:
    return part.get("choice_counts", part["seq_lengths"]).shape[0]


class MultiTaskCollator:
    """Features with a "data_set" index -> one data set's packed batch with its index, or parts where they are mixed."""

    def __init__(self, collate: PackedCollator) -> None:
        self.collate = collate

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        found = sorted({f["data_set"] for f in features})
        made = [self.collate([f for f in features if f["data_set"] == d]) | {"data_set": d} for d in found]
        return made[0] if len(made) == 1 else {"parts": made}


class MultiTaskBatchSampler(Sampler[list[int]]):
    """Batches of batch_size examples of several data sets that lie one after the other.

    Arguments:
        lengths: tokens of each example. sizes: examples of each data set. temperature: a data set is drawn with probability
        proportional to size ** (1 / temperature). mix: every example of a batch draws its data set, instead of every batch.
    An epoch has as many batches as the data sets together; inside it a data set is shuffled anew whenever it is used up.
    """

    def __init__(self, lengths: Sequence[int], sizes: Sequence[int], batch_size: int, *, temperature: float = 1.0,
                 mix: bool = False, seed: int = 0) -> None:
        if temperature <= 0:
            raise ConfigError(f"temperature {temperature} is not above 0; use 1 for sampling by size, more to even sizes out.")
        self.sizes, self.batch_size, self.mix, self.seed, self.epoch = list(sizes), batch_size, mix, seed, 0
        self.weights = torch.tensor(self.sizes, dtype=torch.float64) ** (1 / temperature)
        self.starts = [sum(self.sizes[:d]) for d in range(len(self.sizes))]
        self.lengths = [list(lengths[a:a + n]) for a, n in zip(self.starts, self.sizes, strict=True)]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def sampler(self) -> MultiTaskBatchSampler:
        """Itself: where accelerate looks for set_epoch."""
        return self

    def __len__(self) -> int:
        return -(-sum(self.sizes) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        batches = [self._batches(d) for d in range(len(self.sizes))]
        examples = [itertools.chain.from_iterable(own) for own in batches]
        for _ in range(len(self)):
            drawn = torch.multinomial(self.weights, self.batch_size if self.mix else 1, replacement=True, generator=generator)
            if self.mix:
                yield [self.starts[d] + next(examples[d]) for d in drawn.sort().values.tolist()]
            else:
                yield [self.starts[int(drawn)] + i for i in next(batches[int(drawn)])]

    def _batches(self, d: int) -> Iterator[list[int]]:
        """One data set's token-balanced batches, again and again."""
        own = TokenBalancedBatchSampler(self.lengths[d], min(self.batch_size, self.sizes[d]), seed=self.seed + d, drop_last=True)
        again = 0
        while True:
            own.set_epoch(self.epoch * 1009 + again)
            yield from own
            again += 1
