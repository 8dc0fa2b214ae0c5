"""`ptv2 tune`: measure tiles of the Triton kernels on this machine's GPU and write their table, or only compile (--dry-run)."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ptv2_engine.errors import ConfigError, OutputError, did_you_mean
from ptv2_engine.kernels import tile_table

if TYPE_CHECKING:
    from ptv2_engine.tune_candidates import Candidate, Compiler, Target

ARCHS = (80, 86, 89, 90, 100, 120)


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="ptv2 tune", description="Find tiles of the Triton kernels that are faster on this GPU than the heuristic's, and "
        "keep them in a table that the kernels read. What is not in it stays with the heuristic.")
    parser.add_argument("--kernels", nargs="+", default=list(tile_table.FIELDS), metavar="KERNEL",
                        help=f"some of {', '.join(tile_table.FIELDS)} (default: all)")
    parser.add_argument("--shapes", nargs="+", default=["short"], metavar="SHAPE",
                        help="short (default): the classes of most runs, minutes; full: all, hours; or shapes such as "
                        "S128-P16-D64-bf16-dropout (rows of up to 128 tokens, 16 prefix rows, heads of 64), "
                        "relative-S128-P16-D64-bf16 (DeBERTa), H1024 (add_norm and embedding)")
    parser.add_argument("--changes", type=int, choices=[1, 2], default=1,
                        help="how many of a tile's parameters may differ from the heuristic's at once (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="compile only, and show what would be measured; needs no GPU")
    parser.add_argument("--arch", type=int, help=f"of --dry-run: {', '.join(map(str, ARCHS))} (default: this GPU's)")
    parser.add_argument("--device-name", help="that the table is for, where it is not what torch calls this GPU")
    parser.add_argument("--output", type=Path, default=tile_table.FOLDER,
                        help="folder of the table (default: the package's, where it takes effect; for another one set "
                        "PTV2_TUNING=FOLDER)")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1),
                        help="processes that compile (default: a CPU each, 16 at most)")
    args = parser.parse_args(argv)
    check_settings(args)
    from ptv2_engine import tune_cases
    from ptv2_engine.tune_candidates import ORDER, Compiler, targets

    groups = {"short": tune_cases.short, "full": tune_cases.full}
    shapes = [shape for name in args.shapes for shape in (groups[name]() if name in groups else [tune_cases.named(name)])]
    check_machine(args)
    found, seen = {}, set()
    for shape in shapes:                                     # a class that several shapes are in is measured once
        found[shape] = [target for target in targets(shape, args.kernels) if target.place not in seen]
        seen |= {target.place for target in found[shape]}
    if not seen:
        raise ConfigError(f"no shape of {', '.join(map(str, shapes))} launches {' or '.join(args.kernels)}; choose others by "
                          "--shapes, or leave --kernels out.")
    sm = args.arch or int("{}{}".format(*torch.cuda.get_device_capability()))
    with Compiler(sm, args.jobs) as compiler:
        if args.dry_run:
            print(f"Left to measure on sm_{sm}, the most promising first: {ORDER}.")
            for target in (target for group in found.values() for target in group):
                show(target, compiler, args.changes)
            return
        from ptv2_engine import tune  # not needed for a dry run, and slow to import

        device = args.device_name or torch.cuda.get_device_name()
        path = args.output / tile_table.file_name(device)
        for shape, group in found.items():
            for row in tune.tuned(shape, group, args.changes, compiler) if group else ():
                tune.write(path, device, " ".join(["ptv2 tune", *argv]), [row])      # what is interrupted keeps what it has
                print(tune.sentence(row), flush=True)
    print(f"written: {path}")


def check_settings(args: argparse.Namespace) -> None:
    """Raises ConfigError about what can work nowhere, before any work."""
    for kernel in args.kernels:
        if kernel not in tile_table.FIELDS:
            raise ConfigError(f"--kernels {kernel!r} does not exist{did_you_mean(kernel, tile_table.FIELDS)}")
    if args.jobs < 1:
        raise ConfigError(f"--jobs {args.jobs} is below 1; use 1 or more.")
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("ptv2 tune needs triton, which is not installed; pip install 'ptv2_engine[gpu]'.")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ConfigError("TRITON_INTERPRET=1 is set, and interpreted kernels have no tiles to tune; unset it.")
    if args.arch is not None and not args.dry_run:
        raise ConfigError(f"--arch {args.arch} goes with --dry-run only: what is measured is this machine's GPU.")
    if args.arch is not None and args.arch not in ARCHS:
        raise ConfigError(f"--arch {args.arch} is unknown; choose one of {', '.join(map(str, ARCHS))}.")


def check_machine(args: argparse.Namespace) -> None:
    """Raises ConfigError or OutputError about what cannot work here, before any work."""
    if args.arch is None and not torch.cuda.is_available():
        raise ConfigError("--dry-run needs --arch (80, 90, 100, ...) where there is no GPU." if args.dry_run else
                          "ptv2 tune measures, and torch sees no CUDA device here; run it on a machine with the GPU that the "
                          "table is for, or compile only: --dry-run --arch 90.")
    if not args.dry_run:
        try:
            args.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"--output {args.output} cannot be made: {error.strerror}.") from error
        if not os.access(args.output, os.W_OK):
            raise OutputError(f"--output {args.output} cannot be written to; choose another folder, and set PTV2_TUNING to it "
                              "to use what is found.")


def show(target: Target, compiler: Compiler, changes: int) -> None:
    """What would be measured of a kernel, most promising first, and what is left out and why."""
    from ptv2_engine.tune_candidates import by_promise, candidates, label, resident_warps, work

    def line(candidate: Candidate) -> str:
        warps, limit = resident_warps(candidate, compiler.sm)
        read, turns = work(target, candidate.config)
        tiles = label(target.kernel, candidate.config)
        return f"{tiles:36} {candidate.registers:>9} {candidate.shared:>7} {warps:>8} by {limit:13} {read:>9} {turns:>5}"

    mine, *others = compiler.candidates(target, [target.heuristic, *candidates(target, changes)])
    print(f"\n{target.kernel}, {target.shape}\n  {'':2} {'tiles':36} registers  shared    warps resident   bytes read turns")
    print(f"   = {line(mine)}  (the heuristic's{': ' + mine.dropped if mine.dropped else ''})")
    for i, candidate in enumerate(by_promise(target, others, compiler.sm), 1):
        print(f"  {i:2} {line(candidate)}")
    for candidate in others:
        if candidate.dropped:
            print(f"   - {label(target.kernel, candidate.config):36} left out: {candidate.dropped}")
    sys.stdout.flush()
