"""What `ptv2 memory` does: plan a training step, compare it, fit it on a card, measure it."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from ptv2_engine.encoder.checkpoints import model_config
from ptv2_engine.encoder.glm_sizes import glm_config
from ptv2_engine.encoder.layer import MEMORY
from ptv2_engine.encoder.weights import FAMILIES, FROZEN_DTYPES, empty_encoder
from ptv2_engine.errors import ConfigError, OutputError
from ptv2_engine.memory import Plan, Planner, Setup, card_bytes, largest_batch, measure, options_of, ways_out
from ptv2_engine.memory.fit import CARDS
from ptv2_engine.memory.peers import PEERS, plan_peer
from ptv2_engine.memory.report import draw, size, table, write_json
from ptv2_engine.model import TASKS
from ptv2_engine.prompt import PromptConfig

_SIZES = {"layers": "num_hidden_layers", "hidden_size": "hidden_size", "heads": "num_attention_heads",
          "ffn_size": "intermediate_size", "vocab_size": "vocab_size", "positions": "max_position_embeddings"}
_LARGEST = 10_000_000


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see ptv2 memory --help.")


def parser() -> argparse.ArgumentParser:
    made = _Parser(
        prog="ptv2 memory", allow_abbrev=False, description="Peak memory of a training step, without a GPU and without the "
        "weights: the engine's own code is run on tensors that have sizes and no memory.")

    def add(flag: str, *more: str, **options: Any) -> None:         # --batch-size and, as ptv2 train writes it, --batch_size
        names = dict.fromkeys(name for f in (flag, *more) for name in (f, "--" + f[2:].replace("-", "_")))
        made.add_argument(*names, **options)

    add("--model", help="hub id, local folder, or a published GLM such as glm-10b")
    add("--family", choices=sorted(FAMILIES), help="in place of --model, with --layers, --hidden-size, ...")
    for name in _SIZES:
        add(f"--{name.replace('_', '-')}", type=int)
    add("--task", default="sequence-classification", choices=TASKS)
    add("--num-labels", type=int, default=2)
    add("--batch-size", type=int, default=16)
    add("--seq-len", "--max-seq-length", type=int, help="real tokens of each sequence; default 512, or what the prompt leaves")
    add("--method", default="deep", choices=["deep", "shallow", "none"])
    add("--prompt-length", type=int, default=20)
    add("--prompt-layers", default="all")
    add("--reparameterization", default=None, choices=["mlp", "lstm"])
    add("--no-shift-positions", action="store_true", help="tokens keep their positions beside a prompt")
    add("--memory", default="exact", choices=MEMORY, help="what layers keep for backward")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    add("--frozen-dtype", default=None, choices=FROZEN_DTYPES, help="of the layers' matrices; default: --dtype")
    add("--stream-weights", nargs="?", const="host", default=None, choices=["host", "file"],
        help="layers' matrices stay in host memory, or in their file")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="planned for; it need not be there")
    add("--no-peers", action="store_true", help="leave out fine-tuning, LoRA and PEFT's prefix tuning")
    add("--fit", metavar="CARD", help=f"the largest batch on a card: {', '.join(CARDS)}, or a size such as 24gb")
    add("--measure", action="store_true", help="also run the step with random weights on --device")
    add("--output", metavar="FOLDER", help="write memory.json and memory.png there")
    return made


def model_of(args: argparse.Namespace) -> dict[str, Any]:
    """The config of what --model names, or the one that --family and sizes describe. Raises ConfigError."""
    sizes = {name: getattr(args, name) for name in _SIZES if getattr(args, name) is not None}
    for name, value in sizes.items():
        if not 1 <= value <= _LARGEST:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is no size of a model; use 1 to {_LARGEST:,}.")
    if (args.model is None) == (args.family is None):
        raise ConfigError("which model? Give --model NAME, or --family with --layers, --hidden-size, --heads; one of the two.")
    if args.model is not None:
        if sizes:
            raise ConfigError(f"--{next(iter(sizes)).replace('_', '-')} belongs to --family, and {args.model} brings its own "
                              "sizes; leave it out.")
        return model_config(args.model)                 # once: each plan reads its setup's config
    if args.family == "glm":
        if "ffn_size" in sizes:
            raise ConfigError(f"--ffn-size {sizes['ffn_size']} does not fit --family glm, whose FFN is 4 times the hidden size; "
                              "leave it out.")
        default = {"layers": 48, "hidden_size": 4096, "heads": 64, "vocab_size": 50304, "positions": 1024} | sizes
        return glm_config(*(default[name] for name in ("layers", "hidden_size", "heads", "vocab_size", "positions")))
    from transformers import AutoConfig

    return AutoConfig.for_model(args.family, **{_SIZES[name]: value for name, value in sizes.items()}).to_dict()


def setup_of(args: argparse.Namespace) -> Setup:
    prompt = PromptConfig(prompt_length=args.prompt_length, prompt_layers=args.prompt_layers, method=args.method,
                          reparameterization=args.reparameterization)
    setup = Setup(model_of(args), args.batch_size, 512, prompt, args.task, args.num_labels, args.memory, args.dtype,
                  args.frozen_dtype, args.stream_weights, args.device, shift_positions=not args.no_shift_positions)
    if args.seq_len is not None:
        return replace(setup, seq_len=args.seq_len)
    return replace(setup, seq_len=max(min(512, setup.longest()), 1))


def check(args: argparse.Namespace, setup: Setup) -> int | None:
    """Raises ConfigError and its kin for anything wrong, before anything is planned or written; returns the card's bytes."""
    setup.check()
    limit = card_bytes(args.fit) if args.fit is not None else None
    if args.measure and args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--measure needs the device that is planned for, but there is no GPU here; add --device cpu, or leave "
                          "--measure out.")
    if args.measure and args.stream_weights == "file":
        raise ConfigError("--measure runs a model with random weights, which has no file to stream from; use --stream-weights "
                          "host.")
    if args.output is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--output draws a picture, but matplotlib is not installed; pip install 'ptv2_engine[train]', or leave "
                          "--output out.")
    return limit


def run(argv: Sequence[str]) -> None:
    """Parse, plan, print; raises ConfigError and its kin before anything is written."""
    args = parser().parse_args(list(argv))
    setup = setup_of(args)
    limit = check(args, setup)
    folder, planner = _folder(args.output), Planner()
    plans, notes, found = compare(setup, planner, peers=not args.no_peers and args.device == "cuda")
    print(table(plans, on_cuda=args.device == "cuda"), end="")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if args.device == "cuda" and setup.stream_weights is None:        # streamed weights have no graphs
        found["cuda_graphs"] = planner.plan(replace(setup, cuda_graphs=True)).peak
        print(f"Training replays such steps as CUDA graphs, which takes {size(found['cuda_graphs'])} in all with their memory "
              "pool; where that does not fit, it goes without them.")
    if limit is not None:
        found["fit"] = fit(setup, planner, plans[0], args.fit, limit)
    if args.measure:
        found["measured"] = _measured(setup, plans[0])
    if folder is not None:
        settings = {name: value for name, value in vars(args).items() if name not in ("output", "no_peers", "measure")}
        heading = f"{args.model or args.family}: {setup.batch_size} x {setup.seq_len} tokens, prompt {args.prompt_length}"
        _write(folder, heading, settings | {"seq_len": setup.seq_len}, plans, found, limit)


def _write(folder: Path, heading: str, settings: dict[str, Any], plans: list[Plan], found: dict[str, Any],
           limit: int | None) -> None:
    try:
        draw(folder / "memory.png", plans, heading, limit)
        write_json(folder / "memory.json", settings, plans, found)
    except OSError as error:
        raise OutputError(f"{error.filename or folder} cannot be written ({error.strerror}); choose another --output.") from error
    print(f"written: {folder / 'memory.json'}, {folder / 'memory.png'}")


def compare(setup: Setup, planner: Planner, peers: bool) -> tuple[list[Plan], list[str], dict[str, Any]]:
    """The setup, the other memory policies, and what others would take."""
    plans, notes = [planner.plan(setup)], []
    for policy in (p for p in MEMORY if p != setup.memory):
        try:
            plans.append(planner.plan(replace(setup, memory=policy)))
        except ConfigError as error:
            notes.append(str(error))
    if peers:
        sizes = empty_encoder(setup.config()).config
        for peer in PEERS:
            counted = plan_peer(setup, sizes, peer)
            if isinstance(counted, str):
                notes.append(f"{peer}: {counted}")
            else:
                plans.append(counted)
    return plans, notes, {"notes": notes}


def fit(setup: Setup, planner: Planner, planned: Plan, card: str, limit: int) -> dict[str, Any]:
    """Print and return the largest batch that fits, and which options make an impossible one fit."""
    best = largest_batch(setup, limit, planner)
    said = f"on {card} ({size(limit)} for a step) the largest batch is {best} ({best * setup.seq_len:,} tokens)" if best else (
        f"on {card} ({size(limit)} for a step) not even one sequence fits")
    print(said + f" with {planned.title}")
    result: dict[str, Any] = {"card": card, "limit": limit, "largest_batch": best}
    if planned.peak <= limit:
        return result
    for changed, other in ways_out(setup, planner):
        if other.peak <= limit:
            options = options_of(changed, setup)
            result["way_out"] = {"options": options, "peak": other.peak, "host": other.host}
            host = f", and {size(other.host)} of host memory" if other.host else ""
            print(f"batch size {setup.batch_size} takes {size(planned.peak)}; it fits with {options}: {size(other.peak)}{host}")
            return result
    print(f"batch size {setup.batch_size} fits with no option; " + (
        "use a smaller one with gradient accumulation (--auto_batch in training)" if best else "use a larger card"))
    return result


def _measured(setup: Setup, planned: Plan) -> dict[str, Any]:
    nbytes = measure(setup, setup.device)
    name = torch.cuda.get_device_name() if setup.device == "cuda" else "CPU"
    print(f"predicted {size(planned.peak)}, measured {size(nbytes)} on {name}: {100 * (planned.peak / nbytes - 1):+.2f} %")
    return {"device": name, "bytes": nbytes, "predicted": planned.peak}


def _folder(output: str | None) -> Path | None:
    if output is None:
        return None
    folder = Path(output)
    try:
        if not output:
            raise FileNotFoundError(errno.ENOENT, "it has no name")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--output {output!r} cannot be made ({error.strerror}); choose another folder.") from error
    return folder
