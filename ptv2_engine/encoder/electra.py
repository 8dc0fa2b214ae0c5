"""ELECTRA discriminators: BERT with an optional projection behind the embeddings and no pooler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptv2_engine.encoder import bert
from ptv2_engine.encoder.config import EncoderConfig, read_common
from ptv2_engine.encoder.sources import Source

MODEL_TYPES = ("electra",)
PREFIXES = ("electra.",)
HEADS = ("discriminator_predictions.", "generator_predictions.", "generator_lm_head.", "classifier.", "qa_outputs.",
         "sequence_summary.")
BUFFERS = bert.BUFFERS
POOLER: dict[str, Source] = {}
names = bert.names


def read_config(config: Mapping[str, Any]) -> EncoderConfig:
    return read_common(config, "electra", position_offset=0, counts_pads=True, pooler_activation="gelu")
