"""How a benchmark times: functions take turns call by call, on input sets that do not fit the cache, the first one twice (A/A).

One after the other even the same function against itself comes out up to 1.3 apart; in turns within a few thousandths. On a GPU a
turn is a CUDA graph over all input sets, timed by events, so that a kernel of 50 us is not measured as its launch; what cannot be
captured runs as it is, and its row says so.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ptv2_engine.graphed import capture_stream, recorded
from ptv2_engine.ops.frozen_linear import multiplies_bf16

Function = Callable[[], Any]
Functions = Mapping[str, Function | Sequence[Function]]


def cpu_name() -> str:
    """Its model, and whether it has the bf16 products that decide what a bf16 step holds."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return model + ("" if multiplies_bf16() else " without bf16 products")


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
    turns["A/A"] = turns[ours] if device == "cuda" else Turn(functions[ours], device, capture)
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


@functools.cache
def limits(device: str) -> dict[str, Any]:
    """What this machine can do, measured here: bytes a second of a large copy (read and written), flops a second of a large
    matrix product for each dtype."""
    size = (1 << 30) if device == "cuda" else 8 * cache_bytes("cpu")
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copy = min(side_by_side({"copy": lambda: target.copy_(source)}, device, 8, 2)[0]["copy"])
    n, rates = 8192 if device == "cuda" else 2048, {}
    # A CPU whose oneDNN has no bf16 multiplies it in fp32 (ops/frozen_linear.py): torch's own loop would take minutes here
    on_cpu = (torch.float32, torch.bfloat16) if multiplies_bf16() else (torch.float32,)
    for dtype in on_cpu if device == "cpu" else (torch.bfloat16, torch.float16):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = min(side_by_side({"matmul": lambda a=a, b=b: a @ b}, device, 6, 2)[0]["matmul"])
        rates[str(dtype).removeprefix("torch.")] = 2 * n**3 / seconds
    if device == "cpu":
        rates.setdefault("bfloat16", rates["float32"])
    return {"copy_bytes_per_s": 2 * size / copy, "matmul_flops_per_s": rates, "cache_bytes": cache_bytes(device)}


def attempt(peers: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """What each peer's builder returns, and for those that cannot be built or checked here the reason."""
    made, skipped = {}, {}
    for name, build in peers.items():
        try:
            made[name] = build()
        except Exception as error:                           # a peer never stops the run
            gc.collect()
            text = str(error).strip().splitlines()[:1]
            named = [] if isinstance(error, AssertionError) and text else [type(error).__name__]
            skipped[name] = ": ".join([*named, *text])[:180]
    return made, skipped
