"""The memory profile at 10B: planned for any model anywhere, measured where it runs.

    python benchmarks/memory_profile.py plan                      # every policy, dtype, length and prompt; no GPU, no weights
    python benchmarks/memory_profile.py measure [--device cuda]   # the same steps run with random weights: bytes and tokens/s
    python benchmarks/memory_profile.py docs                      # docs/memory-at-10b.md's tables and picture from the results

plan writes RESULTS/memory-plan-MODEL.json, measure RESULTS/DEVICE/memory-profile-MODEL.json. Beside a streamed step, measure also
times the step with its weights on the device and the copies alone, and reports how much of the copies hid behind the products:
1 - (streamed - resident) / copies. Peers (PEFT prefix tuning, LoRA; on a BERT of the sizes where they have no GLM) are planned on
their own code, and measured on a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import commit, cpu_name

from ptv2_engine import PromptConfig
from ptv2_engine.encoder.weights import empty_encoder
from ptv2_engine.errors import PTV2Error
from ptv2_engine.memory import Planner, Setup, card_bytes, largest_batch, measure
from ptv2_engine.memory.peers import PEERS, StockWorkload, plan_peer
from ptv2_engine.memory.planner import Workload
from ptv2_engine.ops import KINDS

POLICIES, FROZEN = ("exact", "lean", "minimal"), (None, "int8", "nf4")
LENGTHS, PROMPTS = (128, 256, 512, 1024), (16, 128)
RESULTS = Path(__file__).parent / "results"


def row_of(setup: Setup, **found: Any) -> dict[str, Any]:
    """A setup's options and what was found, as JSON."""
    kept = {k: getattr(setup, k) for k in ("batch_size", "seq_len", "memory", "dtype", "frozen_dtype", "stream_weights")}
    return kept | {"prompt_length": setup.prompt.prompt_length, "tokens": setup.batch_size * setup.seq_len} | found


def record(what: str, args: argparse.Namespace, device: str, **found: Any) -> dict[str, Any]:
    return {"what": what, "model": args.model, "device": device, "date": datetime.date.today().isoformat(), "commit": commit(),
            "torch": torch.__version__, "command": " ".join(["python", "benchmarks/memory_profile.py", *sys.argv[1:]]), **found}


def write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {file}")


def setups(base: Setup) -> list[Setup]:
    """Every combination, grouped so that a planner's model serves all policies and lengths."""
    return [replace(base, prompt=PromptConfig(P), frozen_dtype=frozen, stream_weights=stream, memory=policy, seq_len=S,
                    batch_size=base.batch_size * base.seq_len // S)
            for P in PROMPTS for stream in (None, "host") for frozen in FROZEN for policy in POLICIES for S in LENGTHS]


def plan_all(args: argparse.Namespace) -> None:
    """Peaks at --tokens tokens for every combination; the most tokens on --card at 512 tokens a sequence; peers."""
    base, rows, most, peers = Setup(args.model, args.tokens // 512, 512, PromptConfig(128)), [], [], []
    limit, planner = card_bytes(args.card), Planner()
    for setup in setups(base):
        plan = planner.plan(setup)
        rows.append(row_of(setup, peak=plan.peak, parts=plan.parts, host=plan.host, units=plan.saved_per_token_and_layer))
        if setup.seq_len == 512 and setup.prompt.prompt_length == 128:
            batch = largest_batch(setup, limit, planner)
            most.append(row_of(replace(setup, batch_size=max(batch, 1)), largest_batch=batch))
            print(f"{plan.title}: {plan.peak / 2**30:.2f} GiB; {batch * 512} tokens fit {args.card}", flush=True)
    for peer in PEERS:
        found = plan_peer(base, empty_encoder(base.config()).config, peer)
        peers.append({"peer": peer, "why_not": found} if isinstance(found, str) else found.to_dict())
    write(args.results / f"memory-plan-{Path(args.model).name}.json",
          record("memory plan", args, "none", tokens=args.tokens, card=args.card, limit=limit, rows=rows, most=most, peers=peers))


def seconds(step: Any, device: torch.device, rounds: int) -> float:
    """The median of timed steps behind one that is not."""
    found = []
    for i in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i:
            found.append(time.perf_counter() - started)
    return statistics.median(found)


def time_step(setup: Setup, device: torch.device, rounds: int) -> dict[str, float]:
    """Seconds of a step, and of streamed weights' copies alone."""
    workload = Workload(setup, device)
    batch = workload.batch()
    found = {"seconds": seconds(lambda: workload.step(batch), device, rounds)}
    if (stream := workload.model.encoder.stream) is not None:
        first = [next(iter(layout.parts)) for layout in stream.blocks.layouts]

        def copies() -> None:
            for linear in (*first, *reversed(first)):
                stream.fetch(linear)

        found["copies"] = seconds(copies, device, rounds)
    return found


def time_streamed(setup: Setup, device: torch.device, rounds: int) -> dict[str, float]:
    """time_step, and how much of the copies hid behind the products, where the weights fit the device too."""
    found = time_step(setup, device, rounds)
    gc.collect()
    try:
        found["resident"] = time_step(replace(setup, stream_weights=None), device, rounds)["seconds"]
        if found["copies"] > 0.05 * found["seconds"]:                   # less drowns in the noise of the steps
            found["hidden"] = 1 - (found["seconds"] - found["resident"]) / found["copies"]
    except torch.OutOfMemoryError:
        pass
    return found


def measure_all(args: argparse.Namespace) -> None:
    """Predicted and measured bytes, and tokens/s, of the chosen combinations, as far as they fit the device."""
    device, planner, rows = torch.device(args.device), Planner(), []
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    folder = args.results / name.lower().replace("nvidia ", "").replace(" ", "-")

    def keep(peers: list[dict[str, Any]]) -> None:
        file = folder / f"memory-profile-{Path(args.model).name}.json"
        write(file, record("memory profile", args, name, rows=rows, peers=peers))

    base = Setup(args.model, max(args.tokens // args.seq_len, 1), args.seq_len, PromptConfig(args.prompt_length),
                 device=device.type)
    wanted = [replace(base, memory=memory, frozen_dtype=None if frozen == "none" else frozen,
                      stream_weights=None if stream == "none" else stream)
              for frozen in args.frozen for stream in args.stream for memory in args.memory]
    for setup in wanted:
        plan = planner.plan(setup)
        try:
            found: dict[str, Any] = {"measured": measure(setup, device)}
            gc.collect()
            if args.rounds:
                found |= (time_streamed if setup.stream_weights else time_step)(setup, device, args.rounds)
                found["tokens_per_s"] = plan.tokens / found["seconds"]
        except (torch.OutOfMemoryError, PTV2Error) as error:
            found = {"why_not": str(error).splitlines()[0]}
        gc.collect()
        rows.append(row_of(setup, title=plan.title, predicted=plan.peak, **found))
        print({k: v for k, v in rows[-1].items() if k not in ("batch_size", "dtype")}, flush=True)
        keep([])                                        # a run that is ended keeps what it has
    if device.type == "cuda" and not args.no_peers:
        keep([measure_peer(base, peer, device) for peer in PEERS[1:]])


def measure_peer(setup: Setup, peer: str, device: torch.device) -> dict[str, Any]:
    """A peer's peak on the device and its tokens/s, on the largest batch that fits, halved from the setup's."""
    def run(smaller: Setup) -> dict[str, Any]:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.device(device):
            workload = StockWorkload(smaller, empty_encoder(setup.config()).config, peer, autocast=False)
            batch = workload.batch()
        took = seconds(lambda: workload.step(batch), device, 3)
        return {"peer": peer, "batch_size": smaller.batch_size, "measured": torch.cuda.max_memory_allocated() - before,
                "tokens_per_s": smaller.batch_size * setup.seq_len / took}

    for batch_size in (setup.batch_size >> i for i in range(setup.batch_size.bit_length())):
        try:
            return run(replace(setup, batch_size=batch_size))
        except torch.OutOfMemoryError:
            pass
        except (RuntimeError, ValueError, TypeError, ImportError) as error:
            return {"peer": peer, "why_not": str(error).splitlines()[0]}
        gc.collect()                                    # the model that was too large goes before the next is made
        torch.cuda.empty_cache()
    return {"peer": peer, "why_not": "not even one sequence fits"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--model", default="glm-10b")
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan")
    plan.add_argument("--tokens", type=int, default=8192)
    plan.add_argument("--card", default="h100-80gb")
    run = commands.add_parser("measure")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--tokens", type=int, default=8192)
    run.add_argument("--seq-len", type=int, default=512)
    run.add_argument("--prompt-length", type=int, default=128)
    run.add_argument("--rounds", type=int, default=3, help="timed steps; 0 measures memory only")
    run.add_argument("--memory", nargs="+", default=list(POLICIES), choices=POLICIES)
    run.add_argument("--frozen", nargs="+", default=["none", "int8"], choices=["none", *KINDS])
    run.add_argument("--stream", nargs="+", default=["none", "host"], choices=["none", "host"])
    run.add_argument("--no-peers", action="store_true", help="leave out fine-tuning's and LoRA's steps")
    docs = commands.add_parser("docs")
    docs.add_argument("--file", type=Path, default=Path(__file__).parents[1] / "docs/memory-at-10b.md")
    args = parser.parse_args()
    if args.command == "docs":
        from memory_tables import rewrite

        rewrite(args.file, args.results)
        return
    (plan_all if args.command == "plan" else measure_all)(args)


if __name__ == "__main__":
    main()
