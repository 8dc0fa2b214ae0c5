"""The row ops beside their limits: add_norm, embedding, dropout and rotary.

Weights are frozen, as for the peers: stock PyTorch, the same under torch.compile (GPU), and Liger's layer norm where installed.
Bytes are the least that must move, each tensor once: add_norm forward reads x and the residual and writes y and x_hat, backward
reads dy and x_hat and writes one gradient (two with dropout). Flops of row ops are 8 an element, a nominal count: they only say
where a point lies in the roofline.
"""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F

from benchmarks.contest import SETS, InputSet, contest, left_out, on
from benchmarks.shapes import DIRECTIONS, GRID, SHAPES, TOKENS, compiles, full, on_cpu_and_gpu, short
from ptv2_engine import ops


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.1, marks=full)])
@pytest.mark.parametrize("model, device, dtype", on_cpu_and_gpu(*GRID))
def test_add_norm(compare, request, model, device, dtype, dropout, direction):
    H, T = SHAPES[model][0], TOKENS[device]
    weight, bias = torch.rand(H, device=device).to(dtype), torch.randn(H, device=device).to(dtype)
    seed = torch.tensor([1], device=device)

    def stock(x, residual):
        return F.layer_norm(F.dropout(x, dropout) + residual, (H,), weight, bias, 1e-12)

    def liger(x, residual):
        layer_norm = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
        return layer_norm.apply(F.dropout(x, dropout) + residual, weight, bias, 1e-12)

    made = on(2, device, dtype, H, H)
    contestants = {"ptv2": made(lambda x, r: ops.add_norm(x, r, weight, bias, 1e-12, dropout_p=dropout, seed=seed)),
                   "torch": made(stock)}
    if device == "cuda":
        compiled = made(torch.compile(stock, dynamic=False, fullgraph=True)) if compiles(request, model) else left_out
        contestants |= {"torch.compile": compiled, "Liger": made(liger)}
    passes = {"forward": 4, "backward": 3 + (dropout > 0), "both": 7 + (dropout > 0)}[direction]
    contest(compare, f"add_norm {direction}  {model} T={T} p={dropout} {short(dtype)}", contestants, direction, device,
            3 * T * H * dtype.itemsize, unchecked=contestants if dropout else (), most=SETS, op="add_norm", model=model,
            dtype=short(dtype), tokens=T, flops=8 * T * H, bytes=passes * T * H * dtype.itemsize,
            backend=ops.backend_for("add_norm", device, dtype).backend)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("model, device, dtype", on_cpu_and_gpu(*GRID))
def test_add_norm_sum(compare, request, model, device, dtype, direction):
    """The pre-LN layer's: the sum goes on as the residual stream, and its gradient comes back beside the norm's."""
    H, T = SHAPES[model][0], TOKENS[device]
    weight, bias = torch.rand(H, device=device).to(dtype), torch.randn(H, device=device).to(dtype)

    def stock(x, residual):
        total = x + residual
        return F.layer_norm(total, (H,), weight, bias, 1e-12), total

    made = on(2, device, dtype, H, H, outputs=2)
    contestants = {"ptv2": made(lambda x, r: ops.add_norm_sum(x, r, weight, bias, 1e-12)), "torch": made(stock)}
    if device == "cuda":
        contestants["torch.compile"] = made(torch.compile(stock, dynamic=False, fullgraph=True)) if (
            compiles(request, model)) else left_out
    passes = {"forward": 5, "backward": 4, "both": 9}[direction]
    contest(compare, f"add_norm_sum {direction}  {model} T={T} {short(dtype)}", contestants, direction, device,
            4 * T * H * dtype.itemsize, most=SETS, op="add_norm_sum", model=model, dtype=short(dtype), tokens=T, flops=8 * T * H,
            bytes=passes * T * H * dtype.itemsize, backend=ops.backend_for("add_norm", device, dtype).backend)


@pytest.mark.parametrize("model, device, dtype", on_cpu_and_gpu(*GRID))
def test_embedding(compare, request, model, device, dtype):
    H, T = SHAPES[model][0], TOKENS[device]
    words = min(30522, 4 * T)
    position, types = (torch.randn(n, H, device=device).to(dtype) for n in (512, 2))
    weight, bias = torch.rand(H, device=device).to(dtype), torch.randn(H, device=device).to(dtype)
    stock = lambda word, ids, places: F.layer_norm(word[ids] + position[places] + types[0], (H,), weight, bias)

    def made(function):
        def build(seed: int) -> InputSet:
            generator = torch.Generator(device).manual_seed(seed)              # a table of its own: one would stay in the cache
            word = torch.randn(words, H, device=device, generator=generator).to(dtype)
            ids = torch.randint(0, words, (T,), device=device, generator=generator)
            places = torch.arange(T, device=device) % 128
            return InputSet(lambda: function(word, ids, places), [], None)
        return build

    ours = lambda word, ids, places: ops.embedding(ids, places, None, word, position, types, weight, bias, 1e-5)
    contestants = {"ptv2": made(ours), "torch": made(stock)}
    if device == "cuda":
        contestants["torch.compile"] = made(torch.compile(stock, dynamic=False, fullgraph=True)) if (
            compiles(request, model)) else left_out
    contest(compare, f"embedding forward  {model} T={T} {short(dtype)}", contestants, "forward", device,
            2 * T * H * dtype.itemsize, most=SETS, op="embedding", model=model, dtype=short(dtype), tokens=T,
            flops=8 * T * H, bytes=2 * T * H * dtype.itemsize, backend=ops.backend_for("embedding", device, dtype).backend)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("model, device, dtype", on_cpu_and_gpu(*GRID))
def test_dropout(compare, model, device, dtype, direction):
    """Backward is the same kernel on the gradient; torch's writes its mask and reads it again."""
    H, T = SHAPES[model][0], TOKENS[device]
    seed, made = torch.tensor([1], device=device), on(1, device, dtype, H, H)
    contestants = {"ptv2": made(lambda x: ops.dropout(x, 0.1, seed)), "torch": made(lambda x: F.dropout(x, 0.1))}
    passes = 4 if direction == "both" else 2
    contest(compare, f"dropout {direction}  {model} T={T} {short(dtype)}", contestants, direction, device,
            2 * T * H * dtype.itemsize, unchecked=contestants, most=SETS, op="dropout", model=model, dtype=short(dtype), tokens=T,
            flops=8 * T * H, bytes=passes * T * H * dtype.itemsize, backend=ops.backend_for("dropout", device, dtype).backend)


@pytest.mark.parametrize("model, device, dtype", on_cpu_and_gpu(*GRID))
def test_rotary(compare, request, model, device, dtype):
    """Forward, in place; backward is the same kernel with the angles turned round."""
    (H, N, _), T = SHAPES[model], TOKENS[device]
    positions = torch.arange(T, device=device) % 128
    table = ops.cos_sin_table(128, H // N, 10_000.0, device)
    cos, sin = (torch.cat((x, x), 1)[:, None, None].to(dtype) for x in table[positions].chunk(2, 1))

    def stock(qkv):                                            # transformers' apply_rotary_pos_emb
        qk = qkv.view(T, 3, N, H // N)[:, :2]
        a, b = qk.chunk(2, -1)
        return qk * cos + torch.cat((-b, a), -1) * sin

    def made(function):
        def build(seed: int) -> InputSet:
            generator = torch.Generator(device).manual_seed(seed)
            qkv = torch.randn(T, 3 * H, device=device, generator=generator).to(dtype)
            return InputSet(lambda: function(qkv), [], None)
        return build

    contestants = {"ptv2": made(lambda qkv: ops.rotary(qkv, N, table, positions)[:, :2]), "torch": made(stock)}
    if device == "cuda":
        contestants["torch.compile"] = made(torch.compile(stock, dynamic=False, fullgraph=True)) if (
            compiles(request, model)) else left_out
    contest(compare, f"rotary forward  {model} T={T} {short(dtype)}", contestants, "forward", device, 3 * T * H * dtype.itemsize,
            most=SETS, op="rotary", model=model, dtype=short(dtype), tokens=T, flops=8 * T * H,
            bytes=4 * T * H * dtype.itemsize, backend=ops.backend_for("rotary", device, dtype).backend)
