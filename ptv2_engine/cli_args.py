"""What `ptv2 train` accepts: every transformers.TrainingArguments flag, ours, a YAML file, and the published spelling."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

from ptv2_engine.errors import ConfigError, did_you_mean
from ptv2_engine.methods import BY_NAME, Method, prompt_init, resolve
from ptv2_engine.presets import flags_of, list_presets, load_preset, read_yaml
from ptv2_engine.prompt import PromptConfig

DEFAULTS = {"output_dir": "runs/ptv2", "per_device_train_batch_size": "32",
            "per_device_eval_batch_size": "64", "num_train_epochs": "10", "logging_steps": "10", "report_to": "none",
            "eval_strategy": "epoch", "disable_tqdm": "True"}

# the published scripts' flags (and transformers 4's) -> ours
ALIASES = {
    "pre_seq_len": "prompt_length",
    "prefix_hidden_size": "reparameterization_hidden",
    "evaluation_strategy": "eval_strategy",
    "reparam": "reparameterization",
    "depth": "prompt_layers",
    "backbone": "model_name_or_path",
    "init": "prompt_init",
    "null_score_diff_threshold": "null_threshold",
}
SWITCHES = {"prefix": ("method", "p-tuning-v2"), "prompt": ("method", "prompt-tuning"),
            "prefix_projection": ("reparameterization", "mlp"), "stream_weights": ("stream_weights", "host")}
# flags of the published scripts that have no effect here
IGNORED = {"overwrite_output_dir", "overwrite_cache", "use_fast_tokenizer", "pad_to_max_length", "do_train", "use_auth_token",
           "cache_dir", "config_name", "version_2_with_negative"}


# where transformers' words do not say what happens here
_OWN_HELP = {"resume_from_checkpoint": "a checkpoint-STEP folder; nothing, or True: the last one in --output_dir",
             "load_best_model_at_end": "save the best evaluation's adapter and not the last one's; needs validation data",
             "metric_for_best_model": "what the best is by; default: the task's first metric",
             "bf16": "cast the frozen backbone to bfloat16 once; prompt and head stay float32", "fp16": "not taken; use --bf16",
             "do_predict": "write predictions of the test data into --output_dir"}


@dataclass
class ModelArguments:
    """The backbone, and how much memory it may take (ptv2 memory plans it)."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "hub id or local folder of the frozen backbone"})
    tokenizer_name: str | None = field(default=None, metadata={"help": "default: the backbone's"})
    dtype: str | None = field(
        default=None, metadata={"help": "float32 or bfloat16; default: the checkpoint's (--bf16 also casts)"}
    )
    pooler: str = field(default="auto", metadata={"help": "frozen (pretrained), trained, or auto"})
    shift_positions: bool = field(default=True, metadata={"help": "tokens take the positions behind the prompt, as published"})
    hidden_dropout_prob: float | None = field(default=None, metadata={
        "help": "overwrites the backbone's hidden dropout, the prompt's and the head's, as the published flag does"})
    memory: str = field(default="exact", metadata={
        "help": "what layers keep for backward: exact, lean (8-bit and 6-bit codes, attention computed again) or minimal (layers "
        "computed again)"})
    frozen_dtype: str | None = field(default=None, metadata={"help": "bf16, int8, fp8 or nf4: how the layers' matrices are kept"})
    stream_weights: str | None = field(default=None, metadata={
        "help": "host (or nothing) or file: the layers' matrices stay there and visit the device when they are used"})
    auto_batch: bool = field(default=False, metadata={
        "help": "lower the micro-batch to what fits, and accumulate gradients so that the batch stays"})
    plan_memory: bool = field(default=True, metadata={"help": "plan before training, and refuse what does not fit"})
    cuda_graphs: bool = field(default=True, metadata={"help": "on a GPU, replay training steps as CUDA graphs where that works"})


@dataclass
class DataArguments:
    """Your own files, or a published data set by name."""

    train_file: str | None = field(
        default=None, metadata={"help": "csv, tsv, json, jsonl, parquet or CoNLL columns (txt, conll)"}
    )
    validation_file: str | None = field(default=None, metadata={"help": "scored after every epoch (--eval_strategy)"})
    test_file: str | None = field(default=None, metadata={"help": "scored after training; its predictions: --do_predict"})
    task: str | None = field(default=None, metadata={
        "help": "sequence-classification, token-classification, question-answering, multiple-choice, or regression (numbers to "
        "come close to; whole ones are classes unless it is named); default: by the columns"})
    text_columns: list[str] | None = field(default=None, metadata={
        "help": "one or two columns; one with word lists for tagging; question and context for question answering"})
    label_column: str | None = field(default=None, metadata={"help": "default: label, labels, tags or answers"})
    choice_columns: list[str] | None = field(default=None, metadata={
        "help": "multiple choice: a column a choice, or one that holds lists; default: choice1, choice2, ..., or choices"})
    doc_stride: int = field(default=128, metadata={"help": "question answering: tokens that two windows share"})
    n_best_size: int = field(default=20, metadata={"help": "question answering: starts and ends that are combined"})
    max_answer_length: int = field(default=30, metadata={"help": "question answering: tokens of an answer"})
    null_threshold: float = field(default=0.0, metadata={"help": "question answering: how much better no answer must score"})
    task_name: str | None = field(default=None, metadata={"help": "glue, superglue, ner, srl or qa"})
    dataset_name: str | None = field(default=None, metadata={"help": "rte, sst2, conll2003, squad, ..."})
    multi_task: str | None = field(default=None, metadata={
        "help": "YAML file of several data sets that share one prompt (docs/tasks.md), in place of one data set"})
    data_dir: str | None = field(default=None, metadata={"help": "folder with the data set's files instead of the hub"})
    template_id: int = field(default=0, metadata={"help": "input template of WiC and WSC (0 or 1)"})
    head: str = field(default="classifier", metadata={
        "help": "classifier (a trained linear layer), or cloze (the verbalizer: the frozen language model fills a blank)"})
    pattern_id: int = field(default=0, metadata={"help": "cloze: which of the published patterns of the data set"})
    pattern: str | None = field(default=None, metadata={
        "help": "cloze, own data: columns and one blank, such as '{premise} Question: {hypothesis}? Answer: {mask}.'"})
    verbalizers: list[str] | None = field(default=None, metadata={"help": "cloze, own data: 'label= word' for each label"})
    max_seq_length: int = field(default=128, metadata={"help": "tokens kept of an example; the model's limit also applies"})
    max_train_samples: int | None = field(default=None, metadata={"help": "take only the first rows of the training data"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "the same of the validation data"})
    max_predict_samples: int | None = field(default=None, metadata={"help": "the same of the test data"})


@dataclass
class PromptArguments:
    """What is trained beside the head."""

    method: str = field(default="p-tuning-v2", metadata={
        "help": "p-tuning-v2 (every layer), prompt-tuning (input), p-tuning (v1: input, behind an LSTM), head-only, fine-tuning, "
        "bitfit, or lora (PEFT's)"})
    prompt_length: int = field(default=20, metadata={
        "help": "vectors a layer; the paper: below 20 for simple tasks, about 100 for hard ones"})
    prompt_layers: str = field(default="all", metadata={"help": "all, a number k for the top k, or layers from 1 such as 17-24"})
    reparameterization: str | None = field(default=None, metadata={"help": "mlp, lstm or none"})
    reparameterization_hidden: int = field(default=512, metadata={"help": "width of the mlp or lstm"})
    prompt_dropout: float = field(default=0.1, metadata={"help": "on the prompt; --hidden_dropout_prob overwrites it"})
    prompt_init: str = field(default="normal", metadata={
        "help": "what the prompt starts from, --init for short: normal, zero, tokens (random ones of the vocabulary), 'text:some "
        "words', or the folder of a saved adapter"})
    lora_rank: int = field(default=8, metadata={"help": "of --method lora"})
    lora_alpha: int = field(default=16, metadata={"help": "of --method lora: the update is alpha / rank * B A"})
    head_learning_rate: float | None = field(default=None, metadata={"help": "of the head; default: --learning_rate"})
    epoch_decay: float | None = field(
        default=None, metadata={"help": "multiply the rate by this each epoch; default 0.95 for tagging and question answering, "
                                "where no --lr_scheduler_type is given; 0: use the scheduler"}
    )

    def resolved(self) -> Method:
        """The method by its name. Raises ConfigError."""
        none = (self.reparameterization or "none").lower() == "none"
        return resolve(self.method, None if none else self.reparameterization)

    def prompt_config(self, tokenizer: Any = None) -> PromptConfig:
        """tokenizer: for prompt_init 'text:...'. Raises ConfigError."""
        method = self.resolved()
        init = {"init": self.prompt_init} if tokenizer is None else prompt_init(self.prompt_init, tokenizer, self.prompt_length)
        return PromptConfig(prompt_length=self.prompt_length, prompt_layers=self.prompt_layers, method=method.prompt_method,
                            reparameterization=method.reparameterization, prompt_dropout=self.prompt_dropout,
                            reparameterization_hidden=self.reparameterization_hidden, **init)


GROUPS = (ModelArguments, DataArguments, PromptArguments, TrainingArguments)


def known_flags() -> list[str]:
    return [f.name for group in GROUPS for f in dataclasses.fields(group) if f.init]


def parse_train(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, PromptArguments, TrainingArguments, list[str]]:
    """The four groups and notes for the user (ignored flags). Later wins: defaults, --preset, --config's file, the flags.

    Raises ConfigError for an unknown flag or key, naming the nearest.
    """
    notes: list[str] = []
    merged = {name: [value] for name, value in DEFAULTS.items()} | over_files(split_flags(argv), notes)
    if "lr_scheduler_type" in merged:
        merged.setdefault("epoch_decay", ["0"])
    method = BY_NAME.get(merged.get("method", ["p-tuning-v2"])[0])
    merged.setdefault("learning_rate", [str(method.learning_rate if method else 5e-3)])
    _settle_best(merged)
    if merged.get("resume_from_checkpoint") == []:
        merged["resume_from_checkpoint"] = ["True"]
    if not torch.cuda.is_available():
        merged.setdefault("use_cpu", ["True"])      # transformers refuses --bf16 without it
    known = set(known_flags())
    for name in merged:
        if name not in known:
            names = sorted(known | set(ALIASES) | set(SWITCHES))
            raise ConfigError(f"--{name} is not a flag of ptv2 train"
                              f"{did_you_mean(name, names, '--', 'ptv2 train --help lists them')}")
    parser: Any = _hf_parser(GROUPS, allow_abbrev=False, prog="ptv2 train")
    parser.error = _refuse
    words = [word for name, values in merged.items() for word in (f"--{name}", *values)]
    try:
        return (*parser.parse_args_into_dataclasses(words), notes)
    except ConfigError:
        raise
    except ValueError as error:      # TrainingArguments checks its own fields
        raise ConfigError(f"{' '.join(str(error).split()).rstrip('.')}; see ptv2 train --help.") from error


def _settle_best(merged: dict[str, list[str]]) -> None:
    """The default of save_strategy: a checkpoint of each new best where the best is to be kept, else none; and what the best is
    by, where transformers would take it otherwise. `merged` is changed. Raises ConfigError where the best is to be kept and the
    strategies differ."""
    by = "".join(merged.get("metric_for_best_model", []))
    if by == "loss":                            # what transformers also says where nothing was named
        merged["metric_for_best_model"] = ["eval_loss"]
    elif by.endswith("mse"):                    # the one metric that falls, beside the losses, which transformers knows
        merged.setdefault("greater_is_better", ["False"])
    keeps = "".join(merged.get("load_best_model_at_end", ["false"])).lower() in ("", "true")
    saving, evaluating = merged.setdefault("save_strategy", ["best" if keeps else "no"]), merged["eval_strategy"]
    if keeps and saving not in (["best"], evaluating):
        raise ConfigError("--load_best_model_at_end needs a checkpoint of every evaluation, but --save_strategy "
                          f"{' '.join(saving)} is not --eval_strategy {' '.join(evaluating)}; leave --save_strategy out.")


def as_flags(sentence: str) -> str:
    """A sentence that names Python's arguments, in the command line's words: "prompt_length 0 is below 1; use method='none'"
    becomes "--prompt_length 0 is below 1; use --method none"."""
    names = "|".join({*known_flags(), *ALIASES})
    sentence = re.sub(rf"(?<![\w-])({names})=(['\"]?)([\w:]+)\2", r"--\1 \3", sentence)
    return re.sub(rf"(^|(?<![\w-])(?=[a-z]+_))({names})(?= ['\d-])", r"--\2", sentence)


def over_files(flags: dict[str, list[str]], notes: list[str]) -> dict[str, list[str]]:
    """Flags in our spelling over those of the files they name: --preset, then --config's, then the flags. Raises ConfigError."""
    flags = translate(flags, notes)
    file, preset = flags.pop("config", None), flags.pop("preset", None)
    if file is not None:
        path = _single("config", file, "FILE.yaml")
        config = translate(flags_of(read_yaml(path, "--config"), f"--config {path}"), notes)
        preset, flags = preset or config.pop("preset", None), config | flags
    if preset is None:
        return flags
    published = translate(load_preset(_single("preset", preset, ", ".join(name for name, _ in list_presets()))), notes)
    if {"train_file", "multi_task"} & set(flags):           # data of one's own with the preset's settings
        published = {k: v for k, v in published.items() if k not in ("task_name", "dataset_name", "template_id")}
    return published | flags


def _single(flag: str, values: list[str], what: str) -> str:
    if len(values) != 1:
        raise ConfigError(f"--{flag} takes one value, but got {len(values)}; give {what}.")
    return values[0]


def print_help() -> None:
    """All flags with the defaults that ptv2 train has, and the published spellings."""
    other = ", ".join(f"--{name} = --{ours}" for name, ours in ALIASES.items())
    switches = ", ".join(f"--{name} alone = --{flag} {value}" for name, (flag, value) in SWITCHES.items())
    parser: Any = _hf_parser(
        GROUPS, prog="ptv2 train", usage="ptv2 train --model_name_or_path MODEL --train_file FILE [--FLAG VALUE ...]",
        epilog=f"Other spellings: {other}, {switches}. --preset NAME (ptv2 presets lists them) and --config FILE.yaml give flags "
        "too; those of the command line win.")
    rate = "of the method: " + ", ".join(f"{method.learning_rate:g} ({name})" for name, method in BY_NAME.items())
    parser.set_defaults(**DEFAULTS, learning_rate=rate, use_cpu="where there is no GPU",
                        save_strategy="no; best with --load_best_model_at_end")
    for action in parser._actions:          # "default: the backbone's" needs no "(default: None)"
        if action.default is None:
            action.default = argparse.SUPPRESS
        action.help = _OWN_HELP.get(action.dest, action.help)
    parser.print_help()


_hf_parser: Any = HfArgumentParser      # its annotation does not admit a tuple of dataclass types


def _refuse(message: str) -> None:
    raise ConfigError(f"{message}; see ptv2 train --help.")


def split_flags(argv: Sequence[str]) -> dict[str, list[str]]:
    """--name a b --flag --x=1 -> {"name": ["a", "b"], "flag": [], "x": ["1"]}"""
    flags: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            current = flags[name.replace("-", "_")] = [value] if equals else []
        elif current is None:
            raise ConfigError(f"{word!r} stands alone; ptv2 train takes --flag value pairs.")
        else:
            current.append(word)
    return flags


def translate(flags: dict[str, list[str]], notes: list[str]) -> dict[str, list[str]]:
    """Published flags by our names; what has no effect here becomes a note."""
    out: dict[str, list[str]] = {}
    for name, values in flags.items():
        if name in SWITCHES and (not values or values[0].lower() in ("true", "false")):
            if not values or values[0].lower() == "true":
                target, value = SWITCHES[name]
                out[target] = [value]
        elif name in IGNORED:
            notes.append(f"--{name} has no effect here")
        else:
            out[ALIASES.get(name, name)] = values
    return out
