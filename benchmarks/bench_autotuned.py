"""prefix_attention beside FlexAttention with tuned tiles, the strongest peer, in the headline case. Tuning takes a minute."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.attention_peers import flex_packed
from benchmarks.bench_prefix_attention import attention_contest


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["both", "forward"])
def test_beside_autotuned(compare, direction):
    tuned = {"FlexAttention packed, autotuned": functools.partial(flex_packed, autotune=True)}
    attention_contest(compare, "BERT-large", "128", 16, "cuda", torch.bfloat16, direction, tuned, "  beside tuned tiles")
