"""Model shapes and ragged batches that the op benchmarks share, and the peers they are compared with."""

from __future__ import annotations

import json
from pathlib import Path

import torch

SHAPES = {"minilm": (384, 12), "bert-base": (768, 12), "bert-large": (1024, 16)}      # hidden, heads
FFN = 4
LENGTHS = json.loads((Path(__file__).parent / "lengths.json").read_text())


def lengths_of(kind: str, batch: int = 32) -> list[int]:
    """mrpc, rte: real; an integer: that length for every sequence."""
    return LENGTHS[kind][:batch] if kind in LENGTHS else [int(kind)] * batch


def dtypes_for(device: str) -> list[torch.dtype]:
    return [torch.float32, torch.bfloat16] if device == "cpu" else [torch.bfloat16]


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
