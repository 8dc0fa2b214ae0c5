"""The five ops of the engine, and which implementation of each runs. Reading order: prefix_attention, then the others."""

from __future__ import annotations

import torch

from ptv2_engine.ops._dispatch import BACKENDS, Choice, choose, use_backend
from ptv2_engine.ops.add_norm import add_norm
from ptv2_engine.ops.embedding import embedding
from ptv2_engine.ops.frozen_linear import FrozenLinear, can_pack, frozen_linear
from ptv2_engine.ops.linear_gelu import linear_gelu
from ptv2_engine.ops.prefix_attention import _extra_reasons, prefix_attention, prefix_attention_qkv

OPS = ("embedding", "frozen_linear", "prefix_attention", "add_norm", "linear_gelu")


def backend_for(op: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, head_dim: int = 64) -> Choice:
    """The backend that `op` would run on tensors of this device and dtype, with the reasons against the ones before it."""
    return choose(op, torch.device(device), dtype, _extra_reasons(head_dim) if op == "prefix_attention" else None)


__all__ = ["BACKENDS", "OPS", "Choice", "FrozenLinear", "add_norm", "backend_for", "can_pack", "embedding", "frozen_linear",
           "linear_gelu", "prefix_attention", "prefix_attention_qkv", "use_backend"]
