"""Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) as device functions.

The counters and the order of the words are those of the contract in ops/_philox.py, so a mask equals the reference's bit
for bit. One call of the generator serves four adjacent columns: a [R, C] mask costs R * C / 4 calls, and the first two of
the seven rounds work on rows and columns apart (the operands broadcast late), so they cost next to nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

HIDDEN = tl.constexpr(0)
PREFIX_PROB = tl.constexpr(1)
TOKEN_PROB = tl.constexpr(2)
PREFIX_K = tl.constexpr(3)
PREFIX_V = tl.constexpr(4)

_M0 = tl.constexpr(0xD2511F53)
_M1 = tl.constexpr(0xCD9E8D57)
_W0 = tl.constexpr(0x9E3779B9)
_W1 = tl.constexpr(0xBB67AE85)


def threshold_arg(p: float) -> int:
    """The smallest kept word as a signed 32-bit kernel argument: an int that always fits i32 never causes a recompile."""
    word = min(int(p * 2**32 + 0.5), 2**32 - 1)
    return word - 2**32 if word >= 2**31 else word


@triton.jit
def philox_words(c0, c1, c2, c3, seed):
    """The four words of the broadcast counters (uint32 tensors or scalars); seed is an int64 scalar."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(7):
        hi0 = tl.umulhi(c0, _M0)
        lo0 = c0 * _M0
        hi1 = tl.umulhi(c2, _M1)
        lo1 = c2 * _M1
        c0 = hi1 ^ c1 ^ k0
        c1 = lo1
        c2 = hi0 ^ c3 ^ k1
        c3 = lo0
        k0 = k0 + _W0
        k1 = k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def keep_rows(rows, first_column, c2, c3, seed_ptr, threshold, R: tl.constexpr, C: tl.constexpr):
    """Bool [R, C]: which elements (rows[r], first_column + c) survive. first_column is a multiple of 4.

    c2 (int, or [R, 1]: one a row) is the counter's third word, c3 = site * 8 + stream its fourth, threshold the int32 of
    threshold_arg.
    """
    seed = tl.load(seed_ptr)
    limit = threshold.to(tl.uint32, bitcast=True)
    groups = (first_column // 4 + tl.arange(0, C // 4)).to(tl.uint32)
    w0, w1, w2, w3 = philox_words(groups[None, :], rows.to(tl.uint32)[:, None], c2.to(tl.uint32), c3.to(tl.uint32), seed)
    even = tl.join((w0 >= limit).to(tl.int8), (w2 >= limit).to(tl.int8))
    odd = tl.join((w1 >= limit).to(tl.int8), (w3 >= limit).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (R, C)) != 0


@triton.jit
def keep_tile(first_row, first_column, c2, c3, seed_ptr, threshold, R: tl.constexpr, C: tl.constexpr):
    """keep_rows of R adjacent rows."""
    return keep_rows(first_row + tl.arange(0, R), first_column, c2, c3, seed_ptr, threshold, R, C)


@triton.jit
def keep_bits(rows, c2, c3, seed_ptr, threshold, C: tl.constexpr):
    """uint64 [R]: bit c says whether element (rows[r], c) survives, for up to C <= 64 columns; c2: [R, 1].

    A row's bits in one word can be shifted to wherever the row's columns begin in a tile: keep_rows' groups of four cannot.
    """
    seed = tl.load(seed_ptr)
    limit = threshold.to(tl.uint32, bitcast=True)
    groups = tl.arange(0, C // 4)
    w0, w1, w2, w3 = philox_words(groups.to(tl.uint32)[None, :], rows.to(tl.uint32)[:, None], c2.to(tl.uint32),
                                  c3.to(tl.uint32), seed)
    four = ((w0 >= limit).to(tl.uint64) | ((w1 >= limit).to(tl.uint64) << 1) | ((w2 >= limit).to(tl.uint64) << 2)
            | ((w3 >= limit).to(tl.uint64) << 3))
    return tl.sum(four << (4 * groups).to(tl.uint64)[None, :], 1)
