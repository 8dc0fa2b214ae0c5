"""prefix_attention: forward, backward alone and both, against everything a user could assemble (attention_peers.py).

Bytes are the least that must move: forward reads q, k, v and writes the output; backward reads q, k, v, dO and writes dq, dk, dv
(kernels that also save or read the output or fp32 accumulators move more). Flops are the products of real tokens.
"""

from __future__ import annotations

import functools

import pytest

from benchmarks.attention_peers import (
    PASSES,
    Attention,
    flash_attn_gathered,
    flex_packed,
    ours,
    ours_in_cuda,
    sdpa_padded,
    varlen_gathered,
)
from benchmarks.contest import contest
from benchmarks.shapes import DIRECTIONS, SHAPES, TOKENS, lengths_of, on_cpu_and_gpu, short
from ptv2_engine import ops

FORWARDS = {"forward": 1.0, "backward": 2.5, "both": 3.5}
PEERS = {"ptv2, CUDA C++": ours_in_cuda, "SDPA cat, padded": sdpa_padded, "varlen_attn gathered": varlen_gathered,
         "flash-attn gathered": flash_attn_gathered}

# model, lengths, P, where ("full": only in --grid full)
GRID = [("BERT-base", "mrpc", 20, "cpu gpu"), ("BERT-base", "rte", 20, "cpu gpu"), ("BERT-base", "128", 20, "cpu"),
        *(("BERT-large", S, 16, "gpu") for S in ("64", "128", "256", "512")),
        ("BERT-large", "rte", 16, "gpu"), ("BERT-large", "squad", 128, "gpu"), ("BERT-large", "128", 200, "gpu"),
        ("MiniLM", "rte", 16, "gpu"), ("GLM-10B", "256", 16, "gpu"),
        *((model, S, P, "full") for model in SHAPES for S in ("32", "64", "128", "256", "512", "1024", "2048")
          for P in (0, 16, 100, 200)),
        *((model, kind, 20, "full") for model in SHAPES for kind in ("mrpc", "mnli", "squad"))]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("model, kind, P, device, dtype", on_cpu_and_gpu(*GRID))
def test_prefix_attention(compare, request, model, kind, P, device, dtype, direction):
    hidden, heads, _ = SHAPES[model]
    lengths = lengths_of(kind, tokens=TOKENS[device])
    case = Attention(lengths, P, heads, hidden // heads, dtype, device)
    builders = {"ptv2": ours} | {name: build for name, build in PEERS.items() if device == "cuda" or name.startswith("SDPA")}
    full_grid, headline = request.config.getoption("--grid") == "full", (model, kind, P) == ("BERT-large", "128", 16)
    if device == "cuda" and (full_grid or model == "BERT-large"):      # each compiles for seconds, and tunes for a minute
        if not full_grid:
            builders["FlexAttention packed, default tiles"] = flex_packed
        if full_grid or headline:
            builders["FlexAttention packed, autotuned"] = functools.partial(flex_packed, autotune=True)
    contest(compare, f"prefix_attention {direction}  {model} {kind} P={P} {short(dtype)}",
            {name: functools.partial(build, case) for name, build in builders.items()}, direction, device, case.bytes_of_set,
            op="prefix_attention", model=model, lengths=kind, prompt_length=P, tokens=case.T, dtype=short(dtype),
            backend=ops.backend_for("prefix_attention", device, dtype, hidden // heads).backend,
            bytes=PASSES[direction] * case.T * hidden * dtype.itemsize,
            flops=4 * FORWARDS[direction] * hidden * sum(n * (n + P) for n in lengths))
