"""The ops of the engine, and which implementation of each runs. Reading order: prefix_attention, then the others."""

from __future__ import annotations

import torch

from ptv2_engine.ops._dispatch import BACKENDS, Choice, choose, device_type, planned_for, readable, use_backend
from ptv2_engine.ops.add_norm import Kept, add_norm, add_norm_kept, add_norm_sum
from ptv2_engine.ops.disentangled_attention import disentangled_attention
from ptv2_engine.ops.dropout import dropout
from ptv2_engine.ops.embedding import embedding
from ptv2_engine.ops.frozen_linear import FrozenLinear, can_pack, frozen_linear
from ptv2_engine.ops.linear_geglu import linear_geglu
from ptv2_engine.ops.linear_gelu import linear_gelu
from ptv2_engine.ops.lm_head import vocabulary_log_prob
from ptv2_engine.ops.prefix_attention import extra_reasons, key_ranges, prefix_attention, prefix_attention_qkv
from ptv2_engine.ops.quantised import KINDS, Quantised, dequantise, quantise
from ptv2_engine.ops.rotary import cos_sin_table, rotary

OPS = ("embedding", "frozen_linear", "prefix_attention", "disentangled_attention", "rotary", "add_norm", "linear_gelu",
       "linear_geglu", "dropout", "dequantise")


def backend_for(op: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, head_dim: int = 64) -> Choice:
    """The backend that `op` would run on tensors of this device and dtype, with the reasons against the ones before it."""
    return choose(op, torch.device(device), dtype, extra_reasons(head_dim) if op.endswith("attention") else None)


__all__ = ["BACKENDS", "KINDS", "OPS", "Choice", "FrozenLinear", "Kept", "Quantised", "add_norm", "add_norm_kept", "add_norm_sum",
           "backend_for", "can_pack", "cos_sin_table", "dequantise", "device_type", "disentangled_attention", "dropout",
           "embedding", "frozen_linear", "key_ranges", "linear_geglu", "linear_gelu", "planned_for", "prefix_attention",
           "prefix_attention_qkv", "quantise", "readable", "rotary", "use_backend", "vocabulary_log_prob"]
