"""A list of (sequence, tile) on the device, the longest sequence's tiles first, for batches whose lengths are far apart.

Without one the grid is that of the longest sequence for every sequence: programs past a sequence's end return at once, which
still costs a launch slot and a load each, and a long sequence that comes last runs alone. The list is made by one small kernel,
nothing is read back, and its length follows from T and B, so CUDA graphs may hold both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from ptv2_engine.kernels.tuning import listed_tiles
from torch import Tensor

BLOCK = 64


@triton.jit(do_not_specialize=["B", "L", "tile"])
def tile_list_kernel(cu_seqlens, items_L2, B, L, tile, BLOCK: tl.constexpr):
    """A program writes the tiles of BLOCK sequences behind those of all that are longer, or as long and earlier; entries that are
    left over are (B, 0), (B, 1), ..."""
    program = tl.program_id(0)
    mine = program * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(cu_seqlens + mine, mask=mine < B, other=0)
    length = tl.load(cu_seqlens + mine + 1, mask=mine < B, other=0) - start
    position = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, B, BLOCK):
        others = first + tl.arange(0, BLOCK)
        other_start = tl.load(cu_seqlens + others, mask=others < B, other=0)
        other_length = tl.load(cu_seqlens + others + 1, mask=others < B, other=0) - other_start
        tiles = (other_length + tile - 1) // tile
        before = (other_length[None, :] > length[:, None]) | ((other_length[None, :] == length[:, None])
                                                              & (others[None, :] < mine[:, None]))
        position += tl.sum(tl.where(before, tiles[None, :], 0), 1)
        total += tiles
    count = (length + tile - 1) // tile
    for t in range(0, tl.max(count, 0)):
        here = 2 * (position + t)
        wanted = (t < count) & (position + t < L)
        tl.store(items_L2 + here, mine, mask=wanted)
        tl.store(items_L2 + here + 1, t + 0 * mine, mask=wanted)
    used = tl.sum(total, 0)
    for row in range(used + program * BLOCK, L, tl.num_programs(0) * BLOCK):
        rows = row + tl.arange(0, BLOCK)
        tl.store(items_L2 + 2 * rows, B + 0 * rows, mask=rows < L)
        tl.store(items_L2 + 2 * rows + 1, rows - used, mask=rows < L)


@triton.jit
def work_item(items_L2):
    """(tile, head, sequence, workers) of this program, from the grid (tiles, heads, sequences + 1) or from the grid (heads, L)
    and the list. `workers` programs have sequence B and clear the rows past the last sequence; their tiles are 0, 1, ..."""
    if items_L2 is None:
        tile, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        workers = tl.num_programs(0)
    else:
        n, entry = tl.program_id(0), tl.program_id(1)
        b, tile = tl.load(items_L2 + 2 * entry), tl.load(items_L2 + 2 * entry + 1)
        workers = tile + tl.num_programs(1) - entry
    return tile, n, b, workers


def tile_list(cu_seqlens: Tensor, run: dict, max_seqlen: int, tile: int) -> Tensor | None:
    """int32 [L, 2] for tiles of `tile` tokens, or None where the grid of the longest sequence is as good. run:
    prefix_attention.plain_arguments."""
    entries = listed_tiles(max_seqlen, run["B"], run["T"], run["N"], tile)
    if entries is None:
        return None
    items_L2 = torch.empty((entries, 2), dtype=torch.int32, device=cu_seqlens.device)
    programs = max(1, triton.cdiv(run["B"], BLOCK))
    tile_list_kernel[(programs,)](cu_seqlens, items_L2, run["B"], entries, tile, BLOCK=BLOCK, num_warps=4)
    return items_L2


def grid(items_L2: Tensor | None, run: dict, max_seqlen: int, tile: int) -> tuple[int, ...]:
    """What work_item() reads."""
    if items_L2 is None:
        return max(1, triton.cdiv(max_seqlen, tile)), run["N"], run["B"] + 1
    return run["N"], items_L2.shape[0]
