"""What `ptv2 train` does: data and labels first, then the model, so that bad input costs nothing."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import TrainingArguments

from ptv2_engine.adapter import replace_file
from ptv2_engine.batches import sequences_of
from ptv2_engine.cli_args import DataArguments, ModelArguments, PromptArguments
from ptv2_engine.cli_predictions import write_test_predictions
from ptv2_engine.cli_tables import described, load_data
from ptv2_engine.encoder.checkpoints import model_config
from ptv2_engine.encoder.layer import MEMORY
from ptv2_engine.encoder.weights import check_placement
from ptv2_engine.errors import ConfigError
from ptv2_engine.lora import make_lora_model
from ptv2_engine.memory import Setup
from ptv2_engine.memory.setup import DTYPES
from ptv2_engine.model import OUTPUTS, PromptedModel
from ptv2_engine.progress import show_progress
from ptv2_engine.tasks.base import Feature, Task, as_features, settings_of
from ptv2_engine.tasks.data import Table
from ptv2_engine.tasks.glm_tokenizer import load_glm_tokenizer
from ptv2_engine.trainer import Trainer, check_writable
from ptv2_engine.trainer_memory import check_model_fits

_log = logging.getLogger("ptv2_engine")
SETTINGS = "ptv2_data.json"      # how text becomes features, beside the adapter, for evaluate and predict


def load_tokenizer(name: str, for_words: bool) -> Any:
    """AutoTokenizer, or GLM's own. for_words: one that takes words split already as those of a text. Raises ConfigError."""
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise ConfigError(f"the folder {name!r} does not exist; pass the folder of a checkpoint, or a hub id.")
    try:
        if Path(name).is_dir() and (Path(name) / "config.json").is_file() and model_config(name).get("model_type") == "glm":
            tokenizer = load_glm_tokenizer(name)
            if for_words:
                tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True      # kept in its tokenizer.json
            return tokenizer
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if for_words and _glues_words(tokenizer):        # byte-level BPE: a word without a space in front is another token
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, add_prefix_space=True)
        if for_words and _glues_words(tokenizer):
            _log.warning("the tokenizer of %s reads words that are split already differently from those of a text", name)
        return tokenizer
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer can be loaded from {name!r} ({str(error).splitlines()[0][:120]}); pass --tokenizer_name."
        ) from error


def _glues_words(tokenizer: Any) -> bool:
    """Whether the second of two words loses the space in front of it."""
    words = tokenizer(["to", "be"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    return words != tokenizer(" to be", add_special_tokens=False)["input_ids"]


def best_candidate(logits: torch.Tensor, _labels: torch.Tensor) -> torch.Tensor:
    """Rows differ in their number of candidates, so evaluation gathers the winners and not the scores."""
    return logits.argmax(-1)


def planned_dtype(model_args: ModelArguments, args: TrainingArguments) -> torch.dtype | None:
    """At once with --bf16: cast later, the weights would be there twice for a moment. None: the checkpoint's."""
    return torch.bfloat16 if args.bf16 else None if model_args.dtype is None else getattr(torch, model_args.dtype)


def check_arguments(model_args: ModelArguments) -> str:
    """The backbone's name. Raises ConfigError for what can be seen without data."""
    if model_args.model_name_or_path is None:
        raise ConfigError("no backbone; give --model_name_or_path HUB_ID_OR_FOLDER.")
    check_placement(model_args.frozen_dtype, model_args.stream_weights)
    if model_args.hidden_dropout_prob is not None and not 0 <= model_args.hidden_dropout_prob < 1:
        raise ConfigError(f"--hidden_dropout_prob {model_args.hidden_dropout_prob:g} is outside [0, 1); 0 switches dropout off.")
    for name, value, known in (("memory", model_args.memory, MEMORY), ("dtype", model_args.dtype, (None, *DTYPES))):
        if value not in known:
            raise ConfigError(f"--{name} {value!r} does not exist; choose one of {', '.join(filter(None, known))}.")
    return model_args.model_name_or_path


def make_model(model_args: ModelArguments, prompt_args: PromptArguments, args: TrainingArguments, task: Task,
               tokenizer: Any) -> Any:
    """The model of a method, on the device. Raises ConfigError, OutOfMemory, ..."""
    method, dtype, source = prompt_args.resolved(), planned_dtype(model_args, args), check_arguments(model_args)
    options = task.model_options(tokenizer)
    if method.outside:
        refused = {"--head cloze": task.kind == "cloze", "--frozen_dtype": model_args.frozen_dtype is not None,
                   "--stream_weights": model_args.stream_weights is not None, "--memory": model_args.memory != "exact",
                   "--bf16 or --dtype": dtype not in (None, torch.float32), "--pooler": model_args.pooler != "auto",
                   "--shift_positions": not model_args.shift_positions, "--auto_batch": model_args.auto_batch}
        if wrong := [flag for flag, given in refused.items() if given]:
            raise ConfigError(f"--method {method.name} is PEFT's on transformers' model, without {wrong[0]}; leave that out.")
        outside = make_lora_model(source, task.model_task, options.get("num_labels"), options.get("id2label"),
                                  rank=prompt_args.lora_rank, alpha=prompt_args.lora_alpha, device=args.device,
                                  problem_type=options.get("problem_type"))
        if model_args.hidden_dropout_prob is not None:
            outside.set_hidden_dropout(model_args.hidden_dropout_prob)
        return outside
    prompt = prompt_args.prompt_config(tokenizer)
    frozen = method.backbone is None                  # what trains is not planned
    if model_args.plan_memory and frozen and (args.device.type == "cuda" or model_args.stream_weights):
        config = model_config(source)
        own = "bfloat16" if "bfloat16" in (config.get("dtype"), config.get("torch_dtype")) else "float32"
        setup = Setup(config, prompt=prompt, task=task.model_task, memory=model_args.memory,
                      num_labels=OUTPUTS.get(task.model_task, options.get("num_labels") or 2),
                      dtype=own if dtype is None else str(dtype).removeprefix("torch."), frozen_dtype=model_args.frozen_dtype,
                      stream_weights=model_args.stream_weights, device=args.device.type)
        check_model_fits(setup, args.device)
    model = PromptedModel.from_pretrained(
        source, task=task.model_task, prompt=prompt, dtype=dtype, pooler=model_args.pooler,
        shift_positions=model_args.shift_positions, device=args.device, memory=model_args.memory,
        frozen_dtype=model_args.frozen_dtype, stream_weights=model_args.stream_weights, trained_backbone=method.backbone,
        **options)
    if model_args.hidden_dropout_prob is not None:
        model.set_hidden_dropout(model_args.hidden_dropout_prob)
    return model


def text_length(data_args: DataArguments, prompt_length: int, model: Any) -> int:
    """Tokens an example may have. Raises ConfigError where the prompt leaves none."""
    max_length = min(data_args.max_seq_length, model.max_length())
    if max_length < data_args.max_seq_length:
        print(f"--max_seq_length {data_args.max_seq_length} is cut to {max_length}: what the backbone takes beside the prompt")
    if max_length < 3:
        raise ConfigError(f"--max_seq_length {data_args.max_seq_length} and --prompt_length {prompt_length} leave {max_length} "
                          f"tokens for text (the backbone takes {model.max_length()} beside the prompt); use 3 or more.")
    return max_length


def train(model_args: ModelArguments, data_args: DataArguments, prompt_args: PromptArguments,
          args: TrainingArguments) -> dict[str, Any]:
    """Train, save the adapter with its tokenizer and settings, and return the results that are also written."""
    source, method = check_arguments(model_args), prompt_args.resolved()
    check_training(prompt_args, args)
    if data_args.multi_task is not None:
        from ptv2_engine.multitask_train import train_together

        return train_together(model_args, data_args, prompt_args, args)
    tables, task = load_data(data_args)
    check_smoothing(args, task)
    validates, metric = has_validation(tables, task), f"eval_{task.best}"
    settle_evaluation(args, validates, metric, (*task.metric_names(), "loss"))
    output = Path(args.output_dir or ".")
    check_writable(output)
    transformers.set_seed(args.seed)
    model_config(source)                          # what it says of a backbone that is not there is clearer than a tokenizer's
    tokenizer = load_tokenizer(model_args.tokenizer_name or source, task.kind == "tags")
    model = make_model(model_args, prompt_args, args, task, tokenizer)
    max_length = text_length(data_args, prompt_args.prompt_length, model)
    features = features_of(task, tables, tokenizer, max_length)
    write_settings(output, task, max_length, data_args)            # before training: its checkpoints need it
    trainer = Trainer(model, args, train_dataset=as_features(features["train"]),
                      eval_dataset=as_features(features["validation"]) if validates else None,
                      processing_class=tokenizer, preprocess_logits_for_metrics=best_candidate if picks(task) else None,
                      compute_metrics=task.metrics(tables["validation"], features["validation"]) if validates else None,
                      head_learning_rate=prompt_args.head_learning_rate, epoch_decay=decay_of(prompt_args, task),
                      auto_batch=model_args.auto_batch, plan_memory=model_args.plan_memory,
                      cuda_graphs=model_args.cuda_graphs)
    show_progress(trainer, data_args.dataset_name or Path(tables["train"].source).stem)
    print(f"task: {described(task)}")
    full = sum(max(map(len, sequences_of(feature))) >= max_length for feature in features["train"])
    if full and task.kind not in ("tags", "span"):           # those are split, not cut
        print(f"{full} of {len(features['train'])} training examples fill --max_seq_length {max_length} and may be cut")
    for split in (s for s in tables if s not in features):
        print(f"{split}: {len(tables[split])} rows without labels, which are not scored")
    model.print_trainable_parameters()
    seconds = run_training(trainer, args)
    trainer.save_model()
    results: dict[str, Any] = {
        "output_dir": args.output_dir, "method": method.name, "metric": task.best,
        "trained_parameters": trained_parameters(model), "seconds": round(seconds, 2)}
    if evaluates(args):                                       # else they are those of a run that was resumed
        results |= evaluations(trainer.state.log_history, metric)
        print(saved_line(trainer.state, metric, args.load_best_model_at_end))
    for split in (s for s in features if s not in ("train", "validation")):
        results[split] = predict_split(trainer, task, tables[split], features[split], split)
    if args.do_predict:
        write_test_predictions(output, model, tokenizer, task, tables, features, max_length, args.per_device_eval_batch_size)
    replace_file(output / "results.json", json.dumps(results, indent=2).encode())
    return results


def run_training(trainer: Trainer, args: TrainingArguments) -> float:
    """Train, from a checkpoint where --resume_from_checkpoint names one; says so where that has all steps. Returns seconds."""
    started, resumed = time.perf_counter(), checkpoint_of(args)
    trainer.train(resume_from_checkpoint=resumed)
    seconds = time.perf_counter() - started
    if resumed is not None and steps_of(resumed) >= trainer.state.max_steps:
        print(f"nothing was left to train: {resumed} has {steps_of(resumed)} of {trainer.state.max_steps} steps already")
    return seconds


def checkpoint_of(args: TrainingArguments) -> str | None:
    """The folder that --resume_from_checkpoint means; true is the last one in output_dir. Raises ConfigError."""
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true":
        output = str(args.output_dir or ".")
        found = transformers.trainer_utils.get_last_checkpoint(output) if Path(output).is_dir() else None
        if found is None:
            raise ConfigError(f"--resume_from_checkpoint true, but {output} holds no checkpoint; name one, or train with "
                              "--save_strategy epoch first.")
        return found
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise ConfigError(f"--resume_from_checkpoint {wanted} is no checkpoint of a run (it has no trainer_state.json); name a "
                          "checkpoint-STEP folder, or true for the last one in --output_dir.")
    return str(wanted)


def steps_of(checkpoint: str) -> int:
    return int(json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"])


def saved_line(state: transformers.TrainerState, metric: str, kept_best: bool) -> str:
    """Which evaluation was of the adapter that is saved, and which was the best by metric."""
    def shown(evaluation: dict[str, Any]) -> str:
        return f"epoch {evaluation['epoch']:.4g} ({metric.removeprefix('eval_')} {evaluation[metric]:.4f})"

    found = [entry for entry in state.log_history if metric in entry]
    kept = state.best_model_checkpoint if kept_best else None
    step = state.global_step if kept is None else int(kept.rpartition("-")[2])            # of OUTPUT/checkpoint-STEP
    saved = next((entry for entry in found if entry["step"] == step), None)
    line = f"saved: epoch {state.epoch or 0:.4g}, not evaluated" if saved is None else f"saved: {shown(saved)}"
    best = max(found, key=lambda entry: entry[metric], default=saved)
    if best is None or saved is not None and saved[metric] >= best[metric]:
        return f"{line}, none was better" if len(found) > 1 else line
    return f"{line}; best was {shown(best)}" + ("" if kept_best else ": --load_best_model_at_end keeps that")


def features_of(task: Task, tables: dict[str, Table], tokenizer: Any, max_length: int) -> dict[str, list[Feature]]:
    """Features by split: of the training table, and of those that can be scored."""
    return {split: task.features(table, tokenizer, max_length, training=split == "train")
            for split, table in tables.items() if split == "train" or task.has_labels(table)}


def has_validation(tables: Mapping[str, Table], task: Task) -> bool:
    """Whether there are labels to validate on."""
    return "validation" in tables and task.has_labels(tables["validation"])


def evaluates(args: TrainingArguments) -> bool:
    """Whether a run evaluates while it trains (after settle_evaluation)."""
    return args.eval_strategy != transformers.trainer_utils.IntervalStrategy.NO


def settle_evaluation(args: TrainingArguments, validates: bool, metric: str, names: Sequence[str]) -> None:
    """No evaluation without validation data; the best model is the best by the task's metric unless another of `names`, what
    evaluations measure, is named. Raises ConfigError where the best is asked for and nothing says which that is."""
    best = args.save_strategy == transformers.trainer_utils.SaveStrategy.BEST
    keeps = "--load_best_model_at_end" if args.load_best_model_at_end else "--save_strategy best" if best else None
    if keeps and not (validates and evaluates(args)):
        missing = "--eval_strategy no does not evaluate; give epoch" if validates else (
            "there is no labelled validation data; give --validation_file")
        raise ConfigError(f"{keeps} keeps the best by validation, but {missing}, or leave it out.")
    if not validates:
        args.eval_strategy, args.do_eval = transformers.trainer_utils.IntervalStrategy.NO, False
    if keeps and args.metric_for_best_model in (None, "loss"):          # "loss": transformers' own choice, see cli_args
        args.metric_for_best_model, args.greater_is_better = metric, True
    named = args.metric_for_best_model
    if evaluates(args) and named not in (None, metric) and named.removeprefix("eval_") not in names:
        raise ConfigError(f"--metric_for_best_model {named} is not among what evaluations measure ({', '.join(names)}); choose "
                          "one of them.")


def check_training(prompt_args: PromptArguments, args: TrainingArguments) -> None:
    """Raises ConfigError for flags that train nothing, or something else than they say, and for a checkpoint there is not."""
    for name, rate in (("learning_rate", args.learning_rate), ("head_learning_rate", prompt_args.head_learning_rate)):
        if rate is not None and not 0 <= rate < 1e3:
            raise ConfigError(f"--{name} {rate:g} is outside 0 to 1000; prompts want 1e-3 to 1e-1.")
    if prompt_args.epoch_decay is not None and not 0 <= prompt_args.epoch_decay <= 1:
        raise ConfigError(f"--epoch_decay {prompt_args.epoch_decay:g} is outside 0 to 1; use 0.95 as published, or 0 for the "
                          "scheduler.")
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise ConfigError(f"--num_train_epochs {args.num_train_epochs:g} trains nothing; use more than 0, or ptv2 evaluate to "
                          "score an adapter that is there.")
    if args.fp16:
        raise ConfigError("--fp16 asks for autocast and loss scaling, which prompts are not trained with; use --bf16.")
    if args.batch_eval_metrics:
        raise ConfigError("--batch_eval_metrics scores batch by batch, but these metrics need a whole table; leave it out.")
    checkpoint_of(args)


def check_smoothing(args: TrainingArguments, task: Task) -> None:
    """Raises ConfigError for label smoothing where there are no classes to smooth over."""
    if args.label_smoothing_factor and task.kind in ("choice", "cloze", "span"):
        raise ConfigError(f"--label_smoothing_factor {args.label_smoothing_factor} smooths over classes, but {task.model_task} "
                          "has none that all rows share; leave it out.")


def picks(task: Task) -> bool:
    """Whether the model's scores are of candidates that differ from row to row."""
    return task.kind == "cloze" and cast(Any, task).has_candidates


def decay_of(prompt_args: PromptArguments, task: Task) -> float | None:
    """The factor of the learning rate an epoch, None for the scheduler."""
    return (task.epoch_decay if prompt_args.epoch_decay is None else prompt_args.epoch_decay) or None


def trained_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def evaluations(history: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The last evaluation, and the best by the task's metric, with their epochs."""
    found = [{k: v for k, v in entry.items() if k.startswith("eval_") or k == "epoch"} for entry in history
             if any(k.startswith("eval_") for k in entry)]
    if not found:
        return {}
    scored = [entry for entry in found if metric in entry]
    best = {"best_evaluation": max(scored, key=lambda entry: entry[metric])} if scored else {}
    return {"last_evaluation": found[-1]} | best


def predict_split(trainer: Trainer, task: Task, table: Table, features: list[Feature], split: str) -> Mapping[str, float]:
    """The metrics of a further labelled table."""
    trainer.compute_metrics = task.metrics(table, features)
    return trainer.predict(cast(Any, as_features(features)), metric_key_prefix=split).metrics or {}


def write_settings(output: Path, task: Task, max_length: int, data: DataArguments) -> None:
    """What evaluate and predict need to read a file as training did."""
    published = None if data.dataset_name is None else {"task_name": data.task_name, "dataset_name": data.dataset_name,
                                                        "template_id": data.template_id}
    settings = {"task": settings_of(task), "max_seq_length": max_length, "benchmark": published}
    replace_file(output / SETTINGS, json.dumps(settings, indent=2).encode())
