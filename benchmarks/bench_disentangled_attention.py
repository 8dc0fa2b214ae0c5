"""disentangled_attention: forward, backward alone and both, against what DeBERTa users have.

Peers: the stock design in plain PyTorch (both relative score matrices [.., S, R] written out, then gathered; padded, prefix
concatenated), the same under torch.compile (GPU, --grid full), and on a GPU, where their wheels are installed, flashdeberta's
packed kernel and disentangled-flash's packed training attention. The last two have no prefix, so they are compared without one;
disentangled-flash brings its own q, k, v projection, so ours runs with its projection there.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention_peers import PASSES, Attention, leaves_of, ours
from benchmarks.contest import InputSet, contest
from benchmarks.shapes import DIRECTIONS, SHAPES, TOKENS, lengths_of, on_cpu_and_gpu, short
from ptv2_engine import ops
from ptv2_engine.ops.disentangled_attention import slots_of

SPAN, DISTANCE = 256, 512                                      # DeBERTa-v2 and v3: 256 log buckets over 512 positions
WIDTHS = {"DeBERTa-base": SHAPES["BERT-base"][:2], "DeBERTa-xlarge": SHAPES["DeBERTa-xlarge"][:2]}

# model, lengths, P, where. In bf16 on a CPU: --grid full
GRID = [("DeBERTa-base", "mrpc", 20, "cpu gpu"), ("DeBERTa-base", "rte", 20, "cpu gpu"),
        ("DeBERTa-base", "128", 20, "gpu"), ("DeBERTa-base", "512", 20, "gpu"),
        ("DeBERTa-base", "128", 0, "gpu"), ("DeBERTa-base", "512", 0, "gpu"), ("DeBERTa-xlarge", "128", 20, "gpu"),
        *((model, S, P, "full") for model in WIDTHS for S in ("32", "64", "128", "256", "512", "1024", "2048")
          for P in (0, 16, 100, 200)),
        *((model, kind, 20, "full") for model in WIDTHS for kind in ("mnli", "squad"))]
HALF = [("DeBERTa-base", kind, 20, "cpu full") for kind in ("mrpc", "rte", "128")]
CASES = [*on_cpu_and_gpu(*GRID, cpu=(torch.float32,)), *on_cpu_and_gpu(*HALF, cpu=(torch.bfloat16,))]


class Case(Attention):
    """A packed batch with the relative tables rel_k, rel_q [R, N, D] of each input set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scale = (3 * self.D) ** -0.5
        self.slots = slots_of(1 << (self.S - 1).bit_length(), SPAN, SPAN, DISTANCE, torch.device(self.device))

    def tables(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed + 3000)
        both = torch.randn(2, 2 * SPAN, self.N, self.D, generator=generator).to(self.device, self.dtype)
        return list(both.unbind(0))


def fused(case: Case, seed: int) -> InputSet:
    rel_k, rel_q = case.tables(seed)
    return ours(case, seed, lambda qkv, pk, pv, cu, S: ops.disentangled_attention(qkv, pk, pv, rel_k, rel_q, case.slots, cu, S,
                                                                                  scale=case.scale))


def stock_scores(q: Tensor, k: Tensor, v: Tensor, prefix: list[Tensor], rel_k: Tensor, rel_q: Tensor, rows_SS: Tensor,
                 mask: Tensor, scale: float) -> Tensor:
    """transformers' design. q, k, v [B, N, S, D]; prefix key and value [N, P, D] or none; rows_SS: table row of i - j."""
    B, N = q.shape[:2]
    rows = rows_SS.expand(B, N, -1, -1)
    scores = q @ k.transpose(-1, -2) + (q @ rel_k.permute(1, 2, 0)).gather(-1, rows)
    scores = scores + (k @ rel_q.permute(1, 2, 0)).gather(-1, rows.transpose(-1, -2)).transpose(-1, -2)
    if prefix:
        pk, pv = (p.expand(B, -1, -1, -1) for p in prefix)
        scores, v = torch.cat((q @ pk.transpose(-1, -2), scores), -1), torch.cat((pv, v), 2)
    return (scores * scale).masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) @ v


def stock(case: Case, seed: int, function: Callable[..., Tensor] = stock_scores) -> InputSet:
    qkv, prefix, dout = case.draw(seed)
    q, k, v, *prefixes = leaves_of(*(case.padded(x) for x in qkv.unbind(1)), *(p.transpose(0, 1).contiguous() for p in prefix))
    prefixes, tables = prefixes if case.P else [], case.tables(seed)
    index, middle = torch.arange(case.S, device=case.device), case.slots.numel() // 2
    rows_SS = case.slots.long()[index[:, None] - index[None] + middle]
    mask = F.pad(case.present_BS, (case.P, 0), value=True)[:, None, None]
    return InputSet(lambda: function(q, k, v, prefixes, *tables, rows_SS, mask, case.scale), [q, k, v, *prefixes],
                    case.padded(dout), case.packed)


def flashdeberta_packed(case: Case, seed: int) -> InputSet:
    varlen = importlib.import_module("flashdeberta.ops.flash_attention_varlen").flash_attention_with_disentangled_varlen
    qkv, _, dout = case.draw(seed)
    tables = [t.transpose(0, 1)[None].contiguous() for t in case.tables(seed)]
    q, k, v = leaves_of(*qkv.unbind(1))
    return InputSet(lambda: varlen(q, k, v, *tables, case.cu, case.cu, case.S, case.S, sm_scale=case.scale, position_buckets=SPAN,
                                   max_relative_distance=DISTANCE), [q, k, v], dout)


def facts_of(case: Case, model: str, kind: str, direction: str) -> dict:
    """A pair of tokens costs four products of D forward (content, c2p, p2c, output) and nine backward, one with a prefix row two
    and five."""
    own, prefix = sum(n * n for n in case.lengths), case.T * case.P
    forward, backward = 8 * own + 4 * prefix, 18 * own + 10 * prefix
    flops = {"forward": forward, "backward": backward, "both": forward + backward}[direction]
    hidden = case.N * case.D
    return {"op": "disentangled_attention", "model": model, "lengths": kind, "prompt_length": case.P, "tokens": case.T,
            "dtype": short(case.dtype), "flops": hidden * flops,
            "bytes": PASSES[direction] * case.T * hidden * case.dtype.itemsize,
            "backend": ops.backend_for("disentangled_attention", case.device, case.dtype, case.D).backend}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("model, kind, P, device, dtype", CASES)
def test_disentangled_attention(compare, request, model, kind, P, device, dtype, direction):
    hidden, heads = WIDTHS[model]
    case = Case(lengths_of(kind, tokens=TOKENS[device]), P, heads, hidden // heads, dtype, device)
    builders = {"ptv2": fused, "stock padded": stock}
    if device == "cuda" and request.config.getoption("--grid") == "full":
        compiled = torch.compile(stock_scores, dynamic=False, fullgraph=True)
        builders["stock padded, torch.compile"] = functools.partial(stock, function=compiled)
    if device == "cuda" and P == 0:
        builders["flashdeberta packed"] = flashdeberta_packed
    contest(compare, f"disentangled_attention {direction}  {model} {kind} P={P} {short(dtype)}",
            {name: functools.partial(build, case) for name, build in builders.items()}, direction, device, case.bytes_of_set,
            **facts_of(case, model, kind, direction))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mrpc", "128", "512"])
def test_with_the_projection(compare, kind):
    """Against disentangled-flash, whose packed training attention starts from hidden states: both project q, k, v here."""
    pytest.importorskip("disentangled_flash", reason="disentangled-flash is not installed")
    import disentangled_flash
    import transformers

    hidden, heads = WIDTHS["DeBERTa-base"]
    case = Case(lengths_of(kind, tokens=TOKENS["cuda"]), 0, heads, hidden // heads, torch.bfloat16, "cuda")
    config = transformers.DebertaV2Config(
        hidden_size=hidden, num_attention_heads=heads, relative_attention=True, pos_att_type=["c2p", "p2c"],
        position_buckets=SPAN, max_position_embeddings=DISTANCE, share_att_key=True, attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0)
    theirs = disentangled_flash.TritonTrainingDisentangledSelfAttention(config).to("cuda", torch.bfloat16).requires_grad_(False)
    projections = [getattr(theirs, f"{name}_proj") for name in ("query", "key", "value")]
    linear = ops.FrozenLinear(*(torch.cat([getattr(p, w) for p in projections]) for w in ("weight", "bias")))
    table = torch.randn(2 * SPAN, hidden, device="cuda", dtype=torch.bfloat16)
    rel_q, rel_k = (F.linear(table, p.weight, p.bias).view(-1, heads, case.D) for p in projections[:2])

    def contestant(function: Callable[[Tensor], Tensor]) -> Callable[[int], InputSet]:
        def build(seed: int) -> InputSet:
            qkv, _, dout = case.draw(seed)
            x, = leaves_of(qkv[:, 0].flatten(1))
            return InputSet(lambda: function(x), [x], dout.flatten(1))
        return build

    def mine(x: Tensor) -> Tensor:
        qkv = ops.frozen_linear(x, linear).view(-1, 3, heads, case.D)
        return ops.disentangled_attention(qkv, None, None, rel_k, rel_q, case.slots, case.cu, case.S, scale=case.scale).flatten(1)

    facts = facts_of(case, "DeBERTa-base", kind, "both")
    contest(compare, f"projection + disentangled_attention both  DeBERTa-base {kind} bf16",
            {"ptv2": contestant(mine), "disentangled-flash packed": contestant(
                lambda x: theirs.forward_packed(x, case.cu, case.S, rel_embeddings=table)[0])}, "both", "cuda",
            case.bytes_of_set, **facts | {"flops": facts["flops"] + 12 * case.T * hidden * hidden})
