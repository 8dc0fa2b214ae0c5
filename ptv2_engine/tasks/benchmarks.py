"""GLUE, SuperGLUE and NER data sets by the names the published scripts use, from local files or the hub.

Sequence and token classification only; multiple choice, span and semantic-role tasks get a clear error until they exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptv2_engine.errors import ConfigError, DataError
from ptv2_engine.tasks.data import SUFFIXES, Table, read_table


@dataclass(frozen=True)
class Benchmark:
    """One data set: its place on the hub, its columns, its metrics, and how a row becomes text."""

    hub: tuple[str, ...]
    text_columns: tuple[str, ...]
    label_column: str = "label"
    metrics: tuple[str, ...] = ()
    best: str = "accuracy"
    splits: tuple[str, str, str] = ("train", "validation", "test")
    rewrite: Callable[[dict[str, Any], int], dict[str, Any]] | None = None


def _wic(row: dict[str, Any], template: int) -> dict[str, Any]:
    word, s1, s2 = row["word"], row["sentence1"], row["sentence2"]
    if template == 0:
        return row | {"text": f"{s1} {s2} Does {word} have the same meaning in both sentences?"}
    return row | {"text": f"{word}: {s1}", "text_b": f"{word}: {s2}"}


def _wsc(row: dict[str, Any], template: int) -> dict[str, Any]:
    target = row.get("target", row)
    span1, span2, at = target["span1_text"], target["span2_text"], target["span2_index"]
    if template == 0:
        text = f"{span2}: {row['text']}"
    else:
        words = row["text"].split(" ")
        words[at] = f"*{words[at]}*"
        text = " ".join(words)
    return row | {"text": text, "text_b": span1}


_GLUE = {"cola": (("sentence",), ("matthews",), "matthews"), "sst2": (("sentence",), (), "accuracy"),
         "mrpc": (("sentence1", "sentence2"), ("f1",), "accuracy"), "qqp": (("question1", "question2"), ("f1",), "accuracy"),
         "stsb": (("sentence1", "sentence2"), (), "pearson"), "mnli": (("premise", "hypothesis"), (), "accuracy"),
         "qnli": (("question", "sentence"), (), "accuracy"), "rte": (("sentence1", "sentence2"), (), "accuracy"),
         "wnli": (("sentence1", "sentence2"), (), "accuracy")}
_PAIR = ("premise", "hypothesis")
BENCHMARKS: dict[str, dict[str, Benchmark]] = {
    "glue": {name: Benchmark(("nyu-mll/glue", name), columns, metrics=metrics, best=best, splits=(
        ("train", "validation_matched", "test_matched") if name == "mnli" else ("train", "validation", "test")))
        for name, (columns, metrics, best) in _GLUE.items()},
    "superglue": {
        "boolq": Benchmark(("aps/super_glue", "boolq"), ("question", "passage")),
        "cb": Benchmark(("aps/super_glue", "cb"), _PAIR, metrics=("f1_macro",)),
        "rte": Benchmark(("aps/super_glue", "rte"), _PAIR),
        "wic": Benchmark(("aps/super_glue", "wic"), ("text", "text_b"), rewrite=_wic),
        "wsc": Benchmark(("aps/super_glue", "wsc"), ("text", "text_b"), rewrite=_wsc),
    },
    "ner": {name: Benchmark((hub,), ("words",), "tags", best="f1") for name, hub in
            (("conll2003", "conll2003"), ("conll2004", "DFKI-SLT/conll04"), ("ontonotes", "tner/ontonotes5"))},
}
_LATER = {"superglue": ("copa", "multirc", "record"), "srl": ("conll2005", "conll2012"), "qa": ("squad", "squad_v2")}
_LOCAL_NAMES = (("train",), ("validation", "valid", "val", "dev", "dev_matched"), ("test", "test_matched"))


def find_benchmark(task_name: str, dataset_name: str, cloze: bool = False) -> Benchmark:
    """cloze: rows are for GLM's patterns, which also take COPA, MultiRC and ReCoRD. Raises ConfigError naming what there is."""
    task, dataset = task_name.lower(), dataset_name.lower()
    if cloze and task == "superglue" and dataset in (*BENCHMARKS[task], *_LATER[task]):
        classes = BENCHMARKS[task].get(dataset)
        return Benchmark(("aps/super_glue", dataset), (), metrics=() if classes is None else classes.metrics)
    if dataset in BENCHMARKS.get(task, {}):
        return BENCHMARKS[task][dataset]
    if dataset in _LATER.get(task, ()):
        raise ConfigError(
            f"--task_name {task} --dataset_name {dataset} is not a sequence or token classification task and cannot "
            "be trained yet; choose another, or for superglue a GLM backbone with --head cloze."
        )
    known = "; ".join(f"{t}: {', '.join(names)}" for t, names in BENCHMARKS.items())
    raise ConfigError(
        f"--task_name {task_name} --dataset_name {dataset_name} is unknown; there are {known}. For files of your own "
        "use --train_file."
    )


def load_benchmark(benchmark: Benchmark, data_dir: str | Path | None, template: int) -> list[Table | None]:
    """Train, validation and test tables: files named train.*, validation.* (valid, val, dev), test.* of a folder, or the hub.

    Raises DataError when neither has them. Labels may be missing in the test table.
    """
    tables = _from_folder(Path(data_dir)) if data_dir is not None else _from_hub(benchmark)
    for table in tables:
        if table is not None and benchmark.rewrite is not None:
            table.rows = [benchmark.rewrite(row, template) for row in table.rows]
    return tables


def text_columns_of(benchmark: Benchmark, table: Table) -> list[str]:
    """The benchmark's text columns that the table has (a WiC template has one text, the other two)."""
    return [c for c in benchmark.text_columns if c in table.columns] or list(benchmark.text_columns)


def _from_folder(folder: Path) -> list[Table | None]:
    if not folder.is_dir():
        raise DataError(f"--data_dir {folder} is not a folder; pass one that holds train.jsonl, validation.jsonl, ...")
    tables: list[Table | None] = []
    for names in _LOCAL_NAMES:
        file = next((folder / f"{n}{s}" for n in names for s in SUFFIXES if (folder / f"{n}{s}").is_file()), None)
        tables.append(None if file is None else read_table(file))
    if tables[0] is None:
        raise DataError(f"--data_dir {folder} holds no train file ({', '.join('train' + s for s in SUFFIXES)}); add it.")
    return tables


def _from_hub(benchmark: Benchmark) -> list[Table | None]:
    try:
        import datasets
    except ImportError:
        raise DataError(
            "data sets by name need the package datasets; pip install 'ptv2_engine[train]', or use --data_dir."
        ) from None
    try:
        loaded = datasets.load_dataset(*benchmark.hub)
    except Exception as error:      # datasets raises a dozen kinds of error for "not reachable"
        raise DataError(f"the data set {'/'.join(benchmark.hub)} cannot be loaded ({str(error).splitlines()[0][:120]}); "
                        "download its files and pass --data_dir.") from error
    return [_hub_table(loaded[s], "/".join(benchmark.hub), benchmark) if s in loaded else None for s in benchmark.splits]


def _hub_table(split: Any, source: str, benchmark: Benchmark) -> Table:
    rows = list(split)
    tags = next((c for c in ("ner_tags", "tags") if c in split.column_names), None)
    if benchmark.text_columns == ("words",) and tags is not None:
        names = getattr(getattr(split.features[tags], "feature", None), "names", None)
        words = "tokens" if "tokens" in split.column_names else "words"
        rows = [{"words": r[words], "tags": [names[t] if names else str(t) for t in r[tags]]} for r in rows]
    return Table(rows, source)
