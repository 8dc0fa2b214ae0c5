"""Compile, without a GPU, exactly what the launchers would launch; print registers, spills and shared memory as JSON lines.

Run in a process of its own without TRITON_INTERPRET: `python aot.py` for the cases and architectures of the test, `python aot.py
80,90,100 "D64"` for some cases on any, `--markdown docs/compiled.md` for the committed table. The launchers are called on small
CPU tensors with the launch replaced by a recorder (ptv2_engine/compiled.py).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from compiled_table import markdown
from ptv2_engine.kernels import (
    add_norm,
    dequantise,
    disentangled_attention,
    dropout,
    embedding,
    geglu,
    linear_gelu,
    prefix_attention,
    rotary,
)

from ptv2_engine.compiled import compile_launch, recorded

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


def attention(S: int, P: int, D: int, dtype: torch.dtype, dropout: float = 0.0, need_tokens: bool = True,
              prompts: torch.dtype | None = None, N: int = 4, ranged: bool = False) -> None:
    """Forward and backward of a layer shaped like the encoder's: one fused qkv buffer, two sequences; prompts: the ids' dtype;
    ranged: queries that do not see every token."""
    T, K = 2 * S, 1 if prompts is None else 3
    ids, lengths = (None, None) if prompts is None else (torch.zeros(2, dtype=prompts), torch.full((3,), P, dtype=prompts))
    qkv = torch.zeros(T, 3, N, D, dtype=dtype)
    q, k, v = qkv.unbind(1)
    prefix = [torch.zeros(K, P, N, D, dtype=dtype) for _ in range(2)] if P else [None, None]
    plain = (torch.tensor([0, S, T], dtype=torch.int32), S, ids, lengths, 0.125, dropout, dropout,
             torch.zeros(1, dtype=torch.int64), 3)
    ranges = (torch.zeros(2, dtype=torch.int32), torch.zeros(T, 2, dtype=torch.int32)) if ranged else (None, None)
    out, lse = prefix_attention.prefix_attention_fwd(q, k, v, *prefix, *plain, *ranges)
    given = out if S + P > 1024 else None
    prefix_attention.prefix_attention_bwd(torch.zeros_like(out), q, k, v, *prefix, given, lse, *plain, *ranges, need_tokens,
                                          P > 0)


def short_rows(S: int, P: int, D: int, dtype: torch.dtype, dropout: float = 0.0, need_tokens: bool = True) -> None:
    """Forward and backward of a batch of 64 sequences of up to S tokens, S / 2 on average."""
    B, N, T = 64, 12, 32 * S
    q, k, v = torch.zeros(T, 3, N, D, dtype=dtype).unbind(1)
    prefix = [torch.zeros(1, P, N, D, dtype=dtype) for _ in range(2)] if P else [None, None]
    plain = (torch.zeros(B + 1, dtype=torch.int32), S, None, None, 0.125, dropout, 0.0, torch.zeros(1, dtype=torch.int64), 3,
             None, None)
    out, lse = prefix_attention.prefix_attention_fwd(q, k, v, *prefix, *plain)
    prefix_attention.prefix_attention_bwd(torch.zeros_like(out), q, k, v, *prefix, None, lse, *plain, need_tokens, P > 0)


def unlike_rows(S: int, P: int, D: int, dtype: torch.dtype, dropout: float = 0.0) -> None:
    """Forward and backward of 64 sequences of up to S tokens, S / 8 on average: their tiles come from a list."""
    B, N, T = 64, 12, 8 * S
    q, k, v = torch.zeros(T, 3, N, D, dtype=dtype).unbind(1)
    prefix = [torch.zeros(1, P, N, D, dtype=dtype) for _ in range(2)] if P else [None, None]
    plain = (torch.zeros(B + 1, dtype=torch.int32), S, None, None, 0.125, dropout, dropout, torch.zeros(1, dtype=torch.int64), 3,
             None, None)
    out, lse = prefix_attention.prefix_attention_fwd(q, k, v, *prefix, *plain)
    prefix_attention.prefix_attention_bwd(torch.zeros_like(out), q, k, v, *prefix, None, lse, *plain, True, P > 0)


def row_ops(H: int, dtype: torch.dtype, p: float) -> None:
    x, weight, seed = torch.zeros(8, H, dtype=dtype), torch.zeros(H, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    ids = torch.zeros(8, dtype=torch.int64)
    for total in (False, True):
        _, xhat, rstd, _, _ = add_norm.add_norm_fwd(x, x, weight, weight, 1e-12, p, seed, 1, "full", total)
        add_norm.add_norm_bwd(x, x if total else None, xhat, None, rstd, weight, p, seed, 1)
        _, codes, rstd, scales, _ = add_norm.add_norm_fwd(x, x, weight, weight, 1e-12, p, seed, 1, "int8", total)
        add_norm.add_norm_bwd(x, x if total else None, codes, scales, rstd, weight, p, seed, 1)
    add_norm.renorm(codes, scales, weight, weight, dtype)
    embedding.embedding(ids, ids, ids, x, x, x, weight, weight, 1e-12, p, seed, 1)
    dropout.dropout(x, p, seed, 1)


def gelu(dtype: torch.dtype, approximate: str) -> None:
    z = torch.zeros(8, 64, dtype=dtype)
    for bits in (8, 6):
        linear_gelu.gelu_bwd(z, linear_gelu.gelu_(z, approximate, True, bits), bits)


def disentangled(S: int, P: int, D: int, dtype: torch.dtype, dropout: float = 0.0, terms: str = "c2p p2c") -> None:
    """Forward and backward of a DeBERTa layer: two sequences, tables of 512 rows."""
    T, N = 2 * S, 4
    q, k, v = torch.zeros(T, 3, N, D, dtype=dtype).unbind(1)
    prefix = [torch.zeros(1, P, N, D, dtype=dtype) for _ in range(2)] if P else [None, None]
    tables = [torch.zeros(512, N, D, dtype=dtype) if term in terms else None for term in ("c2p", "p2c")]
    plain = (torch.tensor([0, S, T], dtype=torch.int32), S, None, None, 0.07, dropout, dropout,
             torch.zeros(1, dtype=torch.int64), 3)
    slots = torch.zeros(2 * S - 1, dtype=torch.int32)
    out, lse = disentangled_attention.disentangled_attention_fwd(q, k, v, *prefix, *tables, slots, *plain)
    disentangled_attention.disentangled_attention_bwd(torch.zeros_like(out), q, k, v, *prefix, *tables, slots, out, lse, *plain,
                                                      True, P > 0)


def modernbert(dtype: torch.dtype) -> None:
    """RoPE and GEGLU of a layer of ModernBERT-base."""
    qkv, z = torch.zeros(8, 3, 12, 64, dtype=dtype), torch.zeros(8, 2304, dtype=dtype)
    rotary.rotary_(qkv, torch.zeros(16, 64), torch.zeros(8, dtype=torch.int64), True)
    geglu.geglu_bwd(geglu.geglu_fwd(z), z)


def dequantised(kind: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    """A frozen weight [rows, columns] of 8 or 4 bits."""
    stored = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "nf4": torch.uint8}[kind]
    codes, scales = (rows * columns // 2, rows * columns // 64) if kind == "nf4" else ((rows, columns), rows)
    dequantise.dequantise(torch.zeros(codes, dtype=stored), torch.zeros(scales), kind, rows, columns, dtype)


# What the engine launches by default. fp16 compiles to the same code as bf16 but for the mma's type: one case of it.
# Every case on H100; the ones with the fullest registers elsewhere too.
CASES: dict[str, tuple[Callable[[], None], tuple[int, ...]]] = {
    "S64 P16 D64 bf16, prompts": (lambda: attention(64, 16, 64, bf16, prompts=torch.int64, N=1), (80, 90)),
    "S128 P20 D64 bf16": (lambda: attention(128, 20, 64, bf16), (90,)),
    "S128 P20 D64 bf16 dropout": (lambda: attention(128, 20, 64, bf16, 0.1), (80, 90, 100)),
    "S128 P16 D64 fp16, no dqkv": (lambda: attention(128, 16, 64, fp16, need_tokens=False, prompts=torch.int32), (90,)),
    "S512 P128 D64 bf16 dropout": (lambda: attention(512, 128, 64, bf16, 0.1), (80, 90, 100)),
    "S4096 P128 D64 bf16": (lambda: attention(4096, 128, 64, bf16), (90,)),
    "S64 P20 D128 bf16 dropout": (lambda: attention(64, 20, 128, bf16, 0.1), (80, 90)),
    "S512 P128 D80 bf16 dropout": (lambda: attention(512, 128, 80, bf16, 0.1), (80, 90, 100)),
    "S512 P128 D128 bf16": (lambda: attention(512, 128, 128, bf16), (90,)),
    "S128 P16 D64 fp32": (lambda: attention(128, 16, 64, fp32), (90,)),
    "S128 P128 D128 fp32 dropout": (lambda: attention(128, 128, 128, fp32, 0.1), (90, 100)),
    "H1024 bf16 dropout": (lambda: row_ops(1024, bf16, 0.1), (90,)),
    "H768 fp32": (lambda: row_ops(768, fp32, 0.0), (90,)),
    "H4096 bf16 dropout": (lambda: row_ops(4096, bf16, 0.1), (90,)),
    "S128 P16 D64 bf16 dropout, ranges": (lambda: attention(128, 16, 64, bf16, 0.1, ranged=True), (80, 90)),
    "S1024 P16 D64 bf16, ranges": (lambda: attention(1024, 16, 64, bf16, ranged=True), (90, 100)),
    "S512 P160 D64 bf16, ranges": (lambda: attention(512, 160, 64, bf16, ranged=True), (90, 100)),
    "short S32 P16 D64 bf16": (lambda: short_rows(32, 16, 64, bf16), (90, 100)),
    "short S64 P20 D64 bf16 dropout": (lambda: short_rows(64, 20, 64, bf16, 0.1), (80, 90)),
    "short S32 P5 D32 fp16 dropout, no dqkv": (lambda: short_rows(32, 5, 32, fp16, 0.1, False), (90,)),
    "short S64 P128 D64 bf16 dropout": (lambda: short_rows(64, 128, 64, bf16, 0.1), (80, 90)),
    "short S64 P128 D128 bf16 dropout": (lambda: short_rows(64, 128, 128, bf16, 0.1), (80,)),
    "unlike S512 P16 D64 bf16": (lambda: unlike_rows(512, 16, 64, bf16), (90, 100)),
    "unlike S512 P128 D64 bf16 dropout": (lambda: unlike_rows(512, 128, 64, bf16, 0.1), (80,)),
    "unlike S512 P20 D80 bf16 dropout": (lambda: unlike_rows(512, 20, 80, bf16, 0.1), (80,)),
    "S512 P20 D64 fp32 dropout": (lambda: attention(512, 20, 64, fp32, 0.1), (90,)),
    "S128 P20 D80 bf16 dropout, ranges": (lambda: attention(128, 20, 80, bf16, 0.1, ranged=True), (80, 100)),
    "DeBERTa S128 P20 D64 bf16": (lambda: disentangled(128, 20, 64, bf16), (80, 90, 100)),
    "DeBERTa S512 P20 D64 bf16 dropout": (lambda: disentangled(512, 20, 64, bf16, 0.1), (80, 90)),
    "DeBERTa S512 P100 D64 bf16, c2p": (lambda: disentangled(512, 100, 64, bf16, terms="c2p"), (90,)),
    "DeBERTa S32 P0 D64 fp16": (lambda: disentangled(32, 0, 64, fp16), (90,)),
    "DeBERTa S128 P20 D128 bf16 dropout": (lambda: disentangled(128, 20, 128, bf16, 0.1), (90,)),
    "DeBERTa S128 P20 D64 fp32": (lambda: disentangled(128, 20, 64, fp32), (90,)),
    "rotary and geglu bf16": (lambda: modernbert(bf16), (90,)),
    "int8 1024x4096 to bf16": (lambda: dequantised("int8", 1024, 4096, bf16), (80, 90, 100)),
    "fp8 4096x1024 to bf16": (lambda: dequantised("fp8", 4096, 1024, bf16), (80, 90, 100)),
    "fp8 3072x768 to fp32": (lambda: dequantised("fp8", 3072, 768, fp32), (80, 90)),
    "nf4 4096x1024 to bf16": (lambda: dequantised("nf4", 4096, 1024, bf16), (80, 90, 100)),
    "nf4 3072x768 to fp32": (lambda: dequantised("nf4", 3072, 768, fp32), (80, 90)),
    "gelu bf16": (lambda: gelu(bf16, "none"), (90,)),
    "gelu tanh fp32": (lambda: gelu(fp32, "tanh"), (90,)),
}


def compile_case(name: str, sm: int) -> list[dict[str, Any]]:
    """One row per distinct launch of a case."""
    rows = [{"case": name} | compile_launch(launch, sm) for launch in recorded(CASES[name][0])]
    return [row for i, row in enumerate(rows) if row not in rows[:i]]


def rows_of(archs: list[int] | None, word: str) -> Iterator[dict[str, Any]]:
    """The rows of all cases whose name has the word, on these architectures or on those that each case names."""
    jobs = [(name, sm) for name in CASES if word in name for sm in archs or CASES[name][1]]
    with ProcessPoolExecutor(2) as pool:
        for rows in pool.map(compile_case, *zip(*jobs, strict=True)):
            yield from rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archs", nargs="?", help="e.g. 80,90,100; default: those of each case")
    parser.add_argument("word", nargs="?", default="", help="only cases whose name has it")
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    args = parser.parse_args()
    rows = []
    for row in rows_of([int(sm) for sm in args.archs.split(",")] if args.archs else None, args.word):
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.markdown:
        command = shlex.join(["python", "tests/kernels/aot.py", *sys.argv[1:]])
        args.markdown.write_text(markdown(rows, triton.__version__, command))


if __name__ == "__main__":
    main()
