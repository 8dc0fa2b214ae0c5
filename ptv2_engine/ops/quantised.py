"""quantised: frozen weights [O, I] held in 8 or 4 bits, and dequantise: W~ = value(code) * scale in the compute dtype.

A weight is quantised once at load and dequantised on the fly into a transient matrix that a stock GEMM (cuBLAS, oneDNN) then
multiplies; dX = dY W~ dequantises again. Nothing is saved for backward but the codes, which the layer holds anyway; a frozen
weight has no gradient, so neither has this op.

Why not inside the GEMM: training batches hold thousands of tokens T, so the product is 2*T*O*I flops against 3*O*I bytes of
dequantising (8 bits read, bf16 written): about 4 % of an H100 GEMM at T = 8192 [predicted, 800 TFLOP/s and 3.35 TB/s], while a
fused dequantising Triton GEMM gives up far more of cuBLAS.

    kind  codes                        scales                     bits a weight        error
    int8  int8 [O, I]                  fp32 [O], absmax / 127     8 + 32 / I           half a scale
    fp8   float8_e4m3fn [O, I]         fp32 [O], absmax / 448     8 + 32 / I           2^-4 of the weight, or 2^-10 of a scale
    nf4   uint8 [O * I / 2]            fp32 [O * I / 64], absmax  4.5                  half the gap between two of 16 levels

NF4 is QLoRA's (arXiv 2305.14314): blocks of 64 of the flattened weight, two codes a byte, the first in the high nibble, as
bitsandbytes stores it. Its absmax stays fp32: double quantisation would save 0.37 bits of 4.5 for a second level of scales.
The weight is by definition the fp32 product of value and scale, rounded once to the dtype: every backend gives the same bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ptv2_engine.errors import InputError
from ptv2_engine.kernels import nf4
from ptv2_engine.ops._dispatch import choose, describe, launcher

torch.library.define("ptv2::dequantise",
                     "(Tensor codes, Tensor scales, str kind, int rows, int columns, ScalarType dtype) -> Tensor weight_OI")

KINDS = ("int8", "fp8", "nf4")
_CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "nf4": torch.uint8}
_LARGEST = {"int8": 127.0, "fp8": 448.0}
# Weights quantised at a time: beside the result at most 14 bytes each are alive, 28 MB.
_CHUNK = 1 << 21


class Quantised(NamedTuple):
    """A weight [O, I] in 8 or 4 bits; the module's docstring says what the tensors hold."""

    kind: str
    codes: Tensor
    scales: Tensor
    shape: tuple[int, int]

    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


@torch.library.register_fake("ptv2::dequantise")
def _fake(codes: Tensor, scales: Tensor, kind: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty((rows, columns), dtype=dtype)


def reference(q: Quantised, dtype: torch.dtype) -> Tensor:
    """dequantise in plain PyTorch."""
    if q.kind == "nf4":
        index = torch.stack((q.codes >> 4, q.codes & 15), -1).int()
        levels = torch.tensor(nf4.LEVELS, dtype=torch.float32, device=q.codes.device)
        values = levels.index_select(0, index.view(-1)).view(-1, nf4.BLOCK)
    else:
        values = q.codes.float()
    return (values * q.scales[:, None]).to(dtype).view(q.shape)


def _quantise_rows(rows: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of float32 rows [R, I]."""
    scales_R = rows.abs().amax(1) / _LARGEST[kind]
    # A scale that underflowed has lost its bits, so that the quotient may leave the range; where it is 0 so are the codes.
    scaled = rows.div(scales_R.where(scales_R > 0, 1.0)[:, None]).clamp_(-_LARGEST[kind], _LARGEST[kind])
    return (scaled.round_() if kind == "int8" else scaled).to(_CODES[kind]), scales_R


def _quantise_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes and absmax of float32 blocks [B, 64]."""
    absmax_B = blocks.abs().amax(1)
    levels = torch.tensor(nf4.LEVELS, dtype=torch.float32, device=blocks.device)
    scaled = blocks / absmax_B.where(absmax_B > 0, 1.0)[:, None]
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], absmax_B


@torch.no_grad()
def quantise(weight_OI: Tensor, kind: str) -> Quantised:
    """A frozen weight in 8 or 4 bits.

    Arguments:
        weight_OI: [O, I] of any float dtype on any device, finite (which the caller checks); fake tensors too.
        kind: "int8", "fp8" or "nf4"; O * I must be a multiple of 64 for nf4.
    Returns:
        Quantised, on the weight's device. Raises InputError.
    """
    if kind not in KINDS:
        raise InputError(f"quantise: kind {kind!r} does not exist; choose one of {', '.join(KINDS)}.")
    if weight_OI.dim() != 2 or not weight_OI.is_floating_point() or weight_OI.numel() == 0:
        raise InputError(f"quantise: the weight {describe(weight_OI)} must be a float matrix [O, I] with at least one element.")
    height, width = shape = weight_OI.shape[0], weight_OI.shape[1]
    size, block = height * width, nf4.BLOCK
    if kind == "nf4" and size % block:
        raise InputError(f"quantise: nf4 takes weights in blocks of {block}, but {height} x {width} = {size} is not a multiple "
                         f'of it; choose kind "int8" for this weight.')
    codes = weight_OI.new_empty(size // 2 if kind == "nf4" else shape, dtype=_CODES[kind])
    scales = weight_OI.new_empty(size // block if kind == "nf4" else height, dtype=torch.float32)
    # blocks run on from row to row: a chunk holds whole ones
    whole = block // math.gcd(width, block) if kind == "nf4" else 1
    chunk = size if isinstance(weight_OI, FakeTensor) else _CHUNK       # what takes no memory needs no pieces
    step = max(chunk // (width * whole), 1) * whole
    for first in range(0, height, step):
        last = min(first + step, height)
        rows = weight_OI[first:last].float().contiguous()
        if kind == "nf4":
            part, part_scales = _quantise_blocks(rows.reshape(-1, block))
            codes[first * width // 2:last * width // 2] = part
            scales[first * width // block:last * width // block] = part_scales
        else:
            codes[first:last], scales[first:last] = _quantise_rows(rows, kind)
    return Quantised(kind, codes, scales, shape)


def _check(q: Quantised) -> None:
    rows, columns = q.shape
    size = rows * columns
    codes, scales = ((size // 2,), (size // nf4.BLOCK,)) if q.kind == "nf4" else (q.shape, (rows,))
    if (q.codes.dtype != _CODES[q.kind] or q.codes.shape != codes or not q.codes.is_contiguous()
            or q.scales.dtype != torch.float32 or q.scales.shape != scales):
        raise InputError(f"dequantise: codes {describe(q.codes)} and scales {describe(q.scales)} are not those of {q.kind} "
                         f"{rows} x {columns}; Module.to(dtype) converts fp8 codes and scales, so move them by device only.")


def dequantise(q: Quantised, dtype: torch.dtype) -> Tensor:
    """The weight [O, I] in dtype, contiguous and newly allocated; it has no gradient. Raises InputError, BackendError."""
    _check(q)
    choice = choose("dequantise", q.codes.device, dtype)
    if choice.backend == "reference":
        return reference(q, dtype)
    return launcher(choice.backend, q.codes.device, "dequantise")(q.codes, q.scales, q.kind, *q.shape, dtype)
