"""What `ptv2 train` does: data and labels first, then the model, so that bad input costs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import TrainingArguments

from ptv2_engine.adapter import replace_file
from ptv2_engine.cli_args import DataArguments, ModelArguments, PromptArguments
from ptv2_engine.encoder.checkpoints import model_config
from ptv2_engine.encoder.layer import MEMORY
from ptv2_engine.encoder.weights import check_placement
from ptv2_engine.errors import ConfigError, DataError
from ptv2_engine.memory import Setup
from ptv2_engine.model import PromptedModel
from ptv2_engine.progress import show_progress
from ptv2_engine.prompt import PromptConfig
from ptv2_engine.tasks.benchmarks import Benchmark, find_benchmark, load_benchmark, text_columns_of
from ptv2_engine.tasks.cloze import cloze_rows, describe_pattern, verbalizer_ids
from ptv2_engine.tasks.cloze_patterns import Pattern
from ptv2_engine.tasks.data import Table, read_table
from ptv2_engine.tasks.features import Labels, encode_sequences, encode_tokens
from ptv2_engine.tasks.glm_tokenizer import load_glm_tokenizer
from ptv2_engine.tasks.metrics import metrics_for
from ptv2_engine.trainer import Trainer, check_writable
from ptv2_engine.trainer_memory import check_model_fits

SETTINGS = "ptv2_data.json"      # how text becomes features, beside the adapter, for evaluate and predict
_LABEL_COLUMNS = ("label", "labels", "tags", "ner_tags")


def load_tables(data: DataArguments) -> tuple[list[Table | None], Benchmark | None]:
    """Train, validation, test tables from files or a benchmark. Raises ConfigError, DataError."""
    if data.task_name or data.dataset_name:
        if not (data.task_name and data.dataset_name):
            raise ConfigError("--task_name and --dataset_name belong together; give both, or use --train_file.")
        benchmark = find_benchmark(data.task_name, data.dataset_name, data.head == "cloze")
        return load_benchmark(benchmark, data.data_dir, data.template_id), benchmark
    if data.train_file is None:
        raise ConfigError("no training data; give --train_file FILE, or --task_name and --dataset_name.")
    return [None if f is None else read_table(f) for f in (data.train_file, data.validation_file, data.test_file)], None


def choose_columns(data: DataArguments, table: Table, benchmark: Benchmark | None) -> tuple[list[str], str]:
    """Text columns and label column: as given, as the benchmark has them, or found. Raises DataError."""
    if benchmark is not None:
        texts, label = text_columns_of(benchmark, table), benchmark.label_column
    else:
        label = data.label_column or next((c for c in _LABEL_COLUMNS if c in table.columns), "label")
        others = [c for c in table.columns if c != label]
        likely = [c for c in others if c in ("text", "sentence", "words", "tokens")]
        guess = likely[:1] or (others if len(others) <= 2 else [])
        texts = data.text_columns or guess
        if not texts:
            raise DataError(
                f"{table.source}: which of the columns {', '.join(others)} hold the text? Give --text_columns ONE [TWO]."
            )
    for name in (*texts, label):
        table.column(name)
    return texts, label


def cloze_settings(data: DataArguments) -> dict[str, Any] | None:
    """What --head cloze asks for, as it is kept beside the adapter; None for a trained classifier. Raises ConfigError."""
    if data.head not in ("classifier", "cloze"):
        raise ConfigError(f"--head {data.head!r} does not exist; choose classifier or cloze.")
    if data.head == "classifier":
        if data.pattern or data.verbalizers:
            raise ConfigError("--pattern and --verbalizers belong to --head cloze; add it, or leave them out.")
        return None
    if data.pattern or data.verbalizers:
        return {"template": data.pattern or "", "verbalizers": data.verbalizers or []}
    if not data.dataset_name:
        raise ConfigError("--head cloze on files of your own needs --pattern '... {mask} ...' and --verbalizers 'label= word' "
                          "...")
    return {"name": data.dataset_name, "pattern_id": data.pattern_id}


def cloze_labels(pattern: Pattern) -> Labels:
    return Labels("candidates", []) if pattern.verbalizers is None else Labels("classes", list(pattern.verbalizers))


def make_features(table: Table, tokenizer: Any, texts: list[str], max_length: int, label: str | None, labels: Labels,
                  cloze: Pattern | None = None, training: bool = False) -> list[dict[str, Any]]:
    if cloze is not None:
        made = cloze_rows(table.rows, cloze, tokenizer, max_length, training=training, source=table.source,
                          label_column=label or "label")
        return made if label is None else [feature for feature in made if "label" in feature]
    if labels.kind == "tags":
        return encode_tokens(table, tokenizer, texts[0], max_length, label, labels)
    return encode_sequences(table, tokenizer, texts, max_length, label, labels)


def load_tokenizer(name: str, for_words: bool) -> Any:
    """AutoTokenizer; byte-level BPE gets add_prefix_space for words that are split already. Raises ConfigError."""
    if Path(name).is_dir() and model_config(name).get("model_type") == "glm":
        return load_glm_tokenizer(name)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        space = {"add_prefix_space": True} if for_words and config.model_type in ("roberta",) else {}
        return transformers.AutoTokenizer.from_pretrained(name, **space)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer can be loaded from {name!r} ({str(error).splitlines()[0][:120]}); pass --tokenizer_name."
        ) from error


def _label_in(table: Table, label: str, pattern: Pattern | None) -> str | None:
    """The label column where the table has one; ReCoRD's labels are its answers."""
    has = label in table.columns or (pattern is not None and pattern.answers is not None and "answers" in table.columns)
    return label if has else None


def _best_candidate(logits: torch.Tensor, _labels: torch.Tensor) -> torch.Tensor:
    """Rows differ in their number of candidates, so evaluation gathers the winners and not the scores."""
    return logits.argmax(-1)


def _setup(model_args: ModelArguments, prompt: PromptConfig, task: str, num_labels: int, dtype: torch.dtype | None,
           device: torch.device) -> Setup:
    """What the planner needs to know of a model that is not loaded yet."""
    assert model_args.model_name_or_path is not None
    config = model_config(model_args.model_name_or_path)
    own = "bfloat16" if "bfloat16" in (config.get("dtype"), config.get("torch_dtype")) else "float32"
    return Setup(config, prompt=prompt, task=task, num_labels=num_labels, memory=model_args.memory,
                 dtype=own if dtype is None else str(dtype).removeprefix("torch."), frozen_dtype=model_args.frozen_dtype,
                 stream_weights=model_args.stream_weights, device=device.type)


def train(model_args: ModelArguments, data_args: DataArguments, prompt_args: PromptArguments,
          args: TrainingArguments) -> dict[str, Any]:
    """Train, save the adapter with its tokenizer and settings, and return the results that are also written."""
    if model_args.model_name_or_path is None:
        raise ConfigError("no backbone; give --model_name_or_path HUB_ID_OR_FOLDER.")
    check_placement(model_args.frozen_dtype, model_args.stream_weights)
    if model_args.memory not in MEMORY:
        raise ConfigError(f"--memory {model_args.memory!r} does not exist; choose one of {', '.join(MEMORY)}.")
    cloze = cloze_settings(data_args)
    pattern = None if cloze is None else describe_pattern(cloze)
    tables, benchmark = load_tables(data_args)
    train_table, validation, test = tables
    assert train_table is not None
    if pattern is None:
        texts, label = choose_columns(data_args, train_table, benchmark)
        labels = Labels.infer(train_table.column(label), train_table.source)
    else:
        texts, label, labels = [], data_args.label_column or "label", cloze_labels(pattern)
    output = Path(args.output_dir or ".")
    check_writable(output)
    prompt = prompt_args.prompt_config()
    for table, limit in ((train_table, data_args.max_train_samples), (validation, data_args.max_eval_samples),
                         (test, data_args.max_predict_samples)):
        if table is not None and limit is not None:
            table.rows = table.rows[:limit]

    transformers.set_seed(args.seed)
    task = "cloze" if cloze else "token-classification" if labels.kind == "tags" else "sequence-classification"
    tokenizer = load_tokenizer(model_args.tokenizer_name or model_args.model_name_or_path, labels.kind == "tags")
    dtype = None if model_args.dtype is None else getattr(torch, model_args.dtype)
    if args.bf16:
        dtype = torch.bfloat16                      # at once: cast later, the weights would be there twice for a moment
    options: dict[str, Any] = {} if pattern is None else {"verbalizer_ids": verbalizer_ids(pattern, tokenizer) or None,
                                                          "length_penalty": pattern.length_penalty}
    if model_args.plan_memory and (args.device.type == "cuda" or model_args.stream_weights):
        check_model_fits(_setup(model_args, prompt, task, labels.num_labels, dtype, args.device), args.device)
    model = PromptedModel.from_pretrained(
        model_args.model_name_or_path,
        task=task,
        prompt=prompt,
        dtype=dtype,
        num_labels=None if labels.kind == "candidates" else labels.num_labels,
        id2label=labels.id2label,
        pooler=model_args.pooler,
        shift_positions=model_args.shift_positions,
        problem_type="regression" if labels.kind == "values" else None,
        device=args.device,
        memory=model_args.memory,
        frozen_dtype=model_args.frozen_dtype,
        stream_weights=model_args.stream_weights,
        **options,
    )
    if model_args.hidden_dropout_prob is not None:
        model.set_hidden_dropout(model_args.hidden_dropout_prob)
    max_length = min(data_args.max_seq_length, model.max_length())
    if max_length < 3:
        raise ConfigError(f"prompt_length {prompt.prompt_length} leaves {max_length} positions for text; use a shorter prompt.")
    sets = [None if t is None else make_features(t, tokenizer, texts, max_length, _label_in(t, label, pattern), labels, pattern,
                                                 training=t is train_table) for t in tables]
    if sets[1] is None:
        args.eval_strategy = transformers.trainer_utils.IntervalStrategy.NO
        args.do_eval = False
    epoch_decay = prompt_args.epoch_decay if prompt_args.epoch_decay is not None else 0.95 if labels.kind == "tags" else None
    trainer = Trainer(model, args, train_dataset=sets[0], eval_dataset=sets[1], processing_class=tokenizer,
                      preprocess_logits_for_metrics=_best_candidate if labels.kind == "candidates" else None,
                      compute_metrics=metrics_for(labels.kind, labels.names, benchmark.metrics if benchmark else ()),
                      head_learning_rate=prompt_args.head_learning_rate, epoch_decay=epoch_decay,
                      auto_batch=model_args.auto_batch, plan_memory=model_args.plan_memory)
    show_progress(trainer, data_args.dataset_name or Path(train_table.source).stem)
    model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    trainer.save_model()
    settings = {
        "text_columns": texts,
        "label_column": label,
        "max_seq_length": max_length,
        "labels": labels.names,
        "kind": labels.kind,
        "cloze": cloze,
    }
    replace_file(output / SETTINGS, json.dumps(settings, indent=2).encode())
    results: dict[str, Any] = {"output_dir": args.output_dir}
    best = [entry for entry in trainer.state.log_history if any(k.startswith("eval_") for k in entry)]
    if best:
        results["last_evaluation"] = {k: v for k, v in best[-1].items() if k.startswith("eval_") or k == "epoch"}
    if sets[2] and {"labels", "label"} & set(sets[2][0]):
        results["test"] = trainer.predict(cast(Any, sets[2]), metric_key_prefix="test").metrics
    replace_file(output / "results.json", json.dumps(results, indent=2).encode())
    return results
