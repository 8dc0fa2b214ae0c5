"""From the data flags of the command line to checked tables and their task."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from ptv2_engine.cli_args import DataArguments
from ptv2_engine.errors import ConfigError, DataError
from ptv2_engine.tasks.base import Task, named_columns, refuse_problems
from ptv2_engine.tasks.benchmarks import find_benchmark, load_benchmark
from ptv2_engine.tasks.cloze_task import ClozeTask
from ptv2_engine.tasks.custom import normalised, task_for
from ptv2_engine.tasks.data import Table, read_table

_OF_OWN_FILES = ("train_file", "validation_file", "test_file", "task", "text_columns", "choice_columns")


def load_data(data: DataArguments) -> tuple[dict[str, Table], Task]:
    """Tables by split ("train" always there, then "validation", "test" and what a benchmark has more) and their task, checked.

    Raises ConfigError, DataError: rows that are wrong are named by number.
    """
    tables, task = read_data(data)
    for split, table in tables.items():
        check_columns(task, table)
        table.rows = task.first_rows(table, _limit(data, split))
        refuse_problems(task, table, labelled=task.has_labels(table) or split == "train", training=split == "train")
    return tables, task


def read_data(data: DataArguments) -> tuple[dict[str, Table], Task]:
    """The same without a look at the rows. Raises ConfigError, DataError."""
    check_flags(data)
    task: Task | None = cloze_task(data)
    if data.task_name and data.dataset_name:
        benchmark = find_benchmark(data.task_name, data.dataset_name)
        if task is not None:                    # its patterns take the rows as they are published
            benchmark = replace(benchmark, rows=None)
        tables = load_benchmark(benchmark, data.data_dir, data.template_id)
        task = task or benchmark.make(tables["train"], data.template_id)
    else:
        files = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
        given = {split: read_table(file) for split, file in files.items() if file is not None}
        train = normalised(given.pop("train"))
        task = task or task_for(train, task=data.task, text_columns=data.text_columns, label_column=data.label_column,
                                choice_columns=data.choice_columns)
        tagging = task.kind == "tags"             # then words are split in a test file without tags too, as predict does
        tables = {"train": train} | {split: normalised(table, tagging) for split, table in given.items()}
    if isinstance(task, ClozeTask):
        tables = {split: task.flat(table) for split, table in tables.items()}
    if task.kind == "span":
        task = replace(cast(Any, task), doc_stride=data.doc_stride, n_best_size=data.n_best_size,
                       max_answer_length=data.max_answer_length, null_threshold=data.null_threshold)
    return tables, task


def check_flags(data: DataArguments) -> None:
    """Raises ConfigError for data flags that do not go together."""
    if bool(data.task_name) != bool(data.dataset_name):
        raise ConfigError("--task_name and --dataset_name belong together; give both, or use --train_file.")
    if data.dataset_name:
        if given := [name for name in _OF_OWN_FILES if getattr(data, name)]:
            raise ConfigError(f"--{given[0]} is for files of your own, but --dataset_name {data.dataset_name} brings its data; "
                              "leave one of the two out.")
        if data.label_column and data.head != "cloze":
            raise ConfigError(f"--label_column {data.label_column} is for files of your own, but --dataset_name "
                              f"{data.dataset_name} knows its columns; leave it out.")
    elif data.data_dir:
        raise ConfigError(f"--data_dir {data.data_dir} holds a published data set's files; name it by --task_name and "
                          "--dataset_name, or use --train_file.")
    elif data.train_file is None:
        raise ConfigError("no training data; give --train_file FILE, or --task_name and --dataset_name.")
    for name in ("max_train_samples", "max_eval_samples", "max_predict_samples", "max_seq_length"):
        value = getattr(data, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value} is below 1; use 1 or more, or leave it out.")


def cloze_task(data: DataArguments) -> ClozeTask | None:
    """What --head cloze asks for; None for a trained classifier. Raises ConfigError."""
    if data.head not in ("classifier", "cloze"):
        raise ConfigError(f"--head {data.head!r} does not exist; choose classifier or cloze.")
    if data.head == "classifier":
        if data.pattern or data.verbalizers:
            raise ConfigError("--pattern and --verbalizers belong to --head cloze; add it, or leave them out.")
        return None
    if data.pattern or data.verbalizers:
        pattern: dict[str, Any] = {"template": data.pattern or "", "verbalizers": data.verbalizers or []}
    elif data.dataset_name:
        known = find_benchmark(data.task_name or "superglue", data.dataset_name)
        pattern = {"name": known.name, "pattern_id": data.pattern_id}
    else:
        raise ConfigError("--head cloze on files of your own needs --pattern '... {mask} ...' and --verbalizers 'label= word' "
                          "...")
    return ClozeTask(pattern, data.label_column or "label")


def check_columns(task: Task, table: Table, way_out: str = "rename the file's columns as those of the training file") -> None:
    """Raises DataError where columns that the task reads, labels aside, are in no row of a table: one sentence for all rows."""
    more = [getattr(task, "predicate_column", None)] if task.kind == "tags" else []
    wanted = [*cast(Any, task).pattern.columns] if task.kind == "cloze" else [*named_columns(task)[0], *filter(None, more)]
    found = list(dict.fromkeys(name for row in table.rows for name in row))
    if missing := [name for name in wanted if name not in found]:
        raise DataError(f"{table.source} has no column {' and no column '.join(map(repr, missing))}, only "
                        f"{', '.join(map(repr, found))}, but this task reads {', '.join(map(repr, wanted))}; {way_out}.")


def own_flags(data: DataArguments) -> list[str]:
    """The flags that name data, among those that were given."""
    named = (*_OF_OWN_FILES, "label_column", "task_name", "dataset_name", "data_dir", "pattern", "verbalizers")
    return [name for name in named if getattr(data, name)]


def _limit(data: DataArguments, split: str) -> int | None:
    if split == "train":
        return data.max_train_samples
    return data.max_eval_samples if split.startswith("validation") else data.max_predict_samples


def described(task: Task) -> str:
    """One line on what a run trains: "sequence-classification of premise, hypothesis -> label (accuracy)"."""
    texts, label = named_columns(task)
    of = f" of {', '.join(texts)}" if texts else ""
    return f"{task.model_task}{of} -> {label} ({task.best})"
