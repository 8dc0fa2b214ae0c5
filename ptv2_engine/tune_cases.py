"""What `ptv2 tune` runs: shapes by name, and the launchers on inputs of a shape, real ones or (device "meta") only sizes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptv2_engine.compiled import recorded
from ptv2_engine.errors import ConfigError
from ptv2_engine.kernels import add_norm, disentangled_attention, embedding, prefix_attention
from ptv2_engine.kernels.tuning import PACKED_TOKENS
from ptv2_engine.ops.prefix_attention import TRITON_HEAD_DIMS, TWO_PASS_KEYS
from ptv2_engine.testing import cu_seqlens_of

# kernel of tile_table.FIELDS -> the functions that its tiles are for; the first one says that the kernel is there
LAUNCHES = {"forward": ("forward_kernel",), "sweep": ("sweep_kernel",), "dq": ("dq_kernel",), "dkdv": ("dkdv_kernel",),
            "prefix": ("prefix_grad_kernel", "reduce_kernel"), "packed_forward": ("packed_forward_kernel",),
            "packed_sweep": ("packed_sweep_kernel",), "packed_dq": ("packed_dq_kernel",), "packed_dkdv": ("packed_dkdv_kernel",),
            "relative_forward": ("relative_forward_kernel",),
            "relative_dq": ("relative_dq_kernel",), "relative_dkdv": ("relative_dkdv_kernel",),
            "rows": ("add_norm_fwd_kernel", "add_norm_bwd_kernel", "renorm_kernel", "embedding_kernel")}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS, HIDDEN, DROPOUT = 16384, 1024, 0.1
Call = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Shape:
    """Attention with rows of up to S tokens, P prefix rows and heads of D (relative: DeBERTa's), or with D = 0 rows of H."""

    S: int = 0
    P: int = 0
    D: int = 0
    dtype: str = "bf16"
    dropout: bool = False
    relative: bool = False
    H: int = 0

    def __str__(self) -> str:
        if self.H:
            return f"H{self.H}"
        parts = ["relative"] * self.relative + [f"S{self.S}", f"P{self.P}", f"D{self.D}", self.dtype] + ["dropout"] * self.dropout
        return "-".join(parts)


def named(name: str) -> Shape:
    """S128-P16-D64-bf16, the same with -dropout behind or relative- before it, or H1024. Raises ConfigError."""
    if match := re.fullmatch(r"H(\d+)", name):
        shape = Shape(H=int(match[1]))
    elif match := re.fullmatch(r"(relative-)?S(\d+)-P(\d+)-D(\d+)-(bf16|fp16|fp32)(-dropout)?", name):
        shape = Shape(int(match[2]), int(match[3]), int(match[4]), match[5], bool(match[6]), bool(match[1]))
    else:
        raise ConfigError(f"--shapes {name!r} is neither short nor full nor a shape like S128-P16-D64-bf16-dropout, "
                          "relative-S128-P16-D64-bf16 or H1024.")
    if not (0 < shape.H <= TOKENS or 0 < shape.S <= TOKENS and shape.P <= TOKENS and shape.D in TRITON_HEAD_DIMS):
        raise ConfigError(f"--shapes {name}: S and H must be 1 to {TOKENS}, P at most that, D one of "
                          f"{', '.join(map(str, TRITON_HEAD_DIMS))}.")
    return shape


def short() -> list[Shape]:
    """The classes that most NLU runs are in."""
    plain = [Shape(S, P, 64, dropout=True) for S, P in ((32, 16), (64, 16), (128, 16), (512, 16), (128, 128))]
    return [*plain, Shape(128, 32, 64, dropout=True, relative=True), Shape(H=768), Shape(H=1024)]


def full() -> list[Shape]:
    """Every class that the published models and data sets reach."""
    lengths, prompts, dropouts = (32, 64, 128, 256, 512, 1024, 2048), (0, 16, 32, 128, 256), (False, True)
    plain = [Shape(S, P, D, dropout=drops) for S, P, D, drops in itertools.product(lengths, prompts, (64, 80, 128), dropouts)]
    exact = [Shape(S, P, 64, "fp32", drops) for S, P, drops in itertools.product(lengths[:5], prompts[1:4], dropouts)]
    relative = [Shape(S, P, 64, dropout=drops, relative=True)
                for S, P, drops in itertools.product(lengths[:5], prompts[:4], dropouts)]
    return [*plain, *exact, *relative, *(Shape(H=width) for width in (256, 384, 512, 768, 1024, 1536, 2048, 4096))]


def lengths_of(shape: Shape) -> list[int]:
    """A ragged batch of half the longest row on average: S, 1/2, 1/4 and 1/4 of it in turn, TOKENS together."""
    turn = [max(1, shape.S * part // 4) for part in (4, 2, 1, 1)]
    found: list[int] = []
    left = TOKENS
    for length in itertools.cycle(turn):
        if length > left:
            return found
        found.append(length)
        left -= length
    return found


def calls(shape: Shape, device: str, seed: int = 0, **options: Any) -> dict[str, Call]:
    """Calls of the launchers on inputs of this shape: {"forward", "backward"} of an attention, {"both"} of row ops.

    Short rows with dropout come with their prefix kept too, since only those are packed. seed: of the numbers. options:
    _attention's. What backward takes from forward is made here.
    """
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def draw(*size: int, dtype: torch.dtype = DTYPES[shape.dtype]) -> Tensor:
        if device == "meta":
            return torch.empty(size, device=device, dtype=dtype)
        return torch.randn(size, device=device, generator=generator).to(dtype)

    if shape.H:
        return _rows(shape, draw, device)
    found = _attention(shape, draw, device, **options)
    if shape.dropout and shape.P and not shape.relative and shape.S <= PACKED_TOKENS:
        kept = _attention(shape, draw, device, **options | {"prefix_dropout": 0.0})
        found |= {f"{name}, prefix kept": call for name, call in kept.items()}
    return found


def _attention(shape: Shape, draw: Callable[..., Tensor], device: str, dropout: float | None = None,
               prefix_dropout: float | None = None, ids: torch.dtype | None = None, ranged: bool = False, keep_out: bool = False,
               need_tokens: bool = True, lengths: list[int] | None = None) -> dict[str, Call]:
    """dropout, prefix_dropout: instead of the shape's. ids: several prompts, by ids of this dtype. ranged: not every token is
    seen (only sizes). keep_out: backward reads the output. need_tokens: as the launchers'. lengths: not lengths_of(shape)."""
    S, P, D = shape.S, shape.P, shape.D
    N, K, lengths = max(1, HIDDEN // D), 1 if ids is None else 3, lengths or lengths_of(shape)
    T, B = sum(lengths), len(lengths)
    q, k, v = draw(T, 3, N, D).unbind(1)
    prefix = [draw(K, P, N, D) for _ in range(2)] if P else [None, None]
    dout = draw(T, N, D)
    of = lambda *size, dtype=torch.int32: torch.zeros(size, device=device, dtype=dtype)
    prompts = (None, None) if ids is None else (of(B, dtype=ids), of(K, dtype=ids))
    p = DROPOUT if shape.dropout else 0.0
    plain = (cu_seqlens_of(lengths).to(device), S, *prompts, D**-0.5, p if dropout is None else dropout,
             (p if prefix_dropout is None else prefix_dropout) if P else 0.0, of(1, dtype=torch.int64), 3)
    if shape.relative:
        tables = (draw(512, N, D), draw(512, N, D), torch.arange(2 * S - 1, device=device, dtype=torch.int32) % 512)
        forward: Call = lambda: disentangled_attention.disentangled_attention_fwd(q, k, v, *prefix, *tables, *plain)
        saved = _outputs(forward, device)
        return {"forward": forward, "backward": lambda: disentangled_attention.disentangled_attention_bwd(
            dout, q, k, v, *prefix, *tables, *saved, *plain, need_tokens, P > 0)}
    seen = (of(B), of(T, 2)) if ranged else (None, None)
    forward = lambda: prefix_attention.prefix_attention_fwd(q, k, v, *prefix, *plain, *seen)
    out, lse = _outputs(forward, device)
    return {"forward": forward, "backward": lambda: prefix_attention.prefix_attention_bwd(
        dout, q, k, v, *prefix, out if keep_out or S + P > TWO_PASS_KEYS else None, lse, *plain, *seen, need_tokens, P > 0)}


def _rows(shape: Shape, draw: Callable[..., Tensor], device: str) -> dict[str, Call]:
    """add_norm with dropout, forward and backward."""
    x, residual, dy = (draw(TOKENS, shape.H) for _ in range(3))
    weight, bias, seed = draw(shape.H), draw(shape.H), torch.zeros(1, device=device, dtype=torch.int64)

    def both() -> list[Tensor]:
        y, xhat, rstd, _, _ = add_norm.add_norm_fwd(x, residual, weight, bias, 1e-12, DROPOUT, seed, 1, "full", False)
        return [y, xhat, rstd, *add_norm.add_norm_bwd(dy, None, xhat, None, rstd, weight, DROPOUT, seed, 1)]

    return {"both": both}


def _outputs(call: Call, device: str) -> list[Tensor]:
    """What a call returns; on "meta" without a launch."""
    found: list[Tensor] = []
    recorded(lambda: found.extend(call()), run=device != "meta")
    return found


def variants(shape: Shape) -> Iterator[dict[str, Call]]:
    """Calls, of sizes only, that take the same tiles and compile to other code."""
    if shape.H:
        yield {"both": lambda: _all_rows(shape.H)}
        return
    # sequences that are alike, and so many that the launchers list their tiles
    options: list[dict[str, Any]] = [{"need_tokens": False}, {"lengths": [shape.S] * 2}, {"lengths": lengths_of(shape) * 16}]
    options += [{"ids": dtype} for dtype in (torch.int32, torch.int64)] if shape.P else []
    options += [{"dropout": 0.0}, {"prefix_dropout": 0.0}] if shape.dropout and shape.P else []
    options += [] if shape.relative else [{"ranged": True}, {"keep_out": True}]
    yield from (calls(shape, "meta", **option) for option in options)


def _all_rows(width: int) -> list[Tensor]:
    """Everything that takes the tiles of rows of this width, in both precisions."""
    of = lambda *size, dtype: torch.empty(size, device="meta", dtype=dtype)
    ids, seed = of(8, dtype=torch.int64), of(1, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = of(8, width, dtype=dtype), of(width, dtype=dtype)
        embedding.embedding(ids, ids, ids, x, x, x, weight, weight, 1e-12, DROPOUT, seed, 1)
        for keep, p in itertools.product(("full", "int8"), (0.0, DROPOUT)):
            _, xhat, rstd, scales, total = add_norm.add_norm_fwd(x, x, weight, weight, 1e-12, p, seed, 1, keep, True)
            scales = scales if keep == "int8" else None
            add_norm.add_norm_bwd(x, total, xhat, scales, rstd, weight, p, seed, 1)
            add_norm.renorm(xhat, scales, weight, weight, dtype)
    return []
