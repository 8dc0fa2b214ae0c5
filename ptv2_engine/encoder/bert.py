"""BERT and its kin (MiniLM): config.json and the names of the checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptv2_engine.encoder.config import EncoderConfig, read_common

MODEL_TYPES = ("bert",)
PREFIXES = ("bert.",)
HEADS = ("cls.", "classifier.", "qa_outputs.")
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


def read_config(config: Mapping[str, Any]) -> EncoderConfig:
    return read_common(config, "bert", position_offset=0, counts_pads=True)


def names(config: EncoderConfig) -> dict[str, tuple[str, ...]]:
    """Our tensor's name -> the checkpoint's tensors that make it; several are concatenated along dim 0."""
    table: dict[str, tuple[str, ...]] = {
        "embeddings.word": ("embeddings.word_embeddings.weight",),
        "embeddings.position": ("embeddings.position_embeddings.weight",),
        "embeddings.token_type": ("embeddings.token_type_embeddings.weight",),
        "embeddings.norm_weight": ("embeddings.LayerNorm.weight",),
        "embeddings.norm_bias": ("embeddings.LayerNorm.bias",),
    }
    if config.embedding_size != config.hidden_size:
        table |= {f"embeddings.project.{w}": (f"embeddings_project.{w}",) for w in ("weight", "bias")}
    for i in range(config.num_layers):
        theirs = f"encoder.layer.{i}"
        for w in ("weight", "bias"):
            table |= {
                f"layers.{i}.qkv.{w}": tuple(f"{theirs}.attention.self.{x}.{w}" for x in ("query", "key", "value")),
                f"layers.{i}.attn_out.{w}": (f"{theirs}.attention.output.dense.{w}",),
                f"layers.{i}.attn_norm_{w}": (f"{theirs}.attention.output.LayerNorm.{w}",),
                f"layers.{i}.ffn_up.{w}": (f"{theirs}.intermediate.dense.{w}",),
                f"layers.{i}.ffn_down.{w}": (f"{theirs}.output.dense.{w}",),
                f"layers.{i}.ffn_norm_{w}": (f"{theirs}.output.LayerNorm.{w}",),
            }
    return table


POOLER = {f"pooler.{w}": (f"pooler.dense.{w}",) for w in ("weight", "bias")}
