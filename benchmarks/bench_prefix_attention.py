"""prefix_attention, forward and forward + backward, against SDPA on keys that the prefix was concatenated to, padded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.shapes import SHAPES, lengths_of, short
from ptv2_engine import ops
from ptv2_engine.testing import assert_error_within, cu_seqlens_of, random_prefix, random_qkv

PROMPT = 20


def padded(x_TND, lengths):
    B, S = len(lengths), max(lengths)
    out = x_TND.new_zeros(B, S, *x_TND.shape[1:])
    out[torch.arange(S)[None] < torch.tensor(lengths)[:, None]] = x_TND
    return out.transpose(1, 2)


def cases(lengths, shape, dtype, device):
    hidden, heads = SHAPES[shape]
    qkv = random_qkv(lengths, heads, hidden // heads, dtype, device=device).requires_grad_()
    pk, pv = (p.requires_grad_() for p in random_prefix(1, PROMPT, heads, hidden // heads, dtype, device=device))
    cu = cu_seqlens_of(lengths, device)
    dout = torch.randn(qkv.shape[0], heads, hidden // heads, device=device).to(dtype)
    q, k, v = (padded(x.detach().cpu(), lengths).to(device).requires_grad_() for x in qkv.unbind(1))
    dout_padded = padded(dout.cpu(), lengths).to(device)
    B, S = len(lengths), max(lengths)
    mask = (torch.arange(PROMPT + S)[None] < torch.tensor(lengths)[:, None] + PROMPT)[:, None, None].to(device)

    def ours():
        return ops.prefix_attention_qkv(qkv, pk, pv, cu, S)

    def sdpa():
        keys, values = (torch.cat((p[0].transpose(0, 1).expand(B, -1, -1, -1), x), 2) for p, x in ((pk, k), (pv, v)))
        return F.scaled_dot_product_attention(q, keys, values, mask)

    exact = ops.prefix_attention
    with torch.no_grad(), ops.use_backend("reference"):
        truth = exact(*qkv.double().unbind(1), pk.double(), pv.double(), cu, S)
        stock = exact(*qkv.unbind(1), pk, pv, cu, S)
    assert_error_within("ours", ours(), truth, stock)
    return {"forward": {"ptv2": torch.no_grad()(ours), "SDPA cat padded": torch.no_grad()(sdpa)},
            "forward+backward": {"ptv2": lambda: ours().backward(dout), "SDPA cat padded": lambda: sdpa().backward(dout_padded)}}


def run(compare, kind, shape, dtype, device):
    lengths = lengths_of(kind)
    hidden, _ = SHAPES[shape]
    for direction, functions in cases(lengths, shape, dtype, device).items():
        passes = 4 if direction == "forward" else 11
        flops = 4 * sum(n * (n + PROMPT) for n in lengths) * hidden * (1 if direction == "forward" else 3.5)
        yield f"prefix_attention {direction}  {shape} {kind} P={PROMPT} {short(dtype)}", functions, {
            "bytes": passes * sum(lengths) * hidden * dtype.itemsize, "flops": flops}


@pytest.mark.parametrize("direction", [0, 1], ids=["forward", "both"])
@pytest.mark.parametrize("kind", ["mrpc", "rte", "128"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_cpu(compare, dtype, kind, direction):
    case, functions, facts = list(run(compare, kind, "bert-base", dtype, "cpu"))[direction]
    compare(case, functions, rounds=10, **facts)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", [0, 1], ids=["forward", "both"])
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("kind", ["mrpc", "rte", "128", "512"])
def test_gpu(compare, kind, shape, direction):
    case, functions, facts = list(run(compare, kind, shape, torch.bfloat16, "cuda"))[direction]
    compare(case, functions, rounds=50, warmup=10, **facts)
