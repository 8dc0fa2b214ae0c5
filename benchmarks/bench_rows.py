"""The row ops beside their limits: add_norm, the elementwise half of linear_gelu, embedding, and frozen_linear.

Weights are frozen, as for the peers: stock PyTorch, the same under torch.compile (GPU), and Liger's layer norm where installed.
Bytes are the least that must move, each tensor once: add_norm forward reads x and the residual and writes y and x_hat, backward
reads dy and x_hat and writes one gradient (two with dropout). Flops of row ops are 8 an element, a nominal count: they only say
where a point lies in the roofline.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from benchmarks.contest import InputSet, contest
from benchmarks.shapes import DIRECTIONS, SHAPES, TOKENS, full, on_cpu_and_gpu, short
from ptv2_engine import ops

GRID = [("BERT-base", "cpu gpu"), ("BERT-large", "gpu"), ("GLM-10B", "gpu"), *((model, "full") for model in SHAPES)]
Function = Callable[..., torch.Tensor]
Builder = Callable[[int], InputSet]
SETS = 8


def on(inputs: int, device: str, dtype: torch.dtype, width: int, out_width: int) -> Callable[[Function], Builder]:
    """on(..)(function): a contestant that calls the function with so many inputs [T, width], for an output [T, out_width]."""
    def contestant(function: Function) -> Builder:
        def build(seed: int) -> InputSet:
            generator = torch.Generator(device).manual_seed(seed)
            draw = lambda columns: torch.randn(TOKENS[device], columns, device=device, generator=generator).to(dtype)
            leaves, dout = [draw(width).requires_grad_() for _ in range(inputs)], draw(out_width)
            return InputSet(lambda: function(*leaves), leaves, dout)
        return build
    return contestant


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.1, marks=full)])
@pytest.mark.parametrize("model, device, dtype", on_cpu_and_gpu(*GRID))
def test_add_norm(compare, model, device, dtype, dropout, direction):
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
        contestants |= {"torch.compile": made(torch.compile(stock, dynamic=False, fullgraph=True)), "Liger": made(liger)}
    passes = {"forward": 4, "backward": 3 + (dropout > 0), "both": 7 + (dropout > 0)}[direction]
    contest(compare, f"add_norm {direction}  {model} T={T} p={dropout} {short(dtype)}", contestants, direction, device,
            3 * T * H * dtype.itemsize, unchecked=contestants if dropout else (), most=SETS, op="add_norm", model=model,
            dtype=short(dtype), tokens=T, flops=8 * T * H, bytes=passes * T * H * dtype.itemsize,
            backend=ops.backend_for("add_norm", device, dtype).backend)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("model, device, dtype", on_cpu_and_gpu(*GRID))
def test_linear_gelu(compare, model, device, dtype, direction):
    """With its product, in which the elementwise part is to vanish: the limit is that of the product."""
    (H, _, ffn), T = SHAPES[model], TOKENS[device]
    linear = ops.FrozenLinear(torch.randn(ffn, H, device=device).to(dtype) / H**0.5, torch.randn(ffn, device=device).to(dtype))
    weight, bias = linear.weight.detach(), linear.bias.detach()
    stock = lambda x: F.gelu(F.linear(x, weight, bias))
    made = on(1, device, dtype, H, ffn)
    contestants = {"ptv2": made(lambda x: ops.linear_gelu(x, linear)), "torch": made(stock),
                   "bare product": made(lambda x: F.linear(x, weight, bias))}
    if device == "cuda":
        contestants["torch.compile"] = made(torch.compile(stock, dynamic=False, fullgraph=True))
    elif dtype == torch.bfloat16:                          # minutes, where oneDNN has none; bench_frozen_linear.py has it
        contestants = {"ptv2": contestants["ptv2"]}
    products = {"forward": 1, "backward": 1, "both": 2}[direction]
    contest(compare, f"linear_gelu {direction}  {model} T={T} {short(dtype)}", contestants, direction, device,
            T * (H + ffn) * dtype.itemsize, unchecked=("bare product",), most=SETS, op="linear_gelu", model=model,
            dtype=short(dtype), tokens=T, flops=2 * products * T * H * ffn,
            bytes=products * (T * (H + ffn) + H * ffn) * dtype.itemsize,
            backend=ops.backend_for("linear_gelu", device, dtype).backend)


@pytest.mark.parametrize("model, device, dtype", on_cpu_and_gpu(*GRID))
def test_embedding(compare, model, device, dtype):
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
        contestants["torch.compile"] = made(torch.compile(stock, dynamic=False, fullgraph=True))
    contest(compare, f"embedding forward  {model} T={T} {short(dtype)}", contestants, "forward", device,
            2 * T * H * dtype.itemsize, most=SETS, op="embedding", model=model, dtype=short(dtype), tokens=T,
            flops=8 * T * H, bytes=2 * T * H * dtype.itemsize, backend=ops.backend_for("embedding", device, dtype).backend)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("model", ["BERT-base", "BERT-large", pytest.param("GLM-10B", marks=full)])
def test_frozen_linear(compare, model, direction):
    """The q, k, v product. On the CPU: bench_frozen_linear.py."""
    (H, _, _), T, dtype = SHAPES[model], TOKENS["cuda"], torch.bfloat16
    linear = ops.FrozenLinear(torch.randn(3 * H, H, device="cuda").to(dtype), torch.randn(3 * H, device="cuda").to(dtype))
    weight, bias = linear.weight.detach(), linear.bias.detach()
    made = on(1, "cuda", dtype, H, 3 * H)
    contestants = {"ptv2": made(lambda x: ops.frozen_linear(x, linear)), "torch": made(lambda x: F.linear(x, weight, bias))}
    products = 2 if direction == "both" else 1
    contest(compare, f"frozen_linear {direction}  {model} T={T} bf16", contestants, direction, "cuda", 4 * T * H * dtype.itemsize,
            most=SETS, op="frozen_linear", model=model, dtype="bf16", tokens=T,
            flops=2 * products * T * 3 * H * H, bytes=products * (4 * T * H + 3 * H * H) * dtype.itemsize,
            backend=ops.backend_for("frozen_linear", "cuda", dtype).backend)
