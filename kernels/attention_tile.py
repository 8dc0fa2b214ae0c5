"""What the attention kernels share: loading a tile of rows, scores, probabilities and their gradient for one key block.

Scores live in base 2: scale2 = scale * log2(e), so exp2 needs no multiplication. A tile's first row is an int64 scalar, the
offsets inside a tile are int32. Rows past the end of a sequence are zero, and their log-sum-exp is +inf, so that they
have no probability.
"""

from __future__ import annotations

import triton
import triton.language as tl
from ptv2_engine.kernels.philox import keep_tile

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tile_offsets(row_stride, R: tl.constexpr, BLOCK_D: tl.constexpr):
    return tl.arange(0, R)[:, None] * row_stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def tile_mask(num_rows, R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    mask = (tl.arange(0, R) < num_rows)[:, None]
    if D < BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < D)[None, :]
    else:
        mask = mask & (tl.arange(0, BLOCK_D) < BLOCK_D)[None, :]
    return mask


@triton.jit
def load_tile(base, first_row, row_stride, num_rows, R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[R, BLOCK_D] rows first_row.. of base, of which num_rows exist; the others and the padding columns are 0."""
    pointers = base + tl.cast(first_row, tl.int64) * row_stride + tile_offsets(row_stride, R, BLOCK_D)
    return tl.load(pointers, mask=tile_mask(num_rows, R, D, BLOCK_D), other=0.0)


@triton.jit
def store_tile(base, first_row, row_stride, num_rows, x, R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of load_tile, rounding x to base's dtype."""
    pointers = base + tl.cast(first_row, tl.int64) * row_stride + tile_offsets(row_stride, R, BLOCK_D)
    tl.store(pointers, x.to(base.dtype.element_ty), mask=tile_mask(num_rows, R, D, BLOCK_D))


@triton.jit
def zero_rows(base, first, last, row_stride, program, num_programs, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows first..last-1 become 0, dealt out to num_programs programs: fresh rows past the last sequence must not be NaN."""
    for row in range(first + program * BLOCK, last, num_programs * BLOCK):
        store_tile(base, row, row_stride, last - row, tl.zeros((BLOCK, BLOCK_D), tl.float32), BLOCK, D, BLOCK_D)


@triton.jit
def prompt_of(prompt_ids, prompt_lengths, b, P):
    """The prompt (int64) of sequence b and how many of its P rows are in use (a scalar tensor like P)."""
    prompt = tl.load(prompt_ids + b).to(tl.int64) if prompt_ids is not None else (b * 0).to(tl.int64)
    length = tl.load(prompt_lengths + prompt).to(tl.int32) if prompt_lengths is not None else P
    return prompt, length


@triton.jit
def prefix_keep(first_key, c2, seed, threshold, site, stream, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which elements of a block of prefix keys (stream PREFIX_K) or values (PREFIX_V) this sequence and head keep."""
    return keep_tile(first_key, 0, c2, site * 8 + stream, seed, threshold, BLOCK, BLOCK_D)


@triton.jit
def load_prefix(base, first_key, row_stride, num_keys, c2, seed, threshold, site, stream, DROPOUT: tl.constexpr,
                BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] prefix rows under this sequence's own dropout mask; its 1 / (1 - p) is left to the products."""
    x = load_tile(base, first_key, row_stride, num_keys - first_key, BLOCK, D, BLOCK_D)
    if DROPOUT:
        x = tl.where(prefix_keep(first_key, c2, seed, threshold, site, stream, BLOCK, BLOCK_D), x, tl.zeros_like(x))
    return x


@triton.jit
def attend(acc, row_max, row_sum, q, k, v, num_keys, scale2, value_scale, first_query, first_key, c2, stream, seed, threshold,
           site,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, seen=None,
           relative=None, kept=None):
    """One online-softmax step over a key block of which num_keys exist; v counts value_scale times (1 / (1 - p) of a dropped
    prefix). The 1 / (1 - p) of the probabilities' dropout is left to the end. seen: seen_tile(), or None for all keys; relative:
    what is added to the products of q and k (DeBERTa), or None; kept: the dropout mask where the queries are not those of one
    sequence from first_query on."""
    scores = tl.dot(q, tl.trans(k), relative, input_precision=PRECISION) * scale2
    scores = tl.where((tl.arange(0, BLOCK_N) < num_keys)[None, :], scores, float("-inf"))
    if seen is not None:
        scores = tl.where(seen, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    probs = tl.exp2(scores - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(probs, 1)
    if DROPOUT:
        keep = kept if kept is not None else keep_tile(first_query, first_key, c2, site * 8 + stream, seed, threshold, BLOCK_M,
                                                       BLOCK_N)
        probs = tl.where(keep, probs, 0.0)
    acc = tl.dot((probs * value_scale).to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def probabilities(q, do, k, v, lse2, num_keys, scale2, value_scale, first_query, first_key, c2, stream, seed, threshold,
                  keep_scale, site,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, seen=None,
                  relative=None, kept=None):
    """(probs, dropped probs, d probs) [BLOCK_M, BLOCK_N] of a key block, recomputed from the log-sum-exp in base 2.

    Then delta = rowsum(probs * dprobs), dS = probs * (dprobs - delta), dV = dropped^T dO.
    """
    scores = tl.dot(q, tl.trans(k), relative, input_precision=PRECISION) * scale2
    probs = tl.exp2(scores - lse2[:, None])
    probs = tl.where((tl.arange(0, BLOCK_N) < num_keys)[None, :], probs, 0.0)
    if seen is not None:
        probs = tl.where(seen, probs, 0.0)
    dprobs = tl.dot(do, tl.trans(v), input_precision=PRECISION) * value_scale
    dropped = probs
    if DROPOUT:
        keep = kept if kept is not None else keep_tile(first_query, first_key, c2, site * 8 + stream, seed, threshold, BLOCK_M,
                                                       BLOCK_N)
        dropped = tl.where(keep, probs * keep_scale, 0.0)
        dprobs = tl.where(keep, dprobs * keep_scale, 0.0)
    return probs, dropped, dprobs


@triton.jit
def key_probabilities(q, do, k, v, lse2, num_keys, scale2, value_scale, first_query, first_key, c2, stream, seed, threshold,
                      keep_scale, site,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, seen=None,
                      relative=None, kept=None):
    """probabilities() with keys as rows, [BLOCK_N, BLOCK_M], for kernels that hold a key block over a loop of query tiles.

    k and v are then the left operands, which warps share out among them: as right operands every warp would keep all of
    both in registers through the loop. The probabilities are already laid out as the left operand of dV. seen and kept (as in
    attend), [BLOCK_N, BLOCK_M] too.
    """
    scores = tl.dot(k, tl.trans(q), relative, input_precision=PRECISION) * scale2
    probs = tl.exp2(scores - lse2[None, :])
    probs = tl.where((tl.arange(0, BLOCK_N) < num_keys)[:, None], probs, 0.0)
    if seen is not None:
        probs = tl.where(seen, probs, 0.0)
    dprobs = tl.dot(v, tl.trans(do), input_precision=PRECISION) * value_scale
    dropped = probs
    if DROPOUT:
        keep = kept if kept is not None else tl.trans(keep_tile(first_query, first_key, c2, site * 8 + stream, seed, threshold,
                                                                BLOCK_M, BLOCK_N))
        dropped = tl.where(keep, probs * keep_scale, 0.0)
        dprobs = tl.where(keep, dprobs * keep_scale, 0.0)
    return probs, dropped, dprobs


@triton.jit
def load_ranges(key_range_T2, first_row, num_rows, R: tl.constexpr):
    """(low, high) int32 [R]: the tokens each query sees beside the context. Rows past num_rows see none and widen no tile."""
    rows = tl.arange(0, R)
    base = key_range_T2 + 2 * (tl.cast(first_row, tl.int64) + rows)
    low = tl.load(base, mask=rows < num_rows, other=2147483647)
    return low, tl.load(base + 1, mask=rows < num_rows, other=0)


@triton.jit
def key_bounds(context, low, high, length, BLOCK_N: tl.constexpr):
    """The first and last key block, in tokens, that some query of a tile sees: the loop over key blocks runs between them."""
    first = tl.where(context > 0, 0, tl.maximum(tl.min(low, 0), 0) // BLOCK_N * BLOCK_N)
    return first, tl.minimum(length, tl.maximum(context, tl.max(high, 0)))


@triton.jit
def seen_tile(context, low, high, first_key, BLOCK_N: tl.constexpr):
    """Bool [M, BLOCK_N]: which keys of a block each query sees."""
    keys = first_key + tl.arange(0, BLOCK_N)
    return (keys < context)[None, :] | ((keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None]))


@triton.jit
def sequence_of(cu_seqlens, token, B):
    """The last sequence that starts at or before a token (a scalar): its owner, as empty ones come before; B behind the last."""
    found, rest = B * 0, B
    while rest > 0:
        middle = found + (rest + 1) // 2
        found = tl.where(tl.load(cu_seqlens + middle) <= token, middle, found)
        rest = rest // 2
    return found


@triton.jit
def row_bounds(cu_seqlens, rows, first_sequence, last_sequence, B):
    """(start, end, sequence) int32 [R] of the sequence that holds each row, sought between two sequences (both included).

    A row behind the last sequence gets sequence B, which holds no token: end == start. Tiles hold few sequences, and the loads
    of a walk over them do not wait for each other as those of a search would.
    """
    start = rows * 0
    end, sequence = start, start
    edge = tl.load(cu_seqlens + first_sequence)
    for b in range(first_sequence, last_sequence + 1):
        next_edge = tl.load(cu_seqlens + tl.minimum(b + 1, B))
        inside = rows >= edge
        start, end, sequence = tl.where(inside, edge, start), tl.where(inside, next_edge, end), tl.where(inside, b, sequence)
        edge = next_edge
    return start, end, sequence


@triton.jit
def load_stat(base, first_row, num_rows, other, R: tl.constexpr):
    """[R] fp32 row statistics (log-sum-exp, delta) from first_row on, `other` past the num_rows that exist."""
    rows = tl.arange(0, R)
    return tl.load(base + tl.cast(first_row, tl.int64) + rows, mask=rows < num_rows, other=other)
