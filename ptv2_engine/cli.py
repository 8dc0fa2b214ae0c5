"""The `ptv2` command: train, evaluate, predict, ablate, data, presets, memory, bench, tune, info. Parses arguments and prints."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ptv2_engine.errors import ConfigError, PTV2Error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 2 with one sentence on stderr for anything a user can mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": _train, "evaluate": _evaluate, "predict": _predict, "ablate": _ablate, "data": _data, "presets": _presets,
        "memory": _memory, "bench": _bench, "tune": _tune, "info": _info}
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: ptv2 {{{','.join(commands)}}} ...\n\n"
              "  train     train a prompt on a frozen backbone (ptv2 train --help: all flags)\n"
              "  evaluate  score an adapter on a file\n"
              "  predict   label texts with an adapter\n"
              "  ablate    run a grid of settings and draw its figures\n"
              "  data      check FILE: examples, labels, lengths and mistakes of a file, before training\n"
              "  presets   the published settings that train --preset takes\n"
              "  memory    peak memory of a training step, before it is run\n"
              "  bench     measure kernels and training steps beside their peers (from a checkout)\n"
              "  tune      find tiles of the GPU kernels that are faster here than the built-in choice\n"
              "  info      versions, devices, and which backend runs for each op and why; info MODEL: its sizes")
        return 0
    if argv[0] == "--version":
        from ptv2_engine import __version__

        print(__version__)
        return 0
    if argv[0] not in commands:
        print(f"ptv2: {argv[0]!r} is not a command; choose one of {', '.join(commands)}.", file=sys.stderr)
        return 2
    try:
        commands[argv[0]](argv[1:])
    except PTV2Error as error:
        print(f"ptv2: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ptv2: interrupted; checkpoints written so far are kept.", file=sys.stderr)
        return 130
    return 0


def _train(argv: list[str]) -> None:
    from ptv2_engine import cli_args

    if {"-h", "--help"} & set(argv):
        cli_args.print_help()
        return
    model_args, data_args, prompt_args, training_args, notes = cli_args.parse_train(argv)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    from ptv2_engine.cli_train import train

    try:
        results = train(model_args, data_args, prompt_args, training_args)
    except ConfigError as error:
        raise ConfigError(cli_args.as_flags(str(error))) from error
    print(json.dumps(results, indent=2))


def _adapter_parser(name: str, text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"ptv2 {name}", description=text)
    parser.add_argument("adapter", help="folder that training wrote")
    add: Any = lambda flag, **options: parser.add_argument(*dict.fromkeys((flag, flag.replace("_", "-"))), **options)
    parser.add_argument("--backbone", help="hub id or folder, when the one the adapter names is elsewhere")
    add("--text_columns", nargs="+", help="default: those of the training run")
    add("--batch_size", type=int, default=64)
    add("--max_seq_length", type=int, help="default: that of the training run")
    parser.add_argument("--device", default=None, help="default: cuda when there is one, else cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=None)
    add("--frozen_dtype", choices=["none", "bf16", "int8", "fp8", "nf4"], default=None,
        help="of the layers' matrices; default: that of the training run")
    add("--stream_weights", choices=["host", "file"], default=None, help="where the layers' matrices stay")
    return parser


def _evaluate(argv: list[str]) -> None:
    parser = _adapter_parser("evaluate", "Score an adapter on a labelled file; prints metrics as JSON.")
    parser.add_argument("file", help="csv, tsv, json, jsonl, parquet or CoNLL columns")
    parser.add_argument("--label_column")
    args = parser.parse_args(argv)
    from ptv2_engine.cli_predict import Predictor

    print(json.dumps(Predictor(args).evaluate(args.file, args.label_column), indent=2))


def _predict(argv: list[str]) -> None:
    parser = _adapter_parser("predict", "Label texts with an adapter.")
    parser.add_argument("texts", nargs="*", help="texts; without any and without --file, lines of standard input are read")
    parser.add_argument("--file", help="csv, tsv, json, jsonl or parquet with the text columns")
    parser.add_argument("--format", choices=["table", "jsonl", "csv"], help="default: as --output is named, else a table")
    parser.add_argument("--output", help="write there (.jsonl, .csv or .txt) instead of standard output")
    args = parser.parse_args(argv)
    from ptv2_engine.cli_predict import predict

    predict(args)


def _bench(argv: list[str]) -> None:
    from ptv2_engine.cli_bench import run

    run(argv)


def _tune(argv: list[str]) -> None:
    from ptv2_engine.cli_tune import run

    run(argv)


def _ablate(argv: list[str]) -> None:
    from ptv2_engine.ablate import run

    run(argv)


def _data(argv: list[str]) -> None:
    from ptv2_engine.cli_data import run

    run(argv)


def _presets(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="ptv2 presets", description="The published settings, and the flags of one.")
    parser.add_argument("name", nargs="?", help="show this one's flags")
    args = parser.parse_args(argv)
    from ptv2_engine.presets import list_presets, load_preset

    if args.name is None:
        print("".join(f"{name:28} {summary}\n" for name, summary in list_presets()), end="")
    else:
        print("".join(f"--{name} {' '.join(values)}\n" for name, values in load_preset(args.name).items()), end="")


def _memory(argv: list[str]) -> None:
    from ptv2_engine.cli_memory import run

    run(argv)


def _info(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="ptv2 info", description="Versions, devices, backends; or the sizes of one model and "
                                     "of a prompt for it, from its config.json alone.")
    parser.add_argument("model", nargs="?", help="hub id, local folder, or a published GLM such as glm-10b")
    parser.add_argument("--prompt_length", "--prompt-length", type=int, default=20)
    parser.add_argument("--prompt_layers", default="all")
    parser.add_argument("--method", default="deep")
    parser.add_argument("--reparameterization", default=None)
    parser.add_argument("--reparameterization_hidden", type=int, default=512)
    args = parser.parse_args(argv)
    from ptv2_engine.info import describe, describe_model
    from ptv2_engine.prompt import PromptConfig

    if args.model is None:
        print(describe())
        return
    prompt = PromptConfig(**{name: value for name, value in vars(args).items() if name != "model"})
    print(describe_model(args.model, prompt))


if __name__ == "__main__":
    raise SystemExit(main())
