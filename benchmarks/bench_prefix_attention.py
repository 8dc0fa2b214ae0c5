"""prefix_attention: forward, backward alone and both, against everything a user could assemble (attention_peers.py).

Bytes are the least that must move: forward reads q, k, v and writes the output; backward reads q, k, v, dO and writes dq, dk, dv
(kernels that also save or read the output or fp32 accumulators move more). Flops are the products of real tokens.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.attention_peers import (
    Attention,
    InputSet,
    check,
    flash_attn_gathered,
    flex_packed,
    ours,
    sdpa_padded,
    varlen_gathered,
)
from benchmarks.measure import attempt, input_sets, stream_for
from benchmarks.shapes import SHAPES, full, lengths_of, on_cpu_and_gpu, short
from ptv2_engine import ops

PASSES = {"forward": (4, 1.0), "backward": (7, 2.5), "both": (11, 3.5)}        # H-wide rows moved a token, flops in forwards
PEERS = {"SDPA cat, padded": sdpa_padded, "varlen_attn gathered": varlen_gathered, "flash-attn gathered": flash_attn_gathered}
TOKENS = {"cpu": 2048, "cuda": 16384}

# model, lengths, P, where ("full": only in --grid full)
GRID = [("BERT-base", "mrpc", 20, "cpu gpu"), ("BERT-base", "rte", 20, "cpu gpu"), ("BERT-base", "128", 20, "cpu"),
        *(("BERT-large", S, 16, "gpu") for S in ("64", "128", "256", "512")),
        ("BERT-large", "rte", 16, "gpu"), ("BERT-large", "squad", 128, "gpu"), ("BERT-large", "128", 200, "gpu"),
        ("MiniLM", "rte", 16, "gpu"), ("GLM-10B", "256", 16, "gpu"),
        *((model, S, P, "full") for model in SHAPES for S in ("32", "64", "128", "256", "512", "1024", "2048")
          for P in (0, 16, 100, 200)),
        *((model, kind, 20, "full") for model in SHAPES for kind in ("mrpc", "mnli", "squad"))]


def prepared(build, case: Attention, sets: int, direction: str, truth: InputSet | None, name: str, **options) -> list:
    """The calls of a contestant, one an input set; a peer is compared with ours first."""
    with stream_for(case.device):
        made = [build(case, seed, **options) for seed in range(sets)]
        if truth is not None:
            check(name, made[0], truth, direction != "forward")
        if direction == "forward":
            return [torch.no_grad()(s.call) for s in made]
        if direction == "both":
            return [s.both for s in made]
        outs = [s.call() for s in made]
        return [functools.partial(torch.autograd.grad, out, s.leaves, s.dout, retain_graph=True)
                for s, out in zip(made, outs, strict=True)]


@pytest.mark.parametrize("direction", ["forward", pytest.param("backward", marks=full), "both"])
@pytest.mark.parametrize("model, kind, P, device, dtype", on_cpu_and_gpu(*GRID))
def test_prefix_attention(compare, request, model, kind, P, device, dtype, direction):
    hidden, heads, _ = SHAPES[model]
    lengths = lengths_of(kind, tokens=TOKENS[device])
    case = Attention(lengths, P, heads, hidden // heads, dtype, device)
    sets = input_sets(case.bytes_of_set, device)
    truth = ours(case, 0)
    peer = lambda name, build, **options: functools.partial(prepared, build, case, sets, direction, truth, name, **options)
    wanted = {name: peer(name, build) for name, build in PEERS.items() if device == "cuda" or name.startswith("SDPA")}
    full_grid, headline = request.config.getoption("--grid") == "full", (model, kind, P) == ("BERT-large", "128", 16)
    if device == "cuda" and (full_grid or model == "BERT-large"):      # each compiles for seconds, and tunes for a minute
        if not full_grid:
            wanted["FlexAttention packed, default tiles"] = peer("FlexAttention", flex_packed)
        if full_grid or headline:
            wanted["FlexAttention packed, autotuned"] = peer("FlexAttention", flex_packed, autotune=True)
    peers, skipped = attempt(wanted)
    rows, forwards = PASSES[direction]
    compare(f"prefix_attention {direction}  {model} {kind} P={P} {short(dtype)}",
            {"ptv2": prepared(ours, case, sets, direction, None, "ptv2")} | peers,
            rounds=40 if device == "cuda" else 8, device=device, capture=True, skipped=skipped, op="prefix_attention",
            model=model, lengths=kind, prompt_length=P, tokens=case.T, dtype=short(dtype), **{"pass": direction},
            backend=ops.backend_for("prefix_attention", device, dtype, hidden // heads).backend, input_sets=sets,
            bytes=rows * case.T * hidden * dtype.itemsize,
            flops=4 * forwards * hidden * sum(n * (n + P) for n in lengths))
