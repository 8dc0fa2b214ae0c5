"""Shape -> tile sizes, in plain Python. Every choice says why; nothing is measured inside a call.

What was measured on this GPU (tile_table.py) comes before the heuristic below, kernel by kernel; it changes the tiles of a plan,
not which kernels the plan takes. Plans are kept, so a launch looks its plan up.

A query tile meets the keys in blocks. Rows of up to ONE_BLOCK_TOKENS tokens whose prefix fits one small block take the
one-sweep backward: all keys of a (sequence, head) stay on chip. Longer rows take a dQ kernel and a dK, dV kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ptv2_engine.kernels import tile_table

ONE_BLOCK_TOKENS = 128
ONE_SWEEP_PREFIX = 32
PROGRAMS = 264        # two programs for each of an H100's 132 multiprocessors
IDLE_PROGRAMS = 8 * PROGRAMS      # what these cost, a load each and nothing else, is about the launch that a list of tiles costs
PACKED_TOKENS = 64
PACKED_PROGRAMS = 2 * PROGRAMS


@dataclass(frozen=True)
class RowConfig:
    """Rows a program owns in a row-wise kernel, the padded row length, warps."""

    rows: int
    block: int
    warps: int
    why: str


@dataclass(frozen=True)
class TileConfig:
    """Queries, token keys and prefix keys of a tile (block_p 0: no prefix), warps and pipeline stages.

    registers: the most a thread may take. Without a limit ptxas aims at one more program a multiprocessor and spills a few bytes
    for it on some architectures; a limit makes it use what it needs up to there.
    """

    block_m: int
    block_n: int
    block_p: int
    warps: int
    stages: int
    why: str
    registers: int | None = None

    @property
    def launch(self) -> dict[str, int | None]:
        """Triton's launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


@dataclass(frozen=True)
class AttentionPlan:
    """The tiles of each attention kernel; sweep is None where the row does not fit a one-sweep backward."""

    forward: TileConfig
    sweep: TileConfig | None
    dq: TileConfig
    dkdv: TileConfig
    prefix: TileConfig
    fuse_prefix: bool
    why: str


def power_of_two(n: int, low: int = 16) -> int:
    """The smallest power of two that is at least n and low."""
    return max(low, 1 << max(n - 1, 0).bit_length())


_forced: tuple[Mapping[tile_table.Class, Any], dict[tile_table.Class, Any]] | None = None


@contextmanager
def forced(tiles: Mapping[tile_table.Class, Any]) -> Iterator[dict[tile_table.Class, Any]]:
    """Inside, kernels get these tiles, else the heuristic's, and no table is asked: how `ptv2 tune` tries tiles out. Yields what
    is asked for: the heuristic's tiles of each kernel and shape class."""
    global _forced
    before, _forced = _forced, (tiles, {})
    plans = (choose_rows, _plan, _packed_plan, _relative_plan)
    try:
        for plan in plans:
            plan.cache_clear()
        yield _forced[1]
    finally:
        _forced = before
        for plan in plans:
            plan.cache_clear()


def _measured(kernel: str, shape: tuple[int, ...], config: Any) -> Any:
    """The measured tiles for this kernel and shape class (tile_table.FIELDS) where there are any, else the heuristic's."""
    if _forced is not None:
        _forced[1][kernel, shape] = config
        return _forced[0].get((kernel, shape), config)
    found = tile_table.table().get((kernel, shape))
    return replace(config, **found) if found else config


@functools.cache
def choose_rows(width: int) -> RowConfig:
    """Tiles of add_norm and embedding for rows of this width."""
    block = power_of_two(width)
    rows = max(1, min(16, 2048 // block))
    warps = max(1, min(16, rows * block // 512))
    config = RowConfig(rows, block, warps, f"{rows} x {block} elements, {rows * block // (32 * warps)} a thread")
    return _measured("rows", (width,), config)


def choose(max_seqlen: int, prompt_length: int, head_dim: int, itemsize: int, num_sequences: int = 1, num_tokens: int = 0,
           dropout: bool = False) -> AttentionPlan:
    """Tiles for rows of up to max_seqlen tokens plus prompt_length prefix keys, head_dim columns of itemsize bytes.

    num_sequences and num_tokens decide where the prefix gradient is made: inside the sweep, which writes one partial a
    sequence, or by a kernel of its own, which reads q and dO once more but writes only a few partials. dropout: of any
    kind; its masks need the registers that fetching queries ahead would take.
    """
    few_partials = 2 * num_sequences * prompt_length <= num_tokens
    return _plan(max_seqlen, prompt_length, head_dim, itemsize, few_partials, bool(dropout))


def _shape_class(max_seqlen: int, prompt_length: int, head_dim: int, itemsize: int, dropout: bool) -> tuple[int, ...]:
    """What rows share whose tiles are measured together: tile_table's itemsize, head_dim, tokens, prompt, dropout."""
    return (itemsize, head_dim, power_of_two(max_seqlen), power_of_two(prompt_length) if prompt_length else 0, int(dropout))


@functools.lru_cache(maxsize=4096)
def _plan(max_seqlen: int, prompt_length: int, head_dim: int, itemsize: int, few_partials: bool, dropout: bool) -> AttentionPlan:
    """The heuristic's plan with the measured tiles put in."""
    plan = _heuristic(max_seqlen, prompt_length, head_dim, itemsize, few_partials, dropout)
    shape = _shape_class(max_seqlen, prompt_length, head_dim, itemsize, dropout)
    sweep = plan.sweep and _measured("sweep", (*shape, int(plan.fuse_prefix)), plan.sweep)
    measured = {kernel: _measured(kernel, shape, getattr(plan, kernel)) for kernel in ("forward", "dq", "dkdv", "prefix")}
    return replace(plan, sweep=sweep, **measured)


def _heuristic(max_seqlen: int, prompt_length: int, head_dim: int, itemsize: int, few_partials: bool,
               dropout: bool) -> AttentionPlan:
    wide = head_dim > 64
    tokens = power_of_two(max_seqlen)
    prefix = min(64, power_of_two(prompt_length)) if prompt_length else 0
    if itemsize == 4:
        keys = 16 if wide else 32
        block = TileConfig(keys, keys, min(prefix, keys), 8, 1, f"fp32 multiplies without tensor cores: {keys} x {keys} tiles")
        free = replace(block, registers=255) if dropout else block
        dkdv = replace(block, registers=128) if dropout else block
        return AttentionPlan(free, None, block, dkdv, free, False, block.why)
    keys, stages = (32, 1) if wide else (64, 2)
    forward = TileConfig(64, min(tokens, keys), min(prefix, keys // 2 if wide else keys), 4, stages,
                         f"a warp keeps 16 whole rows, keys stream by {keys}")
    dq = TileConfig(64, min(tokens, keys // 2), min(prefix, keys // 2), 8 if wide and dropout else 4, stages,
                    f"64 whole rows are held, keys stream by {keys // 2}")
    queries = 16 if wide else 32
    dkdv = TileConfig(queries, 64, prefix, 4, stages, f"a warp keeps 16 keys, queries stream by {queries}")
    # dropout masks take the registers that wider query tiles would
    few = 16 if dropout else queries
    held = min(prefix, 32) if dropout and wide else prefix
    gradient = TileConfig(few, 0, held, max(1, held // 16) * (2 if dropout and wide else 1),
                          1 if dropout or held == 16 else stages, f"{held} prefix keys are held, queries stream by {few}")
    # the masks of 128 held keys do not fit the registers
    if wide or max_seqlen > (ONE_BLOCK_TOKENS // 2 if dropout else ONE_BLOCK_TOKENS) or prompt_length > ONE_SWEEP_PREFIX:
        return AttentionPlan(forward, None, dq, dkdv, gradient, False,
                             f"{max_seqlen} + {prompt_length} keys of {head_dim}: dQ and dK, dV in kernels of their own")
    fuse = tokens <= 64 and few_partials
    sweep = TileConfig(few, tokens, prefix, max(4, tokens // 16), 1,
                       f"all keys on chip: a warp keeps 16 keys, queries stream by {few}")
    where = "inside, one partial a sequence" if fuse else "apart: no registers, or partials outweigh reading q, dO again"
    return AttentionPlan(forward, sweep, dq, dkdv, gradient, fuse,
                         f"{max_seqlen} + {prompt_length} keys of {head_dim} fit one block: one sweep, prefix gradient {where}")


def tightened(plan: AttentionPlan, head_dim: int, itemsize: int, dropout: bool) -> AttentionPlan:
    """The plan where queries have ranges or tiles come from a list: unchanged, sm_80 spills 8 bytes in dq, sm_100 up to 16 in
    forward."""
    if itemsize == 4:
        return plan
    wide = head_dim > 64
    forward = replace(plan.forward, registers={(False, False): 168, (True, True): 255}.get((wide, dropout)))
    return replace(plan, forward=forward, dq=replace(plan.dq, block_m=32, warps=4) if wide and dropout else plan.dq)


@dataclass(frozen=True)
class PackedPlan:
    """The tiles of prefix_attention_short.py. longest: columns of a sequence's dropout masks; window: packed tokens in which the
    sequences of a backward program start; sweep None: dq and dkdv serve (prefix_attention_short_bwd.py)."""

    forward: TileConfig
    sweep: TileConfig | None
    dq: TileConfig
    dkdv: TileConfig
    longest: int
    window: int
    why: str


def choose_packed(max_seqlen: int, prompt_length: int, head_dim: int, itemsize: int, num_sequences: int, num_tokens: int,
                  num_heads: int, dropout: bool = False) -> PackedPlan | None:
    """Tiles of packed tokens for rows that would leave most of a tile empty, or None where a tile of one sequence serves as well:
    rows of over 32 tokens on average, one of over 64, or so few (sequence, head) pairs that they run side by side anyway."""
    short = 0 < max_seqlen <= PACKED_TOKENS and 2 * num_tokens <= PACKED_TOKENS * num_sequences
    if not short or num_sequences * num_heads < PACKED_PROGRAMS:
        return None
    windows = 2 if num_tokens * num_heads >= 4 * PROGRAMS * PACKED_TOKENS else 1
    return _packed_plan(max_seqlen, prompt_length, head_dim, itemsize, windows, bool(dropout))


@functools.lru_cache(maxsize=4096)
def _packed_plan(max_seqlen: int, prompt_length: int, head_dim: int, itemsize: int, windows: int, dropout: bool) -> PackedPlan:
    """The heuristic's plan with the measured tiles put in."""
    plain = _heuristic(max_seqlen, prompt_length, head_dim, itemsize, True, dropout)
    shape = _shape_class(max_seqlen, prompt_length, head_dim, itemsize, dropout)
    tile, longest = plain.forward, power_of_two(max_seqlen)
    streamed = tile.block_n if itemsize == 4 else 32
    prefix = min(tile.block_p, streamed)
    if prefix and dropout and itemsize == 2:
        prefix = 32 if head_dim <= 64 else 16
    # sm_100 spills 8 or 16 bytes for one more program
    capped = 168 if dropout and itemsize == 2 and head_dim <= 32 else tile.registers
    forward = replace(tile, block_n=streamed, block_p=prefix, registers=capped,
                      why=f"{tile.block_m} packed rows, {streamed} packed keys")
    forward = _measured("packed_forward", shape, forward)
    keys = min(streamed, 16 if head_dim > 64 else 32)
    dq = replace(plain.dq, block_n=keys, block_p=min(plain.dq.block_p, keys),
                 registers=255 if dropout and itemsize == 2 and head_dim > 64 else None)
    dq, dkdv = _measured("packed_dq", shape, dq), _measured("packed_dkdv", shape, plain.dkdv)
    if plain.sweep is None:
        return PackedPlan(forward, None, dq, dkdv, longest, 0, forward.why)
    held, warps = (32, 8) if dropout else (plain.sweep.block_p, 4)       # with dropout 16 keys or 4 warps spill on sm_80 or sm_90
    sweep = TileConfig(16, PACKED_TOKENS, held if prompt_length else 0, warps, 1,
                       f"sequences that start in {windows * PACKED_TOKENS} tokens, {PACKED_TOKENS} keys held")
    sweep = _measured("packed_sweep", shape, sweep)
    return PackedPlan(forward, sweep, dq, dkdv, longest, windows * PACKED_TOKENS, sweep.why)


@dataclass(frozen=True)
class RelativePlan:
    """The tiles of disentangled attention's kernels, and of the prefix gradient it shares with prefix attention."""

    forward: TileConfig
    dq: TileConfig
    dkdv: TileConfig
    prefix: TileConfig


def choose_relative(max_seqlen: int, prompt_length: int, head_dim: int, itemsize: int, dropout: bool = False) -> RelativePlan:
    """Tiles for attention with relative positions. A tile of M queries and N keys also multiplies with the M + N - 1 distances in
    it, padded to a power of two, and reads that band askew through shared memory.

    The gather that does so wants many registers: on sm_80, sm_90 and sm_100 tiles of 64 x 32 spill 200 to 2000 bytes a thread,
    32 x 32 none.
    """
    return _relative_plan(max_seqlen, prompt_length, head_dim, itemsize, bool(dropout))


@functools.lru_cache(maxsize=4096)
def _relative_plan(max_seqlen: int, prompt_length: int, head_dim: int, itemsize: int, dropout: bool) -> RelativePlan:
    """The heuristic's plan with the measured tiles put in; the prefix gradient's are prefix attention's."""
    plain = choose(max_seqlen, prompt_length, head_dim, itemsize, dropout=dropout)
    wide, side = head_dim > 64, 16 if itemsize == 4 else 32
    keys = min(power_of_two(max_seqlen), side)
    prefix = min(power_of_two(prompt_length), 16 if wide or itemsize == 4 else 32) if prompt_length else 0
    warps = 8 if wide else 4
    tile = TileConfig(side, keys, prefix, warps, 1, f"{side} queries, {keys} keys, {power_of_two(side + keys - 1)} distances")
    tiles = {"forward": tile, "dq": tile, "dkdv": replace(tile, block_p=0)}
    shape = _shape_class(max_seqlen, prompt_length, head_dim, itemsize, dropout)
    return RelativePlan(prefix=plain.prefix,
                        **{kernel: _measured(f"relative_{kernel}", shape, config) for kernel, config in tiles.items()})


def listed_tiles(max_seqlen: int, num_sequences: int, num_tokens: int, num_heads: int, tile: int) -> int | None:
    """Entries of a list of tiles (tile_list.py), or None where sequences are so alike that a grid of the longest one's tiles for
    each makes few programs that find nothing to do."""
    entries = (num_tokens + num_sequences * (tile - 1)) // tile + 1       # no sequence ends in more than one part of a tile
    idle = (num_sequences * -(-max_seqlen // tile) - entries) * num_heads
    return entries if idle >= IDLE_PROGRAMS else None


def choose_splits(num_sequences: int, query_tiles: int, programs: int) -> tuple[int, int]:
    """(sequence groups, query groups) that cut the prefix gradient into about PROGRAMS pieces; `programs` exist already.

    Sequences are split first; only when there are too few of them are the query tiles of a sequence dealt out as well.
    It depends on shapes alone, so the order of the sums never changes between runs.
    """
    wanted = max(1, -(-PROGRAMS // max(programs, 1)))
    groups = min(wanted, max(num_sequences, 1))
    return groups, min(-(-wanted // groups), max(query_tiles, 1))
