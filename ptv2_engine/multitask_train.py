"""`ptv2 train --multi_task FILE`: one prompt over several data sets (MPT-2), each evaluated by itself.

The file:

    temperature: 2          # how data sets are drawn: by size ** (1 / temperature); default 1
    mix: false              # true: several data sets in one packed batch
    data_sets:
      rte: {task_name: superglue, dataset_name: rte}
      mine: {train_file: train.jsonl, validation_file: dev.jsonl, max_seq_length: 64}

A data set takes the data flags of `ptv2 train`. Each gets an adapter in OUTPUT/NAME, and OUTPUT is what `--init` of a data set's
own run may name: the second stage.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import transformers
from torch import nn
from transformers import HfArgumentParser, TrainingArguments

from ptv2_engine.adapter import replace_file
from ptv2_engine.batches import PackedCollator
from ptv2_engine.cli_args import DataArguments, ModelArguments, PromptArguments
from ptv2_engine.cli_predictions import write_test_predictions
from ptv2_engine.cli_tables import described, load_data, own_flags
from ptv2_engine.cli_train import (
    best_candidate,
    check_arguments,
    check_smoothing,
    evaluates,
    features_of,
    has_validation,
    load_tokenizer,
    make_model,
    picks,
    run_training,
    saved_line,
    settle_evaluation,
    text_length,
    trained_parameters,
    write_settings,
)
from ptv2_engine.errors import ConfigError, did_you_mean
from ptv2_engine.masked_lm import masked_lm_for
from ptv2_engine.multitask import MultiTaskBatchSampler, MultiTaskCollator, MultiTaskModel
from ptv2_engine.presets import flags_of, read_yaml
from ptv2_engine.progress import show_progress
from ptv2_engine.tasks.base import Feature, Task, as_features
from ptv2_engine.tasks.data import Table
from ptv2_engine.trainer import Trainer, check_writable, label_names_of


@dataclass
class DataSet:
    """One of the data sets: its tables, task and features by split."""

    name: str
    arguments: DataArguments
    tables: dict[str, Table]
    task: Task
    features: dict[str, list[Feature]] = dataclasses.field(default_factory=dict)
    max_length: int = 0

    def tokenise(self, tokenizer: Any, prompt_length: int, model: Any) -> None:
        self.max_length = text_length(self.arguments, prompt_length, model)
        self.features = features_of(self.task, self.tables, tokenizer, self.max_length)


class MultiTaskTrainer(Trainer):
    """Trainer of a MultiTaskModel: batches by data set, and an evaluation of each under eval_NAME_METRIC, with their mean."""

    def __init__(self, model: MultiTaskModel, args: TrainingArguments, sets: list[DataSet], *, temperature: float = 1.0,
                 mix: bool = False, **options: Any) -> None:
        self.sets, self.temperature, self.mix = sets, temperature, mix
        train = [f | {"data_set": d} for d, s in enumerate(sets) for f in as_features(s.features["train"])]
        collate = PackedCollator(vocab_size=model.encoder.config.vocab_size, max_length=model.max_length())
        args.remove_unused_columns = False
        super().__init__(model, args, train_dataset=train, data_collator=MultiTaskCollator(collate), plan_memory=False,
                         eval_dataset=train[:1] if any("validation" in s.features for s in sets) else None, **options)
        self.packs = True                # its own sampler, though the collator is not the usual one

    def _sampler(self, lengths: list[int], args: TrainingArguments, batch_size: int) -> Any:
        return MultiTaskBatchSampler(lengths, [len(s.features["train"]) for s in self.sets], batch_size,
                                     temperature=self.temperature, mix=self.mix, seed=args.data_seed or args.seed)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """transformers' own: mixed batches are not cut into pieces."""
        return transformers.Trainer.training_step(self, model, inputs, num_items_in_batch)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None,
                 metric_key_prefix: str = "eval") -> dict[str, float]:
        """Every data set with a validation table; eval_mean is the mean of their main metrics."""
        found: dict[str, float] = {}
        best = []
        for d, data_set in enumerate(self.sets):
            if "validation" not in data_set.features:
                continue
            scores = self.score(d, "validation", f"{metric_key_prefix}_{data_set.name}")
            best.append(scores[f"{metric_key_prefix}_{data_set.name}_{data_set.task.best}"])
            found |= scores
        found[f"{metric_key_prefix}_mean"] = sum(best) / len(best)
        self.log({f"{metric_key_prefix}_mean": found[f"{metric_key_prefix}_mean"]})
        return found

    def score(self, d: int, split: str, prefix: str) -> dict[str, float]:
        """The metrics of one data set's split."""
        data_set = self.sets[d]
        rows = [f | {"data_set": d} for f in as_features(data_set.features[split])]
        self.compute_metrics = data_set.task.metrics(data_set.tables[split], data_set.features[split])
        self._eval_dataloaders: dict[str, Any] = {}          # transformers keeps one for all where workers persist
        self.label_names = label_names_of(data_set.task.model_task)
        self.preprocess_logits_for_metrics = best_candidate if picks(data_set.task) else None
        return super().evaluate(cast(Any, rows), metric_key_prefix=prefix)


def read_data_sets(path: str, common: DataArguments) -> tuple[dict[str, DataArguments], float, bool]:
    """The file's data sets, temperature and mix; common: the command line's data flags, which a set may overwrite. Raises
    ConfigError naming a key that does not exist."""
    loaded = read_yaml(path, "--multi_task")
    _known(loaded, ("data_sets", "temperature", "mix"), f"--multi_task {path}")
    sets, temperature, mix = loaded.get("data_sets"), loaded.get("temperature", 1.0), loaded.get("mix", False)
    where = f"--multi_task {path}"
    if not isinstance(sets, dict) or not sets or not all(isinstance(s, dict) for s in sets.values()):
        raise ConfigError(f"--multi_task {path} needs data_sets: a name for each, and its data flags, such as "
                          "'rte: {task_name: superglue, dataset_name: rte}'.")
    if not isinstance(temperature, (int, float)) or isinstance(temperature, bool) or not isinstance(mix, bool):
        raise ConfigError(f"--multi_task {path}: temperature {temperature!r} must be a number and mix {mix!r} true or false.")
    made = {str(name): _arguments(values, common, f"{where}, data set {name}") for name, values in sets.items()}
    return made, float(temperature), mix


def _arguments(values: dict[str, Any], common: DataArguments, where: str) -> DataArguments:
    """A data set's flags, over those of the command line. Raises ConfigError for an unknown one or a value of another kind."""
    _known(values, [f.name for f in dataclasses.fields(DataArguments) if f.name != "multi_task"], where)
    parser: Any = HfArgumentParser(cast(Any, DataArguments), allow_abbrev=False)
    parser.error = lambda message: _refuse(f"{where}: {message}")
    words = [word for name, given in flags_of(values, where).items() for word in (f"--{name}", *given)]
    (own,) = parser.parse_args_into_dataclasses(words)
    return dataclasses.replace(common, multi_task=None, **{name: getattr(own, name) for name in values})


def _refuse(message: str) -> None:
    raise ConfigError(f"{message}; correct the file.")


def _known(given: dict[str, Any], names: Any, where: str) -> None:
    for key in given:
        if key not in names:
            raise ConfigError(f"{where}: {key!r} is not a key{did_you_mean(str(key), names)}")


def train_together(model_args: ModelArguments, data_args: DataArguments, prompt_args: PromptArguments,
                   args: TrainingArguments) -> dict[str, Any]:
    """Train one prompt on several data sets, save an adapter for each, and return the results that are also written."""
    source, method = check_arguments(model_args), prompt_args.resolved()
    assert data_args.multi_task is not None
    if method.outside:
        raise ConfigError(f"--multi_task shares a prompt or a backbone of this package, but --method {method.name} is PEFT's; "
                          "choose another method.")
    if given := own_flags(data_args):
        raise ConfigError(f"--multi_task names the data sets in its file; leave --{given[0]} out, or put it there.")
    if model_args.auto_batch:
        raise ConfigError("--auto_batch cannot plan batches of several data sets; leave it out of a run with --multi_task.")
    arguments, temperature, mix = read_data_sets(data_args.multi_task, data_args)
    sets = [DataSet(name, own, *load_data(own)) for name, own in arguments.items()]
    if mix and (cloze := [s.name for s in sets if s.task.kind == "cloze"]):
        raise ConfigError(f"mix: true cannot hold the cloze task {cloze[0]}; set mix: false.")
    for data_set in sets:
        check_smoothing(args, data_set.task)
    validated = [s for s in sets if has_validation(s.tables, s.task)]
    settle_evaluation(args, bool(validated), "eval_mean",
                      ("mean", *(f"{s.name}_{name}" for s in validated for name in (*s.task.metric_names(), "loss"))))
    output = Path(args.output_dir or ".")
    check_writable(output)
    transformers.set_seed(args.seed)
    name = model_args.tokenizer_name or source
    tokenizer, of_words = load_tokenizer(name, False), load_tokenizer(name, True)
    first = make_model(model_args, prompt_args, args, sets[0].task, tokenizer)
    others = {s.name: {"task": s.task.model_task, "pooler": model_args.pooler} | s.task.model_options(tokenizer)
              for s in sets[1:]}
    for s in sets[1:]:
        if s.task.kind == "cloze":
            others[s.name]["masked_lm"] = masked_lm_for(first.encoder, source)
    model = MultiTaskModel.from_first(sets[0].name, first, others)
    if model_args.hidden_dropout_prob is not None:
        model.set_hidden_dropout(model_args.hidden_dropout_prob)
    for data_set in sets:
        own = of_words if data_set.task.kind == "tags" else tokenizer
        data_set.tokenise(own, prompt_args.prompt_length, model)
        (output / data_set.name).mkdir(parents=True, exist_ok=True)
        write_settings(output / data_set.name, data_set.task, data_set.max_length, data_set.arguments)
        own.save_pretrained(output / data_set.name)
    trainer = MultiTaskTrainer(model, args, sets, temperature=temperature, mix=mix, processing_class=tokenizer,
                               head_learning_rate=prompt_args.head_learning_rate, epoch_decay=prompt_args.epoch_decay or None)
    show_progress(trainer, ", ".join(model.names))
    for data_set in sets:
        print(f"{data_set.name}: {described(data_set.task)}, {len(data_set.features['train'])} examples")
    model.print_trainable_parameters()
    seconds = run_training(trainer, args)
    results: dict[str, Any] = {
        "output_dir": args.output_dir, "method": method.name, "trained_parameters": trained_parameters(model),
        "seconds": round(seconds, 2), "data_sets": {}}
    trainer.save_model()
    if evaluates(args):
        print(saved_line(trainer.state, "eval_mean", args.load_best_model_at_end))
    for d, data_set in enumerate(sets):
        scores = {split: trainer.score(d, split, split) for split in data_set.features if split != "train"}
        results["data_sets"][data_set.name] = {"metric": data_set.task.best} | scores
        if args.do_predict:
            write_test_predictions(output / data_set.name, model.members[data_set.name],
                                   of_words if data_set.task.kind == "tags" else tokenizer, data_set.task, data_set.tables,
                                   data_set.features, data_set.max_length, args.per_device_eval_batch_size)
    replace_file(output / "results.json", json.dumps(results, indent=2).encode())
    return results
