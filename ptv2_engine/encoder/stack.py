"""The encoder: embeddings, the loop over layers, the pooler.

Where the graph starts: nothing below the lowest prompted layer requires grad, so those layers are plain inference, and in
that layer only the prefix gradient is computed. No flag says so; it follows from what requires grad.

The weights are frozen, and the kernels form no gradient for them. train_backbone asks for some (fine-tuning, BitFit), as
something to compare prompts with: every op then runs on its `reference` backend with autograd while gradients are recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ptv2_engine.encoder.config import EncoderConfig
from ptv2_engine.encoder.embeddings import Embeddings, insert_rows
from ptv2_engine.encoder.layer import MEMORY, SITES, EncoderLayer, Normed, Prefix, Step, frozen_linear_of
from ptv2_engine.encoder.streaming import HostBlocks, WeightStream
from ptv2_engine.errors import ConfigError, InputError
from ptv2_engine.ops import FrozenLinear, readable, use_backend
from ptv2_engine.packing import PackedBatch, from_packed

TRAINED = (None, "all", "bias")    # of the backbone: nothing, every weight (fine-tuning), every bias (BitFit, arXiv 2106.10199)


class Encoder(nn.Module):
    """A pretrained encoder on packed batches. Made by `Encoder.from_pretrained`; frozen until train_backbone is called."""

    layer_class: type[nn.Module] = EncoderLayer
    embeddings_class: type[Embeddings] = Embeddings

    def __init__(self, config: EncoderConfig, with_pooler: bool) -> None:
        super().__init__()
        self.config = config
        self.embeddings = self.embeddings_class(config)
        self.layers = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_layers))
        self.pooler: FrozenLinear | None = frozen_linear_of(config.hidden_size, config.hidden_size) if with_pooler else None
        self.hidden_dropout = config.hidden_dropout
        self.attention_dropout = config.attention_dropout
        self.memory = "exact"
        self.trained_backbone: str | None = None        # of TRAINED
        self.frozen_dtype: str | None = None            # how the layers' matrices are kept, if not in the compute dtype
        self.stream: WeightStream | None = None         # where the layers' matrices come from, if they are not here

    @classmethod
    def from_pretrained(cls, source: Any, *, dtype: torch.dtype | None = None,
                        device: str | torch.device = "cpu") -> Encoder:
        """Load a checkpoint: hub id, local folder, or a transformers model in memory. See weights.load_encoder."""
        from ptv2_engine.encoder.weights import load_encoder

        return load_encoder(source, dtype=dtype, device=device)[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.word.dtype

    @property
    def device(self) -> torch.device:
        return self.embeddings.word.device

    def num_parameters(self) -> int:
        """Weights of the backbone, wherever and however they are kept."""
        elsewhere = (m for m in self.modules() if isinstance(m, FrozenLinear) and m.weight is None)
        return sum(p.numel() for p in self.parameters()) + sum(m.out_features * m.in_features for m in elsewhere)

    def packed_bytes(self) -> int:
        """Bytes of weights packed for oneDNN, beside the plain ones."""
        return sum(m.packed_bytes() for m in self.modules() if isinstance(m, FrozenLinear))

    def tensors_held(self) -> Iterator[Tensor]:
        """Every tensor of the backbone that stays on the device from step to step, packed copies and codes too."""
        for module in self.modules():
            yield from (t.detach() for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
            if isinstance(module, FrozenLinear):
                yield from module.copies()
        if self.stream is not None:
            yield from (slot.block for slot in self.stream.slots)

    def tensors_on_host(self) -> Iterator[Tensor]:
        """The blocks of weights that are streamed from host memory."""
        if self.stream is not None and isinstance(self.stream.blocks, HostBlocks):
            yield from self.stream.blocks.blocks

    def set_memory(self, policy: str) -> None:
        """What layers keep for backward: "exact", "lean" or "minimal" (see layer.py). Raises ConfigError for other names."""
        if policy not in MEMORY:
            raise ConfigError(f"memory {policy!r} does not exist; choose one of {', '.join(MEMORY)}.")
        if policy == "lean" and self.config.ffn_size % 4:
            raise ConfigError(f"memory 'lean' packs four columns of the FFN into three bytes, but this model has "
                              f"{self.config.ffn_size}, no multiple of 4; use 'exact' or 'minimal'.")
        check_trained(self.trained_backbone, memory=policy)
        self.memory = policy

    def train_backbone(self, which: str | None) -> None:
        """Let the weights train: None of them, "all", or every "bias". What trains gets memory of its own: the values may be
        pages of the checkpoint's file, or a transformers model's.

        Raises ConfigError for weights that cannot train: codes, streamed, of a low precision, or none at all.
        """
        check_trained(which, self.memory, self.frozen_dtype, None if self.stream is None else "host", self.dtype)
        self.trained_backbone, found = which, False
        for name, parameter in [*self.named_parameters()]:
            trains = which is not None and (which == "all" or name.endswith("bias")) and not self.lacks(name)
            if trains and not parameter.requires_grad:
                path, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(path), leaf, nn.Parameter(parameter.detach().clone()))
            else:
                parameter.requires_grad_(trains)
            found |= trains
        if which is not None and not found:
            raise ConfigError(f"trained_backbone {which!r} (bitfit) trains biases, but this {self.config.family} has none; use "
                              "'all' (fine-tuning), or a prompt.")

    def lacks(self, name: str) -> bool:
        """Whether a parameter is none of the architecture's, but zeros that stand for what it leaves out."""
        return False

    def differentiable(self) -> AbstractContextManager[None]:
        """Around what reads the weights: the `reference` backend where their gradients are wanted."""
        return use_backend("reference") if self.trained_backbone is not None and torch.is_grad_enabled() else nullcontext()

    def finish_loading(self) -> None:
        """What a family computes once from its loaded, frozen weights; nothing where trained_backbone is set."""

    def drawn_seed(self) -> Tensor:
        """A seed of dropout masks, int64 [1] on the device, from torch's CPU generator: no wait for the device."""
        return torch.randint(2**62, (1,)).to(self.device, non_blocking=True)

    def num_sites(self) -> int:
        """The first Philox call site that the encoder leaves free: those of its layers, and of what stands around them."""
        return SITES * (len(self.layers) + 1)

    def _shift(self, batch: PackedBatch, length: int, prompt_lengths: Tensor | None) -> Tensor | int:
        if prompt_lengths is None or not length:
            return length
        ids = prompt_lengths.new_zeros(batch.num_sequences) if batch.prompt_ids is None else batch.prompt_ids
        return prompt_lengths[ids][batch.sequence_of_token()]

    def forward(self, batch: PackedBatch, prefix: Prefix | None = None, *, input_prompt_KPE: Tensor | None = None,
                prompt_lengths: Tensor | None = None, seed: Tensor | None = None, shift_positions: bool = True,
                first_tokens_only: bool = False, output_rows_R: Tensor | None = None) -> Tensor:
        """The last hidden states of a packed batch.

        Arguments:
            batch: T tokens of B sequences.
            prefix: keys and values for the prompted layers (P-Tuning v2).
            input_prompt_KPE: trainable input embeddings [K, P, E] in front of every sequence (prompt tuning, P-tuning);
                prompt_lengths int64 [K] says how many rows of each are used.
            seed: int64 tensor [1] on the device; drawn from torch's generator when a dropout is on and it is None.
            shift_positions: tokens take the positions behind the prompt, as published.
            output_rows_R: int64 [R], tokens whose states are wanted, [R, H] then. The last layer does everything behind its
                attention for R rows instead of T: 9/12 of a layer's products saved. The same numbers, but for dropout: the
                last layer's masks are those of R rows.
            first_tokens_only: the first token of each sequence, [B, H] (zeros for an empty one).
        Returns:
            x_TH [T, H]: rows of the tokens only.
        Raises:
            SequenceTooLong, InputError.
        """
        with self.differentiable():
            return self._forward(batch, prefix, input_prompt_KPE, prompt_lengths, seed, shift_positions, first_tokens_only,
                                 output_rows_R)

    def _forward(self, batch: PackedBatch, prefix: Prefix | None, input_prompt_KPE: Tensor | None, prompt_lengths: Tensor | None,
                 seed: Tensor | None, shift_positions: bool, first_tokens_only: bool, output_rows_R: Tensor | None) -> Tensor:
        length = prefix.length if prefix is not None else 0 if input_prompt_KPE is None else input_prompt_KPE.shape[1]
        lengths = prefix.prompt_lengths if prefix is not None else prompt_lengths
        shifts = self._shifts(shift_positions, input_prompt_KPE)
        self.config.check_length(batch.num_positions, length, shifts)
        if readable(batch.input_ids_T):
            self.embeddings.validate(batch)
            _check_prompts(batch, prefix, input_prompt_KPE, length, lengths)
        hidden, attention = (self.hidden_dropout, self.attention_dropout) if self.training else (0.0, 0.0)
        prefix_dropout = prefix.dropout_p if prefix is not None and self.training else 0.0
        if seed is None and max(hidden, attention, prefix_dropout) > 0:
            seed = self.drawn_seed()

        x_TH = self.embeddings(batch, self._shift(batch, length, lengths) if shifts else 0, hidden, seed,
                               SITES * len(self.layers))
        step = Step(batch.cu_seqlens, batch.max_seqlen, batch.prompt_ids, None if prefix is None else prefix.prompt_lengths,
                    prefix_dropout, hidden, attention, seed, memory=self.memory, trains=self.trained_backbone is not None)
        token_rows = None
        if input_prompt_KPE is not None:
            prompt_KPH = self.embeddings.prompt_rows(input_prompt_KPE.to(self.dtype))
            x_TH, cu_seqlens, token_rows, max_seqlen = insert_rows(
                x_TH, batch, prompt_KPH, prompt_lengths, 0.0 if self.embeddings.late_dropout else hidden, seed,
                SITES * len(self.layers) + 2)
            step = step._replace(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        if first_tokens_only and not batch.num_tokens:
            return x_TH.new_zeros(batch.num_sequences, self.config.hidden_size)
        if first_tokens_only:
            output_rows_R = batch.rows_at(0)
        rows = output_rows_R if output_rows_R is None or token_rows is None else token_rows[output_rows_R]
        x_TH = self.run_layers(x_TH, self.prepare(step, batch, x_TH.shape[0], token_rows), prefix,
                               token_rows if rows is None else rows)
        if first_tokens_only:
            return x_TH * (batch.lengths() > 0).to(x_TH.dtype)[:, None]
        return x_TH

    def _shifts(self, shift_positions: bool, input_prompt_KPE: Tensor | None) -> bool:
        """Whether a prompt moves the tokens' positions; rows at the input always stand in front of the tokens."""
        return shift_positions and self.config.shifts_positions or input_prompt_KPE is not None

    def prepare(self, step: Step, batch: PackedBatch, num_rows: int, token_rows_T: Tensor | None) -> Step:
        """What a family's layers share beside the sequences: made once a forward pass. step knows the inserted prompt rows."""
        return step

    def run_layers(self, x_TH: Tensor, step: Step, prefix: Prefix | None, rows_R: Tensor | None) -> Tensor:
        """Embeddings -> the last hidden states, all rows or rows_R."""
        x = Normed(x_TH)
        for i, layer in enumerate(self.layers):
            x = layer(x, step, *of_layer(prefix, i), rows_R if i == len(self.layers) - 1 else None)
        return x.x_TH

    @torch.no_grad()
    def keys_values(self, ids_P: Tensor) -> Tensor:
        """fp32 [L, 2, P, H]: the keys and values of one sequence of tokens in every layer, without dropout."""
        batch = from_packed(ids_P, torch.tensor([ids_P.shape[0]], device=ids_P.device), uncounted_id=self.config.uncounted_id)
        record: list[Tensor] = []
        step = Step(batch.cu_seqlens, batch.max_seqlen, None, None, 0.0, 0.0, 0.0, None, record=record)
        x_TH = self.embeddings(batch, 0, 0.0, None, 0)
        self.run_layers(x_TH, self.prepare(step, batch, x_TH.shape[0], None), None, None)
        return torch.stack([qkv_T3ND[:, 1:].float().flatten(2).transpose(0, 1) for qkv_T3ND in record])

    def pool(self, first_BH: Tensor) -> Tensor:
        """The pretrained pooler: tanh(x W + b)."""
        assert self.pooler is not None, "this checkpoint has no pooler"
        with self.differentiable():
            return torch.tanh(self.pooler(first_BH))


def check_trained(which: str | None, memory: str = "exact", frozen_dtype: str | None = None, stream_weights: str | None = None,
                  dtype: torch.dtype = torch.float32) -> None:
    """Raises ConfigError for a trained_backbone that does not exist, or that other options exclude."""
    if which not in TRAINED:
        raise ConfigError(f"trained_backbone {which!r} does not exist; choose None, 'all' (fine-tuning) or 'bias' (bitfit).")
    if which is None:
        return
    for excluded, option, why in (
            (frozen_dtype is not None, f"frozen_dtype {frozen_dtype!r}", "codes cannot be updated; leave it out"),
            (stream_weights is not None, f"stream_weights {stream_weights!r}", "nothing is written back; leave it out"),
            (memory == "lean", "memory 'lean'", "it keeps too little for the weights' gradients; use 'exact' or 'minimal'"),
            (dtype not in (torch.float32, torch.float64), f"dtype {dtype}",
             "it swallows small updates; use dtype=torch.float32 (--dtype float32)")):
        if excluded:
            raise ConfigError(f"trained_backbone {which!r} (fine-tuning, bitfit) does not go with {option}: {why}.")


def of_layer(prefix: Prefix | None, i: int) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if prefix is None else (prefix.k[i], prefix.v[i])


def _check_prompts(batch: PackedBatch, prefix: Prefix | None, input_prompt_KPE: Tensor | None, length: int,
                   prompt_lengths: Tensor | None) -> None:
    """Raises InputError for prompt ids or lengths outside the bank. Reads them, so the stack calls it on the CPU only."""
    bank = input_prompt_KPE if prefix is None else next((k for k in prefix.k if k is not None), None)
    if bank is None:
        return
    for name, values, limit, way in (
            ("prompt id", batch.prompt_ids, bank.shape[0], f"the bank holds {bank.shape[0]} prompts, numbered from 0"),
            ("prompt length", prompt_lengths, length + 1, f"the bank holds {length} rows a prompt")):
        if values is not None and values.numel() and not 0 <= int(values.min()) <= int(values.max()) < limit:
            wrong = int(values.min()) if int(values.min()) < 0 else int(values.max())
            raise InputError(f"{name} {wrong} is outside 0..{limit - 1}; {way}.")
