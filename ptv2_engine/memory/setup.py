"""What is planned and measured: a training step, described by its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ptv2_engine.encoder import EncoderConfig
from ptv2_engine.encoder.checkpoints import model_config
from ptv2_engine.encoder.layer import MEMORY
from ptv2_engine.encoder.weights import check_placement, empty_encoder
from ptv2_engine.errors import ConfigError
from ptv2_engine.ops._dispatch import triton_unavailable
from ptv2_engine.ops.prefix_attention import TRITON_HEAD_DIMS
from ptv2_engine.prompt import PromptConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Setup:
    """A training step.

    model: hub id, folder, published GLM name, or a config dictionary. task, num_labels: of the head. seq_len: real tokens of each
    of batch_size sequences; lengths: of sequences that differ, in place of both. memory, frozen_dtype, stream_weights, pooler,
    shift_positions: PromptedModel.from_pretrained's. accumulates: gradients of earlier micro-batches are there already. device:
    "cuda" or "cpu", whether this machine has one or not. cuda_graphs: the graphs of such steps are held too (graphed.py).
    """

    model: str | Path | Mapping[str, Any]
    batch_size: int = 16
    seq_len: int = 512
    prompt: PromptConfig = field(default_factory=PromptConfig)
    task: str = "sequence-classification"
    num_labels: int = 2
    memory: str = "exact"
    dtype: str = "bfloat16"
    frozen_dtype: str | None = None
    stream_weights: str | None = None
    device: str = "cuda"
    lengths: tuple[int, ...] | None = None
    pooler: str = "auto"
    shift_positions: bool = True
    accumulates: bool = False
    cuda_graphs: bool = False

    def config(self) -> dict[str, Any]:
        """The model's config dictionary."""
        return dict(self.model) if isinstance(self.model, Mapping) else model_config(self.model)

    def sequences(self) -> list[int]:
        """Tokens of each sequence."""
        return [self.seq_len] * self.batch_size if self.lengths is None else list(self.lengths)

    def longest(self) -> int:
        """The longest sequence that the positions hold beside the prompt; a million where any length goes."""
        config = empty_encoder(self.config()).config
        return config.max_length(*self._positions(config)) if config.absolute_positions else 1_000_000

    def _positions(self, config: EncoderConfig) -> tuple[int, bool]:
        """The prompt's length, and whether it takes positions."""
        method = self.prompt.method
        return (0 if method == "none" else self.prompt.prompt_length,
                config.shifts_positions and self.shift_positions and method == "deep" or method == "shallow")

    def check(self) -> None:
        """Raises ConfigError or SequenceTooLong for a step that cannot be run."""
        for name, value, known in (("memory", self.memory, MEMORY), ("dtype", self.dtype, tuple(DTYPES)),
                                   ("device", self.device, ("cuda", "cpu"))):
            if value not in known:
                raise ConfigError(f"{name} {value!r} does not exist; choose one of {', '.join(known)}.")
        check_placement(self.frozen_dtype, self.stream_weights)
        sequences = self.batch_size if self.lengths is None else len(self.lengths)
        for name, number in (("batch size", sequences), ("sequence length", min(self.sequences(), default=1))):
            if number < 1:
                raise ConfigError(f"{name} {number} is below 1; use 1 or more.")
        config = empty_encoder(self.config()).config
        if self.device == "cuda" and config.head_dim not in TRITON_HEAD_DIMS:
            sizes = ", ".join(map(str, TRITON_HEAD_DIMS))
            raise ConfigError(f"heads of {config.head_dim} have no kernel on a GPU (there are {sizes}) and run in plain PyTorch, "
                              "which is not planned; choose another size, or --device cpu.")
        if self.device == "cuda" and (missing := triton_unavailable()):
            raise ConfigError(f"a plan for a GPU runs the launchers of its kernels, but {missing}; pip install "
                              "'ptv2_engine[gpu]', or plan for --device cpu.")
        config.check_length(max(self.sequences()), *self._positions(config))
        self.prompt.layers(config.num_layers)


def title_of(setup: Setup) -> str:
    """P-Tuning v2, exact, bfloat16, int8 weights, streamed"""
    method = {"deep": "P-Tuning v2", "shallow": "prompt tuning", "none": "head only"}[setup.prompt.method]
    more = [f"{setup.frozen_dtype} weights"] if setup.frozen_dtype else []
    return ", ".join([method, setup.memory, setup.dtype, *more, *(["streamed"] if setup.stream_weights else [])])


def options_of(setup: Setup, base: Setup) -> str:
    """The flags by which a setup differs from another."""
    flags = [("--memory", setup.memory, base.memory), ("--frozen_dtype", setup.frozen_dtype, base.frozen_dtype),
             ("--stream_weights", setup.stream_weights, base.stream_weights), ("--batch_size", setup.batch_size, base.batch_size)]
    return " ".join(f"{flag} {new}" for flag, new, old in flags if new != old)
