"""disentangled_attention, forward and forward + backward, against what DeBERTa users have.

Peers: the stock design in plain PyTorch (both relative score matrices [.., S, R] written out, then gathered; padded, prefix
concatenated), and on a GPU, where their wheels are installed, flashdeberta's packed kernel and disentangled-flash's packed
training attention. The last two have no prefix, so they are compared without one; disentangled-flash brings its own q, k, v
projection, so ours runs with its projection there.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.shapes import full, lengths_of, short
from ptv2_engine import ops
from ptv2_engine.ops.disentangled_attention import slots_of
from ptv2_engine.testing import assert_error_within, cu_seqlens_of, random_prefix, random_qkv

PROMPT, HEADS, HEAD_DIM, SPAN = 20, 12, 64, 256      # DeBERTa-v3-base: 256 log buckets over 512 positions
SCALE = (3 * HEAD_DIM) ** -0.5


def padded(x_TND: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """[B, N, S, D]"""
    B, S = len(lengths), max(lengths)
    out = x_TND.new_zeros(B, S, *x_TND.shape[1:])
    out[torch.arange(S)[None] < torch.tensor(lengths)[:, None]] = x_TND
    return out.transpose(1, 2)


class Case:
    """One batch: qkv, prefix (or None), relative tables, and the padded copies that the stock design needs."""

    def __init__(self, kind: str, dtype: torch.dtype, device: str, prompt_length: int) -> None:
        self.lengths = lengths_of(kind)
        self.S, self.device = max(self.lengths), device
        self.qkv = random_qkv(self.lengths, HEADS, HEAD_DIM, dtype, device=device).requires_grad_()
        made = random_prefix(1, prompt_length, HEADS, HEAD_DIM, dtype, device=device) if prompt_length else (None, None)
        self.prefix = [None if p is None else p.requires_grad_() for p in made]
        self.rel_k, self.rel_q = (torch.randn(2 * SPAN, HEADS, HEAD_DIM, device=device).to(dtype) for _ in range(2))
        self.slots = slots_of(1 << (self.S - 1).bit_length(), SPAN, SPAN, 512, torch.device(device))
        self.cu = cu_seqlens_of(self.lengths, device)
        self.dout = torch.randn(self.qkv.shape[0], HEADS, HEAD_DIM, device=device).to(dtype)
        self.padded = [padded(x.detach().cpu(), self.lengths).to(device).requires_grad_() for x in self.qkv.unbind(1)]
        self.dout_padded = padded(self.dout.cpu(), self.lengths).to(device)

    def ours(self) -> torch.Tensor:
        return ops.disentangled_attention(self.qkv, *self.prefix, self.rel_k, self.rel_q, self.slots, self.cu, self.S,
                                          scale=SCALE)

    def stock(self) -> torch.Tensor:
        q, k, v = self.padded
        index = torch.arange(self.S, device=self.device)
        L = (self.slots.numel() + 1) // 2
        rows = self.slots.long()[index[:, None] - index[None] + L - 1].expand(q.shape[0], HEADS, -1, -1)
        scores = q @ k.transpose(-1, -2) + (q @ self.rel_k.permute(1, 2, 0)).gather(-1, rows)
        scores = scores + (k @ self.rel_q.permute(1, 2, 0)).gather(-1, rows.transpose(-1, -2)).transpose(-1, -2)
        mask = torch.arange(self.S, device=self.device)[None] < torch.tensor(self.lengths, device=self.device)[:, None]
        P = 0
        if self.prefix[0] is not None:
            pk, pv = (p[0].transpose(0, 1).expand(q.shape[0], -1, -1, -1) for p in self.prefix)
            scores, v, P = torch.cat((q @ pk.transpose(-1, -2), scores), -1), torch.cat((pv, v), 2), pk.shape[2]
        mask = F.pad(mask, (P, 0), value=True)[:, None, None]
        return (scores * SCALE).masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) @ v

    def check(self) -> None:
        with torch.no_grad(), ops.use_backend("reference"):
            tables = (self.rel_k, self.rel_q)
            prefix = [None if p is None else p.double() for p in self.prefix]
            truth = ops.disentangled_attention(self.qkv.double(), *prefix, *(t.double() for t in tables), self.slots, self.cu,
                                               self.S, scale=SCALE)
            stock = self.ours()
        assert_error_within("ours", self.ours(), truth, stock)

    def facts(self, backward: bool) -> dict[str, Any]:
        """Products of content, c2p and p2c scores and of the output, once forward, 2.5 times backward."""
        flops = sum(8 * n * n + 4 * n * PROMPT for n in self.lengths) * HEADS * HEAD_DIM * (3.5 if backward else 1)
        return {"op": "disentangled_attention", "model": "DeBERTa-base", "tokens": sum(self.lengths),
                "dtype": short(self.qkv.dtype), "pass": "both" if backward else "forward", "device": self.device,
                "bytes": (11 if backward else 4) * sum(self.lengths) * HEADS * HEAD_DIM * self.qkv.element_size(),
                "flops": flops}


def compared(compare, case: Case, peers: dict, name: str, direction: str, **options) -> None:
    """peers: name -> (forward, gradient of its output)."""
    if direction == "forward":
        functions = {n: torch.no_grad()(f) for n, (f, _) in peers.items()}
    else:
        functions = {n: (lambda f=f, g=g: f().backward(g)) for n, (f, g) in peers.items()}
    compare(name, functions, **case.facts(direction == "both"), **options)


@pytest.mark.parametrize("direction", [pytest.param("forward", marks=full), "both"])
@pytest.mark.parametrize("kind", ["mrpc", "rte", pytest.param("128", marks=full)])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=full)], ids=short)
def test_cpu(compare, dtype, kind, direction):
    case = Case(kind, dtype, "cpu", PROMPT)
    case.check()
    peers = {"ptv2": (case.ours, case.dout), "stock padded": (case.stock, case.dout_padded)}
    compared(compare, case, peers, f"disentangled_attention {direction}  base {kind} P={PROMPT} {short(dtype)}", direction,
             rounds=6)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("kind", ["mrpc", "rte", "128", "512"])
@pytest.mark.parametrize("prompt_length", [0, PROMPT])
def test_gpu(compare, prompt_length, kind, direction):
    case = Case(kind, torch.bfloat16, "cuda", prompt_length)
    case.check()
    peers = {"ptv2": (case.ours, case.dout), "stock padded": (case.stock, case.dout_padded)}
    if not prompt_length and importlib.util.find_spec("flashdeberta"):
        varlen = importlib.import_module("flashdeberta.ops.flash_attention_varlen").flash_attention_with_disentangled_varlen
        tables = [t.transpose(0, 1)[None].contiguous() for t in (case.rel_k, case.rel_q)]
        q, k, v = (x.detach().clone().requires_grad_() for x in case.qkv.unbind(1))
        peers["flashdeberta packed"] = (
            lambda: varlen(q, k, v, *tables, case.cu, case.cu, case.S, case.S, sm_scale=SCALE, position_buckets=SPAN,
                           max_relative_distance=512), case.dout)
    name = f"disentangled_attention {direction}  base {kind} P={prompt_length} bf16"
    compared(compare, case, peers, name, direction, rounds=50, warmup=10)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mrpc", "128", "512"])
def test_gpu_with_the_projection(compare, kind):
    """Against disentangled-flash, whose packed training attention starts from hidden states: both project q, k, v here."""
    pytest.importorskip("disentangled_flash", reason="disentangled-flash is not installed")
    import disentangled_flash
    import transformers

    case = Case(kind, torch.bfloat16, "cuda", 0)
    config = transformers.DebertaV2Config(
        hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, relative_attention=True, pos_att_type=["c2p", "p2c"],
        position_buckets=SPAN, max_position_embeddings=512, share_att_key=True, attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0)
    theirs = disentangled_flash.TritonTrainingDisentangledSelfAttention(config).to("cuda", torch.bfloat16).requires_grad_(False)
    projections = [getattr(theirs, f"{name}_proj") for name in ("query", "key", "value")]
    weight, bias = (torch.cat([getattr(p, w) for p in projections]) for w in ("weight", "bias"))
    linear = ops.FrozenLinear(weight, bias)
    table = torch.randn(2 * SPAN, HEADS * HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(case.qkv.shape[0], HEADS * HEAD_DIM, device="cuda", dtype=torch.bfloat16).requires_grad_()
    rel_q, rel_k = (F.linear(table, p.weight, p.bias).view(-1, HEADS, HEAD_DIM) for p in projections[:2])

    def ours():
        qkv = ops.frozen_linear(x, linear).view(-1, 3, HEADS, HEAD_DIM)
        return ops.disentangled_attention(qkv, None, None, rel_k, rel_q, case.slots, case.cu, case.S, scale=SCALE)

    def packed():
        return theirs.forward_packed(x, case.cu, case.S, rel_embeddings=table)[0]

    torch.testing.assert_close(ours().flatten(1), packed(), rtol=5e-2, atol=5e-2)
    peers = {"ptv2": (ours, case.dout), "disentangled-flash packed": (packed, case.dout.flatten(1))}
    compared(compare, case, peers, f"projection + disentangled_attention both  base {kind} bf16", "both", rounds=50, warmup=10)
