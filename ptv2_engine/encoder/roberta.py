"""RoBERTa, XLM-RoBERTa, CamemBERT: BERT's tensors under another prefix, positions that start behind the padding id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptv2_engine.encoder import bert
from ptv2_engine.encoder.config import EncoderConfig, read_common

MODEL_TYPES = ("roberta", "xlm-roberta", "camembert")
PREFIXES = ("roberta.",)
HEADS = ("lm_head.", "classifier.", "qa_outputs.")
BUFFERS = bert.BUFFERS
POOLER = bert.POOLER
names = bert.names


def read_config(config: Mapping[str, Any]) -> EncoderConfig:
    pad = 1 if config.get("pad_token_id") is None else config["pad_token_id"]
    return read_common({**config, "pad_token_id": pad}, config.get("model_type", "roberta"), position_offset=pad + 1,
                       counts_pads=False)
