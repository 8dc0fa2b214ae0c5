"""Each kernel's check must fail on a kernel with a plausible mistake, or it checks nothing.

A mutation is one textual change in a copy of kernels/, imported under another package name.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_checks import (
    KERNELS,
    Attention,
    check_add_norm,
    check_attention,
    check_dequantise,
    check_dropout,
    check_embedding,
    check_gelu,
)
from test_disentangled_attention_kernel import Case as Disentangled
from test_disentangled_attention_kernel import check as check_disentangled

SOURCE = Path(importlib.import_module(f"{KERNELS}.philox").__file__).parent
fp16, fp32 = torch.float16, torch.float32

plain = Attention((17, 5), 5, N=1, dtype=fp16)
fused = Attention((17, 25), 5, N=1, dtype=fp16)
apart = Attention((17, 5), 36, N=1, dtype=fp16)
long = Attention((70, 5), 5, N=1, D=80, dtype=fp16, keep_out=True)
dropped = Attention((17, 5), 36, N=1, dtype=fp16, dropout_p=0.2, prefix_dropout_p=0.3)
causal, window = (Attention((150, 17), 5, N=1, dtype=fp16, seen=seen) for seen in ("causal", "window"))
def relative(package: str) -> None:
    check_disentangled(Disentangled((40, 17)), package)


dropped_fused = Attention((17, 25), 5, N=1, dtype=fp16, prefix_dropout_p=0.3)
packed = Attention((40, 17, 0, 5, 30, 1), 5, N=1, dtype=fp16, spare_rows=3, packed=True)
packed_apart = replace(packed, lengths=(40, 17, 0, 30, 1, 5, 33, 2), P=36)
listed = Attention((17, 70, 17), 36, N=1, dtype=fp16, spare_rows=300, listed=True)
packed_dropped = Attention((9, 17, 5), 5, N=1, dtype=fp16, dropout_p=0.3, packed=True)


def attention(case: Attention) -> Callable[[str], None]:
    return lambda package: check_attention(case, package)


MUTATIONS = {
    "add_norm: last row dropped": (
        "add_norm", "(rows < T)[:, None] & inside, inside", "(rows < T - 1)[:, None] & inside, inside",
        lambda package: check_add_norm(5, 100, fp32, package=package)),
    "add_norm: padding columns counted in the variance": (
        "add_norm", "centred = tl.where(inside, x - mean[:, None], 0.0)", "centred = x - mean[:, None]",
        lambda package: check_add_norm(5, 100, fp32, package=package)),
    "add_norm: projection on x_hat forgotten": (
        "add_norm", "- xhat * mean_product[:, None]", "", lambda package: check_add_norm(5, 100, fp32, package=package)),
    "add_norm: backward draws another mask": (
        "add_norm", "keep = keep_tile(first_row, 0, site * 0, site * 8 + HIDDEN, seed, threshold, ROWS, BLOCK_H)\n        dx",
        "keep = keep_tile(first_row, 0, site * 0, site * 8 + 1, seed, threshold, ROWS, BLOCK_H)\n        dx",
        lambda package: check_add_norm(5, 100, fp32, 0.3, package)),
    "philox: six rounds": (
        "philox", "static_range(7)", "static_range(6)", lambda package: check_embedding(5, 64, fp32, 0.3, package=package)),
    "philox: words of a counter swapped": (
        "philox", "tl.join(even, odd)", "tl.join(odd, even)", lambda package: check_add_norm(5, 100, fp32, 0.3, package)),
    "embedding: without types, row 0 is not added": (
        "embedding", "x += tl.load(type_UE + columns,", "x += 0 * tl.load(type_UE + columns,",
        lambda package: check_embedding(5, 64, fp32, types="none", package=package)),
    "embedding: positions off by one": (
        "embedding", "tl.load(position_ids_T + rows, mask=present, other=0)",
        "(tl.load(position_ids_T + rows, mask=present, other=0) // 2)",
        lambda package: check_embedding(5, 64, fp32, package=package)),
    "dropout: a second tile of columns draws the first one's mask": (
        "dropout", "keep_tile(first_row, first_column, site", "keep_tile(first_row, 0, site",
        lambda package: check_dropout(3, 600, package=package)),
    "dropout: what is kept is not scaled": (
        "dropout", "x * keep_scale", "x", lambda package: check_dropout(3, 600, package=package)),
    "gelu: code truncated instead of rounded": (
        "linear_gelu", "_CODES_PER_UNIT + 0.5)", "_CODES_PER_UNIT)", lambda package: check_gelu(3, 50, fp16, package=package)),
    "gelu: last element dropped": (
        "linear_gelu", "mask = offsets < numel", "mask = offsets < numel - 1",
        lambda package: check_gelu(3, 50, fp32, package=package)),
    "gelu: derivative without z * phi": (
        "linear_gelu", "derivative = cdf + 0.5 * z * slope", "derivative = cdf",
        lambda package: check_gelu(3, 50, fp16, "tanh", package)),
    "dequantise: nibbles swapped": (
        "dequantise", "tl.load(levels_16 + (byte >> 4)), tl.load(levels_16 + (byte & 15))",
        "tl.load(levels_16 + (byte & 15)), tl.load(levels_16 + (byte >> 4))",
        lambda package: check_dequantise(2, 96, "nf4", package=package)),
    "dequantise: fp8 subnormals read as normal": (
        "dequantise", "tl.where(low < 8,", "tl.where(low < 0,", lambda package: check_dequantise(3, 100, "fp8", package=package)),
    "dequantise: last column dropped": (
        "dequantise", "(columns < I)[None, :]", "(columns < I - 1)[None, :]",
        lambda package: check_dequantise(3, 100, "int8", package=package)),
    "forward: key mask shifted by one": (
        "attention_tile", "scores = tl.where((tl.arange(0, BLOCK_N) < num_keys)[None, :]",
        "scores = tl.where((tl.arange(0, BLOCK_N) < num_keys - 1)[None, :]", attention(plain)),
    "forward: padding keys not masked": (
        "attention_tile", "scores = tl.where((tl.arange(0, BLOCK_N) < num_keys)[None, :], scores, float(\"-inf\"))", "",
        attention(plain)),
    "forward: a row dropped": (
        "prefix_attention", "store_tile(out_TND + n * D, start + first, out_row, length - first,",
        "store_tile(out_TND + n * D, start + first, out_row, length - first - 1,", attention(plain)),
    "forward: rows past the last sequence left as they are": (
        "prefix_attention", "zero_rows(out_TND + n * D, start, T,", "zero_rows(out_TND + n * D, T, T,",
        attention(Attention((17,), 5, N=1, dtype=fp16, spare_rows=3))),
    "forward: the accumulator is not rescaled": (
        "attention_tile", "acc * shrink[:, None]", "acc", attention(plain)),
    "forward: every sequence takes prompt 0": (
        "attention_tile", "tl.load(prompt_ids + b).to(tl.int64)", "(b * 0).to(tl.int64)",
        attention(Attention((17, 5), 5, N=1, dtype=fp16, K=2, prompt_ids=(0, 1)))),
    "forward: a prompt's length ignored": (
        "attention_tile", "tl.load(prompt_lengths + prompt).to(tl.int32) if prompt_lengths is not None else P", "P",
        attention(Attention((17, 5), 5, N=1, dtype=fp16, K=2, prompt_ids=(0, 1), prompt_lengths=(2, 5)))),
    "dropout: the prefix's columns take the tokens' bits": (
        "prefix_attention", "c2, PREFIX_PROB,", "c2, TOKEN_PROB,",
        attention(Attention((17, 5), 5, N=1, dtype=fp16, dropout_p=0.3))),
    "sweep: delta without the prefix": (
        "prefix_attention", "delta += tl.sum(p_probs * p_dprobs, 0)", "delta += 0.0", attention(fused)),
    "sweep: dq without the prefix": (
        "prefix_attention", "dq = tl.dot(tl.trans(p_ds), pk, dq, input_precision=PRECISION)", "dq += 0.0", attention(fused)),
    "sweep: dk without its scale": ("prefix_attention", "length, dk * scale,", "length, dk,", attention(fused)),
    "sweep: prefix gradient without its own mask": (
        "prefix_attention", "site, PREFIX_V, BLOCK_P, BLOCK_D), dpv * prefix_scale, 0.0)",
        "site, PREFIX_K, BLOCK_P, BLOCK_D), dpv * prefix_scale, 0.0)", attention(dropped_fused)),
    "sum of partials: one sequence left out": (
        "prefix_grad", "mine = rows < C", "mine = rows < C - 1", attention(fused)),
    "prefix gradient: one sequence left out": (
        "prefix_grad", "for b in range(group, B, groups)", "for b in range(group, B - 1, groups)", attention(apart)),
    "prefix gradient: last query tile left out": (
        "prefix_grad", "* BLOCK_M, length, query_groups * BLOCK_M)", "* BLOCK_M, length - 16, query_groups * BLOCK_M)",
        attention(apart)),
    "prefix gradient: a sequence's own mask left out": (
        "prefix_grad", "part = tl.where(keep, part * factor, 0.0)", "part = part * factor", attention(dropped)),
    "long: delta of the kept output wrong": (
        "prefix_attention_long", "delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)",
        "delta = tl.sum(do.to(tl.float32), 1)",
        attention(long)),
    "long: last key block left out of dq": (
        "prefix_attention_long",
        "        for j in range(begin, end, BLOCK_N):\n            k = load_tile(k_TND + n * D, start + j, k_row",
        "        for j in range(begin, end - 5, BLOCK_N):\n            k = load_tile(k_TND + n * D, start + j, k_row",
        attention(long)),
    "ranges: a causal query sees the token behind it": (
        "attention_tile", "(keys[None, :] < high[:, None]))", "(keys[None, :] <= high[:, None]))", attention(causal)),
    "ranges: the context is one token short": (
        "attention_tile", "return (keys < context)[None, :]", "return (keys < context - 1)[None, :]", attention(causal)),
    "ranges: key blocks before the window's are taken for its first": (
        "attention_tile", "tl.maximum(tl.min(low, 0), 0) // BLOCK_N", "tl.maximum(tl.max(low, 0), 0) // BLOCK_N",
        attention(window)),
    "ranges: a query tile that sees a key block is passed over": (
        "prefix_attention_long", "(tl.max(high, 0) > first))", "(tl.max(high, 0) > first + BLOCK_N))", attention(window)),
    "packed: a row sees the sequence behind its own": (
        "prefix_attention_short", "seen = index.to(tl.uint32) < (end - start).to(tl.uint32)[:, None]",
        "seen = index.to(tl.uint32) < (end - start + 1).to(tl.uint32)[:, None]", attention(packed)),
    "packed: keys from the tile's first row on only": (
        "prefix_attention_short", "for j in range(tl.load(cu_seqlens + first_sequence), stop, BLOCK_N)",
        "for j in range(tl.maximum(tl.load(cu_seqlens + first_sequence), first), stop, BLOCK_N)", attention(packed)),
    "packed: keys up to the tile's last row only": (
        "prefix_attention_short", "for j in range(tl.load(cu_seqlens + first_sequence), stop, BLOCK_N)",
        "for j in range(tl.load(cu_seqlens + first_sequence), tl.minimum(stop, first + BLOCK_M), BLOCK_N)", attention(packed)),
    "packed: a sequence's first token counts to the one before": (
        "attention_tile", "inside = rows >= edge", "inside = rows > edge", attention(packed)),
    "packed: rows of no sequence left as they are": (
        "prefix_attention_short", "real = rows < end", "real = rows >= 0", attention(packed)),
    "packed: the masks' rows are those of the tile": (
        "prefix_attention_short", "keep_bits(rows - start, c2", "keep_bits(rows - first, c2", attention(packed_dropped)),
    "packed: the masks' columns are those of the tile": (
        "prefix_attention_short", "(index & 63)", "((index + 1) & 63)", attention(packed_dropped)),
    "packed: every row draws the first sequence's masks": (
        "prefix_attention_short", "c2 = (sequence * N + n)[:, None]", "c2 = (sequence * 0 + n)[:, None]",
        attention(packed_dropped)),
    "packed: the prefix's mask is drawn for other rows": (
        "prefix_attention_short", "keep_rows(rows - start, 0, c2", "keep_rows(rows, 0, c2", attention(packed_dropped)),
    "packed sweep: a key takes the gradient of the sequence before": (
        "prefix_attention_short", "seen = index.to(tl.uint32) < (end - start).to(tl.uint32)[None, :]",
        "seen = index.to(tl.uint32) < (end - start + 1).to(tl.uint32)[None, :]", attention(packed)),
    "packed sweep: what does not fit the first key block is left out": (
        "prefix_attention_short", "sequence = stop_sequence", "sequence = next_sequence", attention(packed)),
    "packed sweep: one sequence too many in a key block": (
        "prefix_attention_short", "<= limit, b + 1, found)", "<= limit + 40, b + 1, found)", attention(packed)),
    "packed sweep: a window's last sequence left out": (
        "prefix_attention_short", "next_sequence = tl.minimum(sequence_of(cu_seqlens, window_end - 1, B) + 1, B)",
        "next_sequence = tl.minimum(sequence_of(cu_seqlens, window_end - 1, B), B)", attention(packed)),
    "packed sweep: rows of no sequence left as they are": (
        "prefix_attention_short", "tl.maximum(tl.load(cu_seqlens + B), window), window_end", "window_end, window_end",
        attention(packed)),
    "packed sweep: delta without the prefix": (
        "prefix_attention_short", "delta += tl.sum(p_probs * p_dprobs, 0)", "delta += 0.0", attention(packed)),
    "packed dq: without delta": (
        "prefix_attention_short_bwd", "dq = tl.dot((probs * (dprobs - delta[:, None]))", "dq = tl.dot((probs * dprobs)",
        attention(packed_apart)),
    "packed dq: rows of no sequence taken for real": (
        "prefix_attention_short_bwd", "num_rows = tl.load(cu_seqlens + B) - first", "num_rows = T - first",
        attention(packed_apart)),
    "packed dq: a row sees the sequence behind its own": (
        "prefix_attention_short_bwd", "(end - start).to(tl.uint32)[:, None]", "(end - start + 1).to(tl.uint32)[:, None]",
        attention(packed_apart)),
    "packed dk, dv: queries before the tile left out": (
        "prefix_attention_short_bwd", "for row in range(tl.load(cu_seqlens + first_sequence), stop, BLOCK_M)",
        "for row in range(first, stop, BLOCK_M)", attention(packed_apart)),
    "packed dk, dv: queries behind the tile left out": (
        "prefix_attention_short_bwd", "for row in range(tl.load(cu_seqlens + first_sequence), stop, BLOCK_M)",
        "for row in range(tl.load(cu_seqlens + first_sequence), tl.minimum(stop, first + BLOCK_N), BLOCK_M)",
        attention(packed_apart)),
    "sum of partials: one window left out": ("prefix_grad", "mine = rows < C", "mine = rows < C - 1", attention(packed)),
    "list: a sequence's first tile again and again": ("tile_list", "t + 0 * mine", "0 * t + 0 * mine", attention(listed)),
    "list: what is left over clears only a part": (
        "tile_list", "rows - used, mask", "rows - used + 1, mask", attention(listed)),
    "relative: the band is read one column off": (
        "disentangled_band", "tl.arange(0, BLOCK_N)[None, :] + (BLOCK_N - 1)\n\n", "tl.arange(0, BLOCK_N)[None, :] + BLOCK_N\n\n",
        relative),
    "relative: p2c read with queries and keys exchanged": (
        "disentangled_band", "tl.trans(tl.gather(band, tl.trans(meeting_column(BLOCK_M, BLOCK_N)), 1))",
        "tl.gather(band, meeting_column(BLOCK_M, BLOCK_N), 1)", relative),
    "relative: dq without the band": (
        "disentangled_attention_bwd", "dq = tl.dot(skewed_by_query(", "_ = tl.dot(skewed_by_query(", relative),
    "relative: dk's band shifted": (
        "disentangled_band", "tl.arange(0, BAND)[None, :] - (BLOCK_N - 1)", "tl.arange(0, BAND)[None, :] - BLOCK_N", relative),
    "add_norm: the sum's gradient is lost": (
        "add_norm", "dsum += tl.load(dsum_TH", "dsum += 0 * tl.load(dsum_TH",
        lambda package: check_add_norm(5, 100, fp32, package=package, with_sum=True)),
    "add_norm: the sum without its residual": (
        "add_norm", "tl.store(sum_TH + offsets, x.to(", "tl.store(sum_TH + offsets, (0 * x).to(",
        lambda package: check_add_norm(5, 100, fp32, package=package, with_sum=True)),
    "long: dk, dv see one query tile less": (
        "prefix_attention_long", "for i in range(0, length, BLOCK_M)", "for i in range(BLOCK_M, length, BLOCK_M)",
        attention(long)),
}


def mutant(folder: Path, name: str, file: str, old: str, new: str) -> str:
    """The package name of a copy of kernels/ in which `old` reads `new` in one file."""
    package = folder / name
    package.mkdir()
    for path in SOURCE.glob("*.py"):
        text = path.read_text()
        if path.stem == file:
            assert old in text, f"the mutation of {file}.py no longer applies: {old!r} is gone"
            text = text.replace(old, new)
        (package / path.name).write_text(text.replace(KERNELS, name))
    return name


@pytest.mark.parametrize("title", MUTATIONS)
def test_the_check_fails(title, tmp_path, monkeypatch):
    file, old, new, check = MUTATIONS[title]
    name = f"mutant_{list(MUTATIONS).index(title)}"
    monkeypatch.syspath_prepend(tmp_path)
    package = mutant(tmp_path, name, file, old, new)
    try:
        with pytest.raises(AssertionError):
            check(package)
    finally:
        for module in [m for m in sys.modules if m.split(".")[0] == name]:
            del sys.modules[module]


@pytest.mark.parametrize("case", [plain, fused, apart, long, dropped, dropped_fused, packed, packed_dropped, packed_apart,
                                  listed], ids=lambda case: str(case.lengths))
def test_the_same_checks_pass_on_the_kernels_themselves(case):
    check_attention(case)
