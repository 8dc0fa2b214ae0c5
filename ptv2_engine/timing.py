"""How functions are timed: they take turns call by call, on input sets that do not fit the cache, the first one twice (A/A).

One after the other even the same function against itself comes out up to 1.3 apart; in turns within a few thousandths. On a GPU a
turn is a CUDA graph over all input sets, timed by events, so that a kernel of 50 us is not measured as its launch; what cannot be
captured runs as it is, and its row says so.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ptv2_engine.graphed import capture_stream, recorded

Function = Callable[[], Any]
Functions = Mapping[str, Function | Sequence[Function]]


def stream_for(device: str) -> Any:
    """Around what is built: on a GPU the stream of captures, since a backward that is captured runs where its forward ran."""
    return torch.cuda.stream(capture_stream(torch.cuda.current_device())) if device == "cuda" else contextlib.nullcontext()


def cache_bytes(device: str) -> int:
    """The last-level cache: Linux's largest for the CPU (32 MiB where it does not say), 50 MiB (H100's L2) for a GPU."""
    if device == "cuda":
        return max(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0), 50 << 20)
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [f.read_text().strip() for f in files]
    return max([int(s[:-1]) << {"K": 10, "M": 20}[s[-1]] for s in sizes if s[-1:] in ("K", "M")], default=32 << 20)


def input_sets(bytes_each: int, device: str, most: int = 16) -> int:
    """How many sets of inputs a benchmark goes round, so that none is in the cache when its turn comes."""
    return max(2, min(most, -(-2 * cache_bytes(device) // max(bytes_each, 1))))


class Turn:
    """One turn of a function: seconds a call. CPU: a call on the next input set. GPU: all sets, captured if that works."""

    def __init__(self, functions: Function | Sequence[Function], device: str, capture: bool) -> None:
        self.functions = [functions] if callable(functions) else list(functions)
        self.device, self.count = device, 0
        self.graph: Function | None = None
        if device == "cuda":                                 # inputs may have been made on another stream
            torch.cuda.synchronize()
        for function in self.functions:                      # compiles, fills tables, and shows errors
            function()
        if device == "cuda" and capture:
            torch.cuda.synchronize()
            with contextlib.suppress(RuntimeError):
                self.graph = recorded(self._all, torch.cuda.graph_pool_handle())[0]

    def _all(self) -> None:
        for function in self.functions:
            function()

    def __call__(self) -> float:
        if self.device != "cuda":
            function = self.functions[self.count % len(self.functions)]
            self.count += 1
            started = time.perf_counter()
            function()
            return time.perf_counter() - started
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        (self.graph or self._all)()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / 1000 / len(self.functions)


def side_by_side(functions: Functions, device: str, rounds: int = 10, warmup: int = 2,
                 capture: bool = False) -> tuple[dict[str, list[float]], list[str]]:
    """Seconds of each call, taken in turns whose order turns round every round, and the names that no graph was captured of."""
    turns = {name: Turn(function, device, capture) for name, function in functions.items()}
    ours = next(iter(functions))
    turns["A/A"] = Turn(functions[ours], device, capture)
    times: dict[str, list[float]] = {name: [] for name in turns}
    for i in range(warmup + rounds):
        for name in turns if i % 2 == 0 else reversed(turns):
            seconds = turns[name]()
            if i >= warmup:
                times[name].append(seconds)
    eager = [name for name, turn in turns.items() if capture and device == "cuda" and turn.graph is None]
    return times, eager


def summary(times: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Median, 20th and 80th percentile in seconds, and each median as a multiple of the first one's."""
    first = statistics.median(next(iter(times.values())))
    found = {}
    for name, values in times.items():
        ordered = sorted(values)
        median = statistics.median(ordered)
        found[name] = {"median_s": median, "p20_s": ordered[len(ordered) // 5], "p80_s": ordered[-1 - len(ordered) // 5],
                       "times_ours": median / first}
    return found
