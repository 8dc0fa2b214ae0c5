"""The published data sets by the names the published scripts use, from the hub or from local files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ptv2_engine.errors import ConfigError, DataError
from ptv2_engine.tasks.base import Benchmark
from ptv2_engine.tasks.data import SUFFIXES, Table, read_table
from ptv2_engine.tasks.glue import GLUE
from ptv2_engine.tasks.ner import NER, SRL
from ptv2_engine.tasks.qa import QA
from ptv2_engine.tasks.superglue import SUPERGLUE

BENCHMARKS: dict[str, dict[str, Benchmark]] = {"glue": GLUE, "superglue": SUPERGLUE, "ner": NER, "srl": SRL, "qa": QA}
_USUAL = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def find_benchmark(task_name: str, dataset_name: str) -> Benchmark:
    """Names in any case, with or without - and _ (SST-2 is sst2). Raises ConfigError naming what there is."""
    for task, sets in BENCHMARKS.items():
        for dataset, benchmark in sets.items():
            if (_plain(task), _plain(dataset)) == (_plain(task_name), _plain(dataset_name)):
                return benchmark
    known = "; ".join(f"{task}: {', '.join(sets)}" for task, sets in BENCHMARKS.items())
    raise ConfigError(f"--task_name {task_name} --dataset_name {dataset_name} is unknown; there are {known}. For files of your "
                      "own use --train_file.")


def load_benchmark(benchmark: Benchmark, data_dir: str | Path | None, template: int = 0) -> dict[str, Table]:
    """The tables of the splits there are, as the benchmark's task takes them; "train" is always there.

    data_dir: a folder with train.*, validation.* (or valid, val, dev: the first of these that is there), test.*, or the official
    files' names; None: the hub. Labels that are not known (-1) are None, and a table without any has no column for them.
    Raises DataError when there is no such folder, no training table, or a file that cannot be read; ConfigError for a template
    there is not.
    """
    tables = _from_hub(benchmark) if data_dir is None else _from_folder(benchmark, Path(data_dir))
    if benchmark.rows is None:
        return tables
    return {split: benchmark.rows(table, template) for split, table in tables.items()}


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _from_folder(benchmark: Benchmark, folder: Path) -> dict[str, Table]:
    if not folder.is_dir():
        raise DataError(f"--data_dir {folder} is not a folder; pass one that holds train.jsonl, validation.jsonl, ...")
    read: Callable[[Any], Table] = benchmark.read or read_table
    tables = {}
    for split in benchmark.splits:
        names = _stems(benchmark, split)
        file = next((folder / n for name in names for n in (*(name + s for s in SUFFIXES), name) if (folder / n).is_file()), None)
        if file is not None:
            tables[split] = read(file)
    if "train" not in tables:
        stems = " or ".join(_stems(benchmark, "train"))
        raise DataError(f"--data_dir {folder} holds no train file ({stems}, with the suffix {', '.join(SUFFIXES)}); add it.")
    return tables


def _stems(benchmark: Benchmark, split: str) -> list[str]:
    """What a split's local file may be called: the official names, our usual ones, the hub's."""
    return list(dict.fromkeys((*benchmark.files.get(split, ()), *_USUAL.get(split, (split,)), benchmark.splits[split])))


def _from_hub(benchmark: Benchmark) -> dict[str, Table]:
    name = "/".join(benchmark.hub)
    if not benchmark.hub:
        raise DataError(f"{benchmark.name} may not be copied to the hub; get its files and pass --data_dir.")
    try:
        import datasets
    except ImportError:
        raise DataError("data sets by name need the package datasets; pip install 'ptv2_engine[train]', or use "
                        "--data_dir.") from None
    try:
        loaded = _load(datasets.load_dataset, benchmark.hub)
    except Exception as error:      # datasets raises a dozen kinds of error for "not reachable"
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise DataError(f"the data set {name} cannot be loaded ({reason}); download its files and pass --data_dir.") from error
    if benchmark.splits["train"] not in loaded:
        raise DataError(f"the data set {name} has the splits {', '.join(loaded)}, but no {benchmark.splits['train']}; download "
                        "its files and pass --data_dir.")
    return {split: Table(_named_rows(loaded[theirs]), f"{name} {theirs}")
            for split, theirs in benchmark.splits.items() if theirs in loaded}


def _load(load_dataset: Callable[..., Any], hub: tuple[str, ...]) -> Any:
    """load_dataset; what is a script on the hub, which current versions do not run, comes from the hub's own parquet copy."""
    try:
        return load_dataset(*hub)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        config = hub[1] if len(hub) > 1 else hub[0].rpartition("/")[2]
        return load_dataset(hub[0], data_dir=config, revision="refs/convert/parquet")


def _named_rows(split: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with class names in the place of the hub's numbers, alone or in lists; a number outside the names (-1) stays."""
    named = {}
    for column, feature in getattr(split, "features", {}).items():
        names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
        if names:
            named[column] = dict(enumerate(names))
    rows = []
    for row in split:
        for column, names in named.items():
            value = row[column]
            row[column] = [names.get(v, v) for v in value] if isinstance(value, list) else names.get(value, value)
        rows.append(row)
    return rows
