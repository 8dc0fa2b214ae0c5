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
from benchmarks.contest import contest, left_out
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
        *((model, kind, P, "full") for model in SHAPES for kind in ("mrpc", "rte", "mnli", "squad", "ragged")
          for P in (0, 20, 200) if (model, kind, P) not in (("BERT-base", "mrpc", 20), ("BERT-base", "rte", 20)))]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("model, kind, P, device, dtype", on_cpu_and_gpu(*GRID))
def test_prefix_attention(compare, request, model, kind, P, device, dtype, direction):
    full_grid, flex = request.config.getoption("--grid") == "full", {}
    if device == "cuda":                                       # each compiles for seconds, and tunes for a minute
        in_short = (model, kind) in (("BERT-large", "128"), ("BERT-large", "rte"))
        flex = {"FlexAttention packed, autotuned": functools.partial(flex_packed, autotune=True)} if full_grid else {
            "FlexAttention packed, default tiles": flex_packed if in_short else None}
        flex["SDPA cat, padded, torch.compile"] = functools.partial(sdpa_padded, compiled=True) if full_grid else None
    attention_contest(compare, model, kind, P, device, dtype, direction, flex)


def attention_contest(compare, model, kind, P, device, dtype, direction, more, name="") -> None:
    """more: peers beside those that are always there, None for one that is left out. name: behind the case's."""
    hidden, heads, _ = SHAPES[model]
    lengths = lengths_of(kind, tokens=TOKENS[device])
    case = Attention(lengths, P, heads, hidden // heads, dtype, device)
    builders = {"ptv2": ours} | {peer: build for peer, build in PEERS.items() if device == "cuda" or peer.startswith("SDPA")}
    contest(compare, f"prefix_attention {direction}  {model} {kind} P={P} {short(dtype)}{name}",
            {peer: left_out if build is None else functools.partial(build, case) for peer, build in (builders | more).items()},
            direction, device, case.bytes_of_set,
            op="prefix_attention", model=model, lengths=kind, prompt_length=P, tokens=case.T, dtype=short(dtype),
            backend=ops.backend_for("prefix_attention", device, dtype, hidden // heads).backend,
            bytes=PASSES[direction] * case.T * hidden * dtype.itemsize,
            flops=4 * FORWARDS[direction] * hidden * sum(n * (n + P) for n in lengths))
