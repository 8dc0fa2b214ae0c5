"""One check per kernel: its launcher against the op's fp64 reference, on fresh memory full of NaN.

tests/kernels runs them in the interpreter (fp32, fp16), tests/gpu on a GPU (and bf16), test_mutations on broken copies of the
kernels, where each must raise AssertionError. `package` is where the kernels are imported from.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import ptv2_engine.ops  # noqa: F401  (defines the references)
from ptv2_engine.ops import _philox
from ptv2_engine.testing import assert_error_within, cu_seqlens_of, poisoned_memory, random_prefix, random_qkv

KERNELS = "ptv2_engine.kernels"
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TIMES = 2.0


def kernel(name: str, package: str = KERNELS) -> ModuleType:
    return importlib.import_module(f"{package}.{name}")


def op(name: str) -> ModuleType:
    return importlib.import_module(f"ptv2_engine.ops.{name}")


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def seed_tensor(seed: int = 0x1234_5678_9ABC_DEF0) -> Tensor:
    return torch.tensor([seed], dtype=torch.int64, device=DEVICE)


def assert_same(name: str, one: Tensor, other: Tensor) -> None:
    """Two compilations of one kernel: the same bits in the interpreter, the same numbers up to the order of a sum on a GPU."""
    if DEVICE == "cpu":
        assert torch.equal(one, other), f"{name}: not the same bits"
    else:
        assert_error_within(name, one, other, None, 4.0)


def check_dequantise(rows: int, columns: int, kind: str, dtype: torch.dtype = torch.float32, package: str = KERNELS) -> None:
    """The bits of the reference, every code among them where there is room; fp8's NaN code too."""
    quantised = op("quantised")
    q = quantised.quantise(randn(rows, columns, seed=0), kind)
    codes = torch.arange(q.codes.numel(), device=DEVICE).to(torch.uint8).view(q.codes.shape)
    q = q._replace(codes=codes if kind == "nf4" else codes.view(q.codes.dtype))
    with poisoned_memory():
        actual = kernel("dequantise", package).dequantise(q.codes, q.scales, kind, rows, columns, dtype)
    torch.testing.assert_close(actual, quantised.reference(q, dtype), rtol=0, atol=0, equal_nan=True)


def check_add_norm(T: int, H: int, dtype: torch.dtype = torch.float32, p: float = 0.0, package: str = KERNELS,
                   with_sum: bool = False) -> None:
    """Forward, what is saved, both gradients; save=False saves nothing. with_sum: the sum, and its gradient added in."""
    module = kernel("add_norm", package)
    x, residual, dy, dsum = (randn(T, H, seed=s, dtype=dtype) for s in (0, 1, 2, 12))
    x = x + 3
    weight, bias = (randn(H, seed=3 + s, dtype=dtype) for s in range(2))
    seed, site, eps = seed_tensor(), 7, 1e-5
    with poisoned_memory():
        y, xhat, rstd, _, total = module.add_norm_fwd(x, residual, weight, bias, eps, p, seed, site, "full", with_sum)
        y_only, *empty = module.add_norm_fwd(x, residual, weight, bias, eps, p, seed, site, "none", False)
        dresidual, dx = module.add_norm_bwd(dy, dsum if with_sum else None, xhat, None, rstd, weight, p, seed, site)
    assert_same("y when nothing is saved", y_only, y)
    assert [e.numel() for e in empty] == [0, 0, 0, 0] and total.numel() == with_sum * x.numel()
    assert y.dtype == xhat.dtype == dresidual.dtype == dtype and rstd.dtype == torch.float32 and rstd.shape == (T,)

    def reference(precision: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(precision).requires_grad_() for t in (x, residual)]
        outs = op("add_norm").reference_sum(*leaves, weight.to(precision), bias.to(precision), eps, dropout_p=p, seed=seed,
                                            site=site)[:1 + with_sum]
        grads = torch.autograd.grad(outs, leaves, [dy.to(precision), dsum.to(precision)][:1 + with_sum])
        return [outs[0], grads[1], grads[0], *outs[1:]]

    exact, stock = reference(torch.float64), reference(dtype)
    if p == 0:
        assert dx.numel() == 0
        dx = dresidual
    found = {"y": y, "dresidual": dresidual, "dx": dx} | ({"sum": total} if with_sum else {})
    for (name, actual), truth, low in zip(found.items(), exact, stock, strict=True):
        assert_error_within(f"add_norm {name}", actual, truth, low, TIMES)
    keep = _philox.keep_scale(torch.arange(T, device=x.device), H, 0, p=p, seed=seed, site=site, stream=_philox.HIDDEN)
    total = x.double() * (keep if p > 0 else 1.0) + residual.double()
    mean = total.mean(1)
    variance = (total - mean[:, None]).square().mean(1)
    assert_error_within("rstd", rstd, (variance + eps).rsqrt(), None, 8.0)
    assert_error_within("xhat", xhat, (total - mean[:, None]) * (variance + eps).rsqrt()[:, None], None, 8.0)
    if p > 0:
        assert torch.equal(dx != 0, (keep > 0) & (dresidual != 0)), "the dropout mask is not the reference's"


def check_dropout(T: int, H: int, dtype: torch.dtype = torch.float32, p: float = 0.3, package: str = KERNELS) -> None:
    """Forward, which is its own backward, and rows behind the last that change nothing."""
    x, seed, site = randn(T + 3, H, seed=21, dtype=dtype), seed_tensor(), 40
    with poisoned_memory():
        y, more = (kernel("dropout", package).dropout(rows, p, seed, site) for rows in (x[:T].contiguous(), x))
    assert y.dtype == dtype and torch.equal(y, more[:T])
    exact = op("dropout").reference(x[:T].double(), p, seed, site)
    assert_error_within("dropout", y, exact, None, roundings=1.0)
    assert torch.equal(y != 0, exact != 0), "the dropout mask is not the reference's"


def check_embedding(T: int, E: int, dtype: torch.dtype = torch.float32, p: float = 0.0, types: str = "given",
                    positions: bool = True, package: str = KERNELS) -> None:
    """types: "given" | "none" (no ids: row 0) | "no table"."""
    generator = torch.Generator().manual_seed(11)
    word, position, type_table = (randn(rows, E, seed=s, dtype=dtype) for s, rows in enumerate((50, 20, 2)))
    weight, bias = (randn(E, seed=5 + s, dtype=dtype) for s in range(2))
    ids, position_ids, type_ids = (torch.randint(high, (T,), generator=generator).to(DEVICE) for high in (50, 20, 2))
    tables = (word, position if positions else None, None if types == "no table" else type_table)
    indices = (ids, position_ids, type_ids if types == "given" else None)
    seed, site = seed_tensor(), 96
    with poisoned_memory():
        x = kernel("embedding", package).embedding(*indices, *tables, weight, bias, 1e-12, p, seed, site)
    assert x.dtype == dtype

    def reference(precision: torch.dtype) -> Tensor:
        casted = [None if t is None else t.to(precision) for t in (*tables, weight, bias)]
        return op("embedding").reference(*indices, *casted, 1e-12, dropout_p=p, seed=seed, site=site)

    exact = reference(torch.float64)
    assert_error_within("embedding", x, exact, reference(dtype), TIMES)
    if p > 0:
        assert torch.equal(x != 0, exact != 0), "the dropout mask is not the reference's"


def check_gelu(T: int, F: int, dtype: torch.dtype = torch.float32, approximate: str = "none", package: str = KERNELS) -> None:
    """h in place, the derivative within the code's step, dz within that of dh; save=False saves nothing."""
    module = kernel("linear_gelu", package)
    z = randn(T, F, seed=1, dtype=dtype) * 3
    special = torch.tensor([0.0, -0.0, 5.0, -5.0, 40.0, -40.0, 6e4, -6e4], device=DEVICE).to(dtype)
    z.view(-1)[: min(8, z.numel())] = special[: z.numel()]
    dh = randn(T, F, seed=2, dtype=dtype)
    h, plain = z.clone(), z.clone()
    with poisoned_memory():
        derivative = module.gelu_(h, approximate, True, 8)
        assert module.gelu_(plain, approximate, False, 8).shape == (0,)
        dz = module.gelu_bwd(dh, derivative, 8)
    assert_same("h when nothing is saved", plain[z.abs() < 100], h[z.abs() < 100])

    def reference(precision: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = z.to(precision).requires_grad_()
        out = torch.nn.functional.gelu(leaf, approximate=approximate)
        return out.detach(), torch.autograd.grad(out, leaf, torch.ones_like(out))[0]

    (exact, slope), (stock, stock_slope) = reference(torch.float64), reference(dtype)
    finite = z.abs() < 100
    assert_error_within("gelu", h[finite], exact[finite], stock[finite], TIMES)
    assert torch.equal(h[~finite].double(), torch.where(z[~finite] > 0, z[~finite], 0).double())
    if dtype == torch.float32:
        assert derivative.dtype == torch.float32
        assert_error_within("gelu'", derivative, slope, stock_slope, TIMES)
        assert_error_within("dz", dz, slope * dh.double(), stock_slope * dh, TIMES)
    else:
        assert derivative.dtype == torch.uint8
        step = 1.26 / 255
        decoded = derivative.double() * step - 0.13
        error = (decoded - slope).abs()
        assert float(error.max() if error.numel() else 0) <= step * 0.501, \
            f"gelu code is off by {float(error.max() / step)} steps"
        assert_error_within("dz", dz, decoded * dh.double(), None, TIMES)


@dataclass(frozen=True)
class Attention:
    """One case of prefix attention. bank: number of prompts K (None: no prefix)."""

    lengths: tuple[int, ...]
    P: int = 5
    N: int = 2
    D: int = 32
    K: int = 1
    prompt_ids: tuple[int, ...] | None = None
    prompt_lengths: tuple[int, ...] | None = None
    dropout_p: float = 0.0
    prefix_dropout_p: float = 0.0
    dtype: torch.dtype = torch.float32
    spare_rows: int = 0            # rows past the last sequence
    keep_out: bool = False         # give the output to backward, as for rows of more than 2048 keys
    seen: str | None = None        # "causal", "candidates" (both with a context) or "window"; None: all tokens
    site: int = 5
    packed: bool = False           # several short sequences a program, however few there are
    listed: bool = False           # tiles in a list, however alike the lengths are


def attention_inputs(case: Attention) -> dict[str, Any]:
    T = sum(case.lengths) + case.spare_rows
    qkv = random_qkv([T], case.N, case.D, case.dtype, device=DEVICE)
    dout = randn(T, case.N, case.D, seed=9, dtype=case.dtype)
    qkv[T - case.spare_rows:] = float("nan")
    # A common part makes the rows of dP far from zero mean, so that a wrong delta cannot hide.
    dout[: T - case.spare_rows] += 1
    pk, pv = random_prefix(case.K, case.P, case.N, case.D, case.dtype, device=DEVICE) if case.P else (None, None)
    as_ids = [None if ids is None else torch.tensor(ids, dtype=torch.int32, device=DEVICE)
              for ids in (case.prompt_ids, case.prompt_lengths)]
    return {"qkv": qkv, "dout": dout, "prefix": (pk, pv), "cu_seqlens": cu_seqlens_of(list(case.lengths), DEVICE),
            "max_seqlen": max(case.lengths, default=0), "prompt_ids": as_ids[0], "prompt_lengths": as_ids[1],
            "seed": seed_tensor(), "ranges": seen_ranges(case)}


def seen_ranges(case: Attention) -> tuple[Tensor | None, Tensor | None]:
    """context_B and key_range_T2: contexts of a third of each sequence, candidates of 5 tokens, windows of 7 each way."""
    T, cu_seqlens = sum(case.lengths) + case.spare_rows, cu_seqlens_of(list(case.lengths), DEVICE)
    if case.seen is None:
        return None, None
    if case.seen == "window":
        return op("prefix_attention").key_ranges(cu_seqlens, T, window=7)
    context = torch.tensor([length // 3 for length in case.lengths], device=DEVICE)
    first = None
    if case.seen == "candidates":
        index = torch.cat([torch.arange(n) for n in (*case.lengths, case.spare_rows)]).to(DEVICE)
        behind = context.repeat_interleave(torch.tensor(case.lengths, device=DEVICE))
        behind = torch.nn.functional.pad(behind, (0, case.spare_rows))
        first = torch.where(index < behind, 0, behind + (index - behind) // 5 * 5)
    return op("prefix_attention").key_ranges(cu_seqlens, T, causal_from=context, first_key_T=first)


def attention_reference(case: Attention, given: dict[str, Any], precision: torch.dtype) -> list[Tensor]:
    """out, dqkv, dprefix_k, dprefix_v (zeros of no size without a prefix)."""
    qkv = given["qkv"].to(precision).requires_grad_()
    prefix = [None if p is None else p.to(precision).requires_grad_() for p in given["prefix"]]
    out = op("prefix_attention").reference(
        *qkv.unbind(1), *prefix, given["cu_seqlens"], given["max_seqlen"], prompt_ids=given["prompt_ids"],
        prompt_lengths=given["prompt_lengths"], dropout_p=case.dropout_p, prefix_dropout_p=case.prefix_dropout_p,
        seed=given["seed"], site=case.site, context_B=given["ranges"][0], key_range_T2=given["ranges"][1])
    leaves = [qkv, *(p for p in prefix if p is not None)]
    if not out.requires_grad or out.numel() == 0:
        grads = [torch.zeros_like(leaf) for leaf in leaves]
    else:
        grads = [torch.zeros_like(leaf) if g is None else g for leaf, g in
                 zip(leaves, torch.autograd.grad(out, leaves, given["dout"].to(precision), allow_unused=True), strict=True)]
    grads[0] = grads[0].nan_to_num()
    return [out.detach(), *grads]


@contextmanager
def chosen(case: Attention, package: str) -> Iterator[None]:
    """Inside, kernels take several sequences a program or lists of tiles if the case wants that: batches this small would not."""
    if package.startswith("cuda_"):                        # CUDA C++ (tests/cuda/emulated.py) leaves nothing to choose
        yield
        return
    tuning = kernel("tuning", package)
    before = tuning.PACKED_PROGRAMS, tuning.IDLE_PROGRAMS
    tuning.PACKED_PROGRAMS = 0 if case.packed else before[0]
    tuning.IDLE_PROGRAMS = -10**9 if case.listed else before[1]
    plan = tuning.choose_packed(max(case.lengths, default=0), case.P, case.D, case.dtype.itemsize, len(case.lengths),
                                sum(case.lengths) + case.spare_rows, case.N, case.dropout_p > 0)
    try:
        if bool(plan) != case.packed:           # no AssertionError: it would count as a mutation found
            raise ValueError(f"{case}: the packed kernels {'would not' if case.packed else 'would'} take this")
        yield
    finally:
        tuning.PACKED_PROGRAMS, tuning.IDLE_PROGRAMS = before


def run_attention(case: Attention, given: dict[str, Any], package: str = KERNELS, need_tokens: bool = True,
                  need_prefix: bool = True, poison: float = float("nan")) -> tuple[Tensor, ...]:
    """(out, lse, dqkv, dprefix_k, dprefix_v) by the kernels, on fresh memory full of `poison`."""
    module = kernel("prefix_attention", package)
    q, k, v = given["qkv"].unbind(1)
    plain = (given["cu_seqlens"], given["max_seqlen"], given["prompt_ids"], given["prompt_lengths"], case.D**-0.5, case.dropout_p,
             case.prefix_dropout_p, given["seed"], case.site, *given["ranges"])
    with poisoned_memory(poison), chosen(case, package):
        out, lse = module.prefix_attention_fwd(q, k, v, *given["prefix"], *plain)
        grads = module.prefix_attention_bwd(given["dout"], q, k, v, *given["prefix"], out if case.keep_out else None, lse, *plain,
                                            need_tokens, need_prefix)
    return out, lse, *grads


def check_attention(case: Attention, package: str = KERNELS, partly: bool = True) -> None:
    """Forward, log-sum-exp and all gradients; partly: also the prefix gradient without the tokens' and the other way round."""
    given = attention_inputs(case)
    out, lse, dqkv, dpk, dpv = run_attention(case, given, package)
    exact, stock = (attention_reference(case, given, precision) for precision in (torch.float64, case.dtype))
    # Four roundings of slack. The normaliser of a 16-bit reference hides how far P * dP is rounded before it is summed. In fp32
    # probabilities come again from a rounded log-sum-exp, whose error is relative to itself (5 or so) and not to 1, and in
    # dP - delta, which cancels, a batch of one token has no other element to show how far stock PyTorch can be off.
    slack = 4.0
    actual = [out, dqkv] + ([dpk, dpv] if case.P else [])
    assert dqkv.dtype == out.dtype == case.dtype and lse.dtype == torch.float32 and dpk.dtype == torch.float32
    names = ("out", "dqkv", "dprefix_k", "dprefix_v")
    for name, mine, truth, low in zip(names, actual, exact, stock, strict=False):
        if name.startswith("dprefix") and case.dtype != torch.float32:
            mine = mine.to(case.dtype)      # the budget counts roundings of the inputs' dtype
        assert_error_within(f"{name} {case}", mine, truth, low, TIMES, slack)
    check_lse(case, given, lse)
    if not partly:
        return
    only_prefix = run_attention(case, given, package, need_tokens=False)
    only_tokens = run_attention(case, given, package, need_prefix=False)
    assert only_prefix[2].numel() == 0 and only_tokens[3].numel() == only_tokens[4].numel() == 0
    assert_same("dqkv when the prefix gradient is not asked for", only_tokens[2], dqkv)
    if case.P:
        for index, full in ((3, dpk), (4, dpv)):
            # delta of another compilation differs by a rounding, and the gradient is a sum over all queries.
            assert_same("dprefix when dqkv is not asked for", only_prefix[index].to(case.dtype), full.to(case.dtype))


def check_lse(case: Attention, given: dict[str, Any], lse: Tensor) -> None:
    """lse against fp64 scores: the reference does not return it. Undropped softmax, but with the prefix's own dropout."""
    if case.prefix_dropout_p > 0:
        return
    offsets = given["cu_seqlens"].tolist()
    exact = torch.zeros(lse.shape, dtype=torch.float64, device=lse.device)
    q, k, _ = given["qkv"].double().unbind(1)
    for b, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        keys = k[start:end]
        if case.P:
            prompt = 0 if case.prompt_ids is None else case.prompt_ids[b]
            length = case.P if case.prompt_lengths is None else case.prompt_lengths[prompt]
            keys = torch.cat((given["prefix"][0][prompt, :length].double(), keys))
        scores = torch.einsum("ind,jnd->nij", q[start:end], keys).mul(case.D**-0.5)
        if case.seen is not None:
            unseen = ~op("prefix_attention").visible(int(given["ranges"][0][b]), given["ranges"][1][start:end])
            scores = scores.masked_fill(torch.nn.functional.pad(unseen, (scores.shape[2] - unseen.shape[1], 0)), float("-inf"))
        exact[:, start:end] = scores.logsumexp(-1)
    assert_error_within("lse", lse, exact, None, 8.0)


def mixed_prompts(case: Attention, seed: int = 0) -> Attention:
    """The same case with three prompts of different lengths (one of them never used, one of them empty when P allows)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 2, (len(case.lengths),), generator=generator)
    return replace(case, K=3, prompt_ids=tuple(int(i) * 2 for i in ids), prompt_lengths=(case.P // 2, case.P, case.P))
