"""Which tiles are tried for a kernel, and what of them compiles to something good.

A candidate is the heuristic's tiles with a parameter or two halved or doubled. It is compiled before anything is timed, and left
out where it spills or takes more than the card has.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

from ptv2_engine import tune_cases
from ptv2_engine.compiled import SHARED_LIMIT, Launch, compile_launch, recorded
from ptv2_engine.kernels.tile_table import FIELDS, Class, sides
from ptv2_engine.kernels.tuning import forced
from ptv2_engine.tune_cases import LAUNCHES, Shape

Config = Any                                                 # tuning.TileConfig or tuning.RowConfig
REGISTERS, ENOUGH_WARPS = 65536, 8                           # of a multiprocessor; two warps for each of its four schedulers
# what is varied beside warps and stages: a sweep holds all keys, so only its queries
SIDES = {"forward": ("block_m", "block_n", "block_p"), "sweep": ("block_m",), "dq": ("block_m", "block_n", "block_p"),
         "dkdv": ("block_m", "block_n"), "prefix": ("block_m", "block_p"), "rows": ("rows",)}
ORDER = (f"{ENOUGH_WARPS} warps resident on a multiprocessor or more (two for each scheduler hide a load behind a product), then "
         "fewest bytes read by a (sequence, head), then fewest turns of the loop, then most warps")


@dataclass(frozen=True)
class Target:
    """A kernel in a shape class: the call that launches it, its place in the table, the heuristic's tiles."""

    shape: Shape
    call: str
    kernel: str
    values: tuple[int, ...]                                  # of tile_table.FIELDS[kernel]
    heuristic: Config

    @property
    def place(self) -> Class:
        return self.kernel, self.values

    @property
    def fields(self) -> dict[str, int]:
        return dict(zip(FIELDS[self.kernel], self.values, strict=True))

    @property
    def plain(self) -> str:
        """The kernel's name without relative and packed."""
        return self.kernel.rsplit("_", 1)[-1]


@dataclass
class Candidate:
    """Tiles and what they compile to; dropped: why they are not tried."""

    config: Config
    registers: int = 0
    shared: int = 0
    dropped: str | None = None


def label(kernel: str, config: Config) -> str:
    """64x32x16, 4 warps, 2 stages"""
    if kernel == "rows":
        return f"{config.rows} rows, {config.warps} warps"
    blocks = "x".join(str(n) for n in (getattr(config, side) for side in sides(kernel)) if n)
    limit = f", at most {config.registers} registers" if config.registers else ""
    return f"{blocks}, {config.warps} warps, {config.stages} stages{limit}"


def targets(shape: Shape, kernels: Sequence[str]) -> list[Target]:
    """The kernels among these that calls of this shape launch."""
    found: dict[Class, Target] = {}
    with forced({}):
        calls = tune_cases.calls(shape, "meta")
    for name, call in calls.items():
        with forced({}) as asked:
            launched = {launch.name for launch in recorded(call)}
        for (kernel, values), config in asked.items():
            if kernel in kernels and LAUNCHES[kernel][0] in launched:
                found.setdefault((kernel, values), Target(shape, name, kernel, values, config))
    return list(found.values())


def candidates(target: Target, changes: int) -> list[Config]:
    """The heuristic's tiles with up to `changes` parameters halved or doubled, nearest first; with 1 also a side and the warps
    together, which keeps a warp's share."""
    heuristic: Any = target.heuristic
    limits = _limits(target)
    axes: dict[str, list[int]] = {}
    for side in SIDES[target.plain]:
        n = getattr(heuristic, side)
        axes[side] = [m for m in (n // 2, 2 * n) if n and limits[side][0] <= m <= max(limits[side][1], n)]
    axes["warps"] = [n for n in (heuristic.warps // 2, 2 * heuristic.warps) if 1 <= n <= 16]
    if target.kernel != "rows":
        axes["stages"] = [n for n in (1, 2, 3) if n != heuristic.stages]
    found = []
    for count in range(1, max(changes, 2) + 1):
        for names in itertools.combinations(axes, count):
            for values in itertools.product(*(axes[name] for name in names)):
                new = dict(zip(names, values, strict=True))
                together = count == 2 and "warps" in new and "stages" not in new and len(
                    {new[name] > getattr(heuristic, name) for name in names}) == 1
                if count <= changes or together:
                    found.append(_changed(heuristic, new))
    return found


def _changed(heuristic: Any, new: dict[str, int]) -> Config:
    config = replace(heuristic, why="tried", **new)
    if getattr(config, "registers", None) and config.registers * 32 * config.warps > REGISTERS:
        config = replace(config, registers=None)
    return config


def _limits(target: Target) -> dict[str, tuple[int, int]]:
    """Smallest and largest useful size of each side: tl.dot takes no fewer than 16, and a side longer than the row is padding."""
    if target.kernel == "rows":
        return {"rows": (1, 32)}
    shape = target.fields
    tokens = min(128, shape["tokens"])
    return {"block_m": (16, tokens), "block_n": (16, tokens), "block_p": (16, min(128, max(16, shape["prompt"])))}


def compile_candidate(target: Target, sm: int, config: Config, variant: int | None = None) -> Candidate:
    """The most that a launch of the kernel takes with these tiles, in the shape's own calls or in one of its variants."""
    with forced({target.place: config}):
        calls = (tune_cases.calls(target.shape, "meta") if variant is None else
                 next(itertools.islice(tune_cases.variants(target.shape), variant, None)))
        return _compiled(target, config, [launch for launch in recorded(calls[target.call])
                                          if launch.name in LAUNCHES[target.kernel]], sm, variant is None)


def _compiled(target: Target, config: Config, launches: Sequence[Launch], sm: int, exact: bool) -> Candidate:
    """exact: the launches have these very tiles, which a launcher may change in some of the class's other calls."""
    result = Candidate(config)
    for launch in launches:
        given = (launch.keywords["num_warps"], launch.keywords.get("BLOCK_M", getattr(config, "block_m", None)))
        if exact and launch.name == LAUNCHES[target.kernel][0] and given != (config.warps, getattr(config, "block_m", None)):
            result.dropped = "the launcher changes these tiles"
            return result
        try:
            used = compile_launch(launch, sm)
        except Exception as error:                           # whatever a compiler raises: these tiles are not for this card
            lines = str(error).strip().splitlines()
            result.dropped = f"does not compile: {(lines or [type(error).__name__])[0][:100]}"
            return result
        result.registers, result.shared = max(result.registers, used["registers"]), max(result.shared, used["shared"])
        result.dropped = result.dropped or dropped_for(used, sm)
    return result


def dropped_for(used: Mapping[str, Any], sm: int) -> str | None:
    """Why a compiled kernel (compiled.compile_launch) is not tried, or None."""
    limit = SHARED_LIMIT.get(sm, min(SHARED_LIMIT.values()))
    if used["stack"] or used["local"]:
        return f"spills {used['stack'] + used['local']} bytes a thread"
    if used["shared"] > limit:
        return f"needs {used['shared']} bytes of shared memory, and a block has {limit}"
    if used["registers"] * 32 * used["warps"] > REGISTERS:
        return f"needs {used['registers']} registers for {32 * used['warps']} threads, and there are {REGISTERS}"
    return None


class Compiler:
    """Compiles in processes of its own, so that a compiler that dies takes along no more than what it was given."""

    def __init__(self, sm: int, processes: int) -> None:
        self.sm, self.processes = sm, processes
        self.pool = _pool(processes)

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def candidates(self, target: Target, configs: Sequence[Config]) -> list[Candidate]:
        """The candidates, in the order of the configs."""
        found = self.each(compile_candidate, [(target, self.sm, config) for config in configs])
        return [result or Candidate(config, dropped="the compiler crashes")
                for config, result in zip(configs, found, strict=True)]

    def elsewhere(self, target: Target, config: Config) -> str | None:
        """Why tiles that are good for the shape cannot be launched in the class's other calls (ranges, several prompts, ...)."""
        calls = range(sum(1 for _ in tune_cases.variants(target.shape)))
        found = self.each(compile_candidate, [(target, self.sm, config, call) for call in calls])
        return next((result.dropped if result else "the compiler crashes" for result in found if not result or result.dropped),
                    None)

    def each(self, function: Callable[..., Any], jobs: Sequence[tuple]) -> list[Any]:
        """The function's results; None where a process died of it."""
        futures, found, broken = [self.pool.submit(function, *job) for job in jobs], [], False
        for job, future in zip(jobs, futures, strict=True):
            try:
                found.append(future.result())
            except BrokenProcessPool:                        # by one of those that were in it: each again by itself
                broken = True
                with _pool(1) as alone:
                    try:
                        found.append(alone.submit(function, *job).result())
                    except BrokenProcessPool:
                        found.append(None)
        if broken:
            self.pool = _pool(self.processes)
        return found


def _pool(processes: int) -> ProcessPoolExecutor:
    # spawned: a fork of a process that uses CUDA cannot use it
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start)


def _start() -> None:
    """Ctrl-C is for the process that writes the table, and what a compiler dumps when it fails is for nobody."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def resident_warps(candidate: Candidate, sm: int) -> tuple[int, str]:
    """Warps that a multiprocessor holds at a time, and what limits them."""
    small = sm in (86, 89, 120)                              # the consumer cards' multiprocessors
    shared, warps = SHARED_LIMIT.get(sm, min(SHARED_LIMIT.values())) + 1024, candidate.config.warps
    blocks = {"registers": REGISTERS // (-(-max(candidate.registers, 1) // 8) * 8 * 32 * warps),
              "shared memory": shared // (candidate.shared + 1024), "warps": (48 if small else 64) // warps,
              "blocks": 24 if small else 32}
    least = min(blocks, key=lambda name: blocks[name])
    return blocks[least] * warps, least


def work(target: Target, config: Any) -> tuple[int, int]:
    """Bytes that the programs of a (sequence, head) read beside what they own, and turns of a program's loop."""
    if target.kernel == "rows":
        return 0, 1
    shape, m, n = target.shape, config.block_m, config.block_n
    S, P = shape.S, shape.P
    times = lambda length, side: -(-length // side) if side else 0
    # packed tiles meet the rest of their first and of their last sequence as well
    met = lambda own: own + S if target.kernel.startswith("packed") else S
    if target.plain == "sweep":
        rows, turns = 2 * S, times(S, m)
    elif target.plain == "prefix":
        rows, turns = times(P, config.block_p) * 2 * S, times(S, m)
    elif target.plain == "dkdv":
        rows, turns = times(S, n) * 2 * met(n), times(met(n), m)
    else:
        rows, turns = times(S, m) * 2 * (met(m) + P), times(met(m), n) + times(P, config.block_p)
    return rows * shape.D * (4 if shape.dtype == "fp32" else 2), turns


def by_promise(target: Target, found: Sequence[Candidate], sm: int) -> list[Candidate]:
    """Survivors in the order ORDER."""
    def key(candidate: Candidate) -> tuple[bool, int, int, int]:
        warps, (read, turns) = resident_warps(candidate, sm)[0], work(target, candidate.config)
        return warps < ENOUGH_WARPS, read, turns, -warps

    return sorted((candidate for candidate in found if not candidate.dropped), key=key)
