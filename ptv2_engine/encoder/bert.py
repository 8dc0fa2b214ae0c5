"""BERT and its kin (MiniLM): config.json and the names of the checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptv2_engine.encoder.config import EncoderConfig, read_common
from ptv2_engine.encoder.sources import Source, concatenated, one

MODEL_TYPES = ("bert",)
PREFIXES = ("bert.",)
HEADS = ("cls.", "classifier.", "qa_outputs.")
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


def read_config(config: Mapping[str, Any]) -> EncoderConfig:
    return read_common(config, "bert", position_offset=0, counts_pads=True)


def names(config: EncoderConfig) -> dict[str, Source]:
    """Our tensor's name -> the checkpoint's tensors that make it."""
    table = embedding_names()
    if config.embedding_size != config.hidden_size:
        table |= {f"embeddings.project.{w}": one(f"embeddings_project.{w}") for w in ("weight", "bias")}
    for i in range(config.num_layers):
        theirs = f"encoder.layer.{i}"
        table |= block_names(i, theirs)
        for w in ("weight", "bias"):
            table[f"layers.{i}.qkv.{w}"] = concatenated(*(f"{theirs}.attention.self.{x}.{w}" for x in ("query", "key", "value")))
    return table


def embedding_names() -> dict[str, Source]:
    """Word, position and type tables and their LayerNorm."""
    return {
        "embeddings.word": one("embeddings.word_embeddings.weight"),
        "embeddings.position": one("embeddings.position_embeddings.weight"),
        "embeddings.token_type": one("embeddings.token_type_embeddings.weight"),
        "embeddings.norm_weight": one("embeddings.LayerNorm.weight"),
        "embeddings.norm_bias": one("embeddings.LayerNorm.bias"),
    }


def block_names(i: int, theirs: str) -> dict[str, Source]:
    """Layer i without its q, k, v projection: the same names in BERT, RoBERTa, ELECTRA and DeBERTa."""
    table: dict[str, Source] = {}
    for w in ("weight", "bias"):
        table |= {
            f"layers.{i}.attn_out.{w}": one(f"{theirs}.attention.output.dense.{w}"),
            f"layers.{i}.attn_norm_{w}": one(f"{theirs}.attention.output.LayerNorm.{w}"),
            f"layers.{i}.ffn_up.{w}": one(f"{theirs}.intermediate.dense.{w}"),
            f"layers.{i}.ffn_down.{w}": one(f"{theirs}.output.dense.{w}"),
            f"layers.{i}.ffn_norm_{w}": one(f"{theirs}.output.LayerNorm.{w}"),
        }
    return table


POOLER = {f"pooler.{w}": one(f"pooler.dense.{w}") for w in ("weight", "bias")}
