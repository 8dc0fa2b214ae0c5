"""What fits: the memory of cards, the largest batch on one, and the options that make an impossible step possible."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from ptv2_engine.encoder.layer import MEMORY
from ptv2_engine.errors import ConfigError, InputError
from ptv2_engine.memory.planner import CUDA_CONTEXT, Plan, Planner
from ptv2_engine.memory.setup import Setup
from ptv2_engine.ops import KINDS

# What a card's own tools report as its memory, in MiB; any other is given as a number, such as 24gb.
CARDS = {"a10-24gb": 23028, "l4-24gb": 23034, "rtx3090-24gb": 24576, "rtx4090-24gb": 24564, "a100-40gb": 40960,
         "l40s-48gb": 46068, "a6000-48gb": 49140, "a100-80gb": 81920, "h100-80gb": 81559, "h200-141gb": 143771}
TOO_OLD = ("k80", "p100", "v100", "t4", "gtx1080", "rtx2080")
RESERVE = 0.03           # of a card: blocks that the allocator cannot use, in fragments


def card_bytes(name: str) -> int:
    """Bytes a step may take on a card of this name or size: without the context and RESERVE. Raises ConfigError."""
    key = name.lower()
    size = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)(gib|gb|g|)", key, re.ASCII)
    if key in CARDS:
        total = CARDS[key] << 20
    elif size and float(size[1]) > 0:
        total = int(float(size[1]) * (2**30 if size[2] == "gib" else 1e9))
    elif key.partition("-")[0] in TOO_OLD:
        raise ConfigError(f"card {name!r} is older than the kernels take (Triton and bfloat16 need compute capability 8.0); "
                          f"use one of {', '.join(CARDS)}.")
    else:
        raise ConfigError(f"card {name!r} is not known; use one of {', '.join(CARDS)}, or a size such as 24gb.")
    return max(int(total * (1 - RESERVE)) - CUDA_CONTEXT, 0)


def largest_batch(setup: Setup, limit: int, planner: Planner | None = None) -> int:
    """The largest batch size whose planned peak is at most `limit` bytes; 0 where not even one sequence fits.

    A step's memory grows almost linearly: two plans say where to look, and what is returned has been planned itself.
    """
    planner = planner or Planner()

    def peak(batch_size: int) -> int:
        return planner.plan(replace(setup, batch_size=batch_size)).peak

    known = {1: peak(1)}
    low, high = 1, 0                       # fits; does not fit (0: not known)
    if known[1] > limit:
        return 0
    guess = 8
    while high != low + 1:
        known[guess] = peak(guess)
        if known[guess] <= limit:
            low = guess
        else:
            high = guess
        a, b = (low, high) if high else sorted(known)[-2:]
        slope = max((known[b] - known[a]) / (b - a), 1.0)
        guess = max(int(low + (limit - known[low]) / slope), low + 1)
        if high:
            guess = min(guess, high - 1)
    return low


def ways_out(setup: Setup, planner: Planner | None = None) -> Iterator[tuple[Setup, Plan]]:
    """Setups that save more and more at the price of more and more time, as planned; the caller stops at the first that fits."""
    planner = planner or Planner()
    memories = MEMORY[MEMORY.index(setup.memory):]
    codes = (setup.frozen_dtype,) if setup.frozen_dtype else (None, "int8", "nf4")
    streams = (setup.stream_weights,) if setup.stream_weights else (None, "file" if setup.device == "cpu" else "host")
    for stream in streams:
        for frozen_dtype in codes if stream != "file" else (setup.frozen_dtype,):
            for memory in memories:
                changed = replace(setup, memory=memory, frozen_dtype=frozen_dtype, stream_weights=stream)
                if changed == setup or stream == "file" and frozen_dtype in KINDS:
                    continue
                try:
                    plan = planner.plan(changed)
                except (ConfigError, InputError):               # a model that this policy or these codes do not take
                    continue
                yield changed, plan
