"""The ops around a frozen product: linear_gelu, linear_geglu, frozen_linear (plain or in codes) and the language-model head.

What is done beside the product is to vanish in it, so the limit is that of the product.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from benchmarks.contest import SETS, InputSet, contest, left_out, on
from benchmarks.shapes import DIRECTIONS, GRID, SHAPES, TOKENS, compiles, full, on_cpu_and_gpu, short
from ptv2_engine import ops
from ptv2_engine.ops import FrozenLinear, quantise
from ptv2_engine.ops.frozen_linear import multiplies_bf16

PRODUCTS = {"forward": 1, "backward": 1, "both": 2}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("model, device, dtype", on_cpu_and_gpu(*GRID))
def test_linear_gelu(compare, request, model, device, dtype, direction):
    (H, _, ffn), T = SHAPES[model], TOKENS[device]
    linear = FrozenLinear(torch.randn(ffn, H, device=device).to(dtype) / H**0.5, torch.randn(ffn, device=device).to(dtype))
    weight, bias = linear.weight.detach(), linear.bias.detach()
    stock = lambda x: F.gelu(F.linear(x, weight, bias))
    made = on(1, device, dtype, H, ffn)
    contestants = {"ptv2": made(lambda x: ops.linear_gelu(x, linear)), "torch": made(stock),
                   "bare product": made(lambda x: F.linear(x, weight, bias))}
    if device == "cuda":
        contestants["torch.compile"] = made(torch.compile(stock, dynamic=False, fullgraph=True)) if (
            compiles(request, model)) else left_out
    elif device == "cpu" and dtype == torch.bfloat16 and not multiplies_bf16():              # peers would take minutes
        contestants = {"ptv2": contestants["ptv2"]}
    products = PRODUCTS[direction]
    contest(compare, f"linear_gelu {direction}  {model} T={T} {short(dtype)}", contestants, direction, device,
            T * (H + ffn) * dtype.itemsize, unchecked=("bare product",), most=SETS, op="linear_gelu", model=model,
            dtype=short(dtype), tokens=T, flops=2 * products * T * H * ffn,
            bytes=products * (T * (H + ffn) + H * ffn) * dtype.itemsize,
            backend=ops.backend_for("linear_gelu", device, dtype).backend)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("model, device, dtype", on_cpu_and_gpu(*GRID))
def test_linear_geglu(compare, request, model, device, dtype, direction):
    """At ModernBERT's ratio of sizes."""
    H, T = SHAPES[model][0], TOKENS[device]
    ffn, products = 3 * H // 2, PRODUCTS[direction]
    linear = FrozenLinear(torch.randn(2 * ffn, H, device=device).to(dtype) / H**0.5)
    weight = linear.weight.detach()

    def stock(x):
        a, gate = F.linear(x, weight).chunk(2, -1)
        return F.gelu(a) * gate

    made = on(1, device, dtype, H, ffn)
    contestants = {"ptv2": made(lambda x: ops.linear_geglu(x, linear)), "torch": made(stock)}
    if device == "cuda":
        geglu = lambda x: importlib.import_module("liger_kernel.ops.geglu").LigerGELUMulFunction.apply(
            *F.linear(x, weight).chunk(2, -1))                 # its GELU is tanh's
        compiled = made(torch.compile(stock, dynamic=False, fullgraph=True)) if compiles(request, model) else left_out
        contestants |= {"torch.compile": compiled, "Liger (tanh)": made(geglu)}
    elif device == "cpu" and dtype == torch.bfloat16 and not multiplies_bf16():
        contestants = {"ptv2": contestants["ptv2"]}
    contest(compare, f"linear_geglu {direction}  {model} T={T} {short(dtype)}", contestants, direction, device,
            T * (H + 3 * ffn) * dtype.itemsize, unchecked=("Liger (tanh)",), most=SETS, op="linear_geglu", model=model,
            dtype=short(dtype), tokens=T, flops=4 * products * T * H * ffn,
            bytes=products * (T * (H + 3 * ffn) + 2 * H * ffn) * dtype.itemsize,
            backend=ops.backend_for("linear_geglu", device, dtype).backend)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", ["plain", "int8", "fp8", "nf4"])
@pytest.mark.parametrize("model", ["BERT-base", "BERT-large", *(
    pytest.param(m, marks=full) for m in SHAPES if m not in ("BERT-base", "BERT-large"))])
def test_frozen_linear(compare, model, kind, direction):
    """The q, k, v product. A coded weight is decoded into one scratch matrix in front of its product."""
    H, T, dtype, products = SHAPES[model][0], TOKENS["cuda"], torch.bfloat16, PRODUCTS[direction]
    linear = FrozenLinear(torch.randn(3 * H, H, device="cuda").to(dtype), torch.randn(3 * H, device="cuda").to(dtype))
    weight, bias = linear.weight.detach(), linear.bias.detach()
    if kind != "plain":
        linear.hold(quantise(weight, kind))
        weight = linear.dense(dtype)
    made = on(1, "cuda", dtype, H, 3 * H)
    contestants = {"ptv2": made(lambda x: ops.frozen_linear(x, linear)), "torch on the plain weight": made(
        lambda x: F.linear(x, weight, bias))}
    if kind == "nf4":
        contestants["bitsandbytes nf4"] = lambda seed: made(_bitsandbytes_nf4(weight, bias))(seed)
    contest(compare, f"frozen_linear {direction}  {model} T={T} {kind} bf16", contestants, direction, "cuda",
            4 * T * H * dtype.itemsize, most=SETS, op="frozen_linear", model=model, dtype="bf16", tokens=T, weight=kind,
            unchecked=("bitsandbytes nf4",), flops=2 * products * T * 3 * H * H,
            bytes=products * (4 * T * H + 3 * H * H) * dtype.itemsize,
            backend=ops.backend_for("frozen_linear", "cuda", dtype).backend)


def _bitsandbytes_nf4(weight: torch.Tensor, bias: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Its 4-bit layer on the same weight; its rounding is its own."""
    modules = importlib.import_module("bitsandbytes.nn")
    layer = modules.Linear4bit(weight.shape[1], weight.shape[0], quant_type="nf4", compute_dtype=weight.dtype)
    layer.weight = modules.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer.to(weight.device)


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("model, words, rows, device, dtype", on_cpu_and_gpu(
    ("BERT-base", 30522, 128, "cpu"), ("GLM-2B", 50304, 512, "gpu"), ("GLM-10B", 50304, 512, "gpu full"), cpu=(torch.float32,)))
def test_lm_head(compare, request, model, words, rows, device, dtype, direction):
    """Log-probabilities of the targets among all words. Peers hold [rows, words] for backward, ours [rows, H]."""
    H, R, products = SHAPES[model][0], rows, PRODUCTS[direction]
    word = (torch.randn(words, H, device=device) / H**0.5).to(dtype)
    targets = torch.arange(R, device=device) * 37 % words
    stock = lambda h: F.linear(h, word).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def made(function):
        def build(seed: int) -> InputSet:
            generator = torch.Generator(device).manual_seed(seed)
            h = torch.randn(R, H, device=device, generator=generator).to(dtype).requires_grad_()
            return InputSet(lambda: function(h), [h], torch.rand(R, device=device, generator=generator))
        return build

    contestants = {"ptv2": made(lambda h: ops.vocabulary_log_prob(h, word, targets)), "torch": made(stock)}
    if device == "cuda":
        contestants["torch.compile"] = made(torch.compile(stock, dynamic=False, fullgraph=True)) if (
            compiles(request, model)) else left_out
    contest(compare, f"lm_head {direction}  {model} R={R} V={words} {short(dtype)}", contestants, direction, device,
            (words + 2 * R) * H * dtype.itemsize, most=2, op="lm_head", model=model, dtype=short(dtype), tokens=R,
            flops=2 * products * R * H * words, bytes=products * words * H * dtype.itemsize, backend="torch")


@pytest.mark.parametrize("kind", ["plain", "int8", "nf4"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cpu_frozen_linear(compare, dtype, kind):
    torch.manual_seed(0)
    wide = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    T, H, width = 1024, 768, 3072
    x, weight, dy = torch.randn(T, H).to(wide), (torch.randn(width, H) / 28).to(wide), torch.randn(T, width).to(wide)
    linear = FrozenLinear(weight)
    if kind != "plain":
        linear.hold(quantise(weight, kind))
        weight = linear.dense(wide)
    packed = linear.packs(x)

    def ours():
        return linear.matmul(x, packed), linear.matmul_transposed(dy, packed)

    def stock():
        return F.linear(x, weight), dy @ weight

    for mine, theirs in zip(ours(), stock(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2 if dtype == "bf16" else 1e-3)
    compare(f"frozen_linear forward and dX  T={T} I={H} O={width} {kind} {dtype}",
            {"ptv2": ours, "torch on the plain weight": stock},
            rounds=4 if dtype == "fp32" or multiplies_bf16() else 1, warmup=1 if dtype == "fp32" else 0, flops=4 * T * H * width,
            op="frozen_linear", tokens=T, dtype=dtype, backend="native", **{"pass": "both"})
