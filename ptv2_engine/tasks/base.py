"""A task, as the command line sees it: rows become features, predictions become metrics and answers.

There is one subclass a kind of task (sequences.py, tags.py, spans.py, choices.py, cloze_task.py). A data set's name, or what a
user says of files of their own, makes an instance; `settings` is what stays beside the adapter, so that evaluate and predict make
it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ptv2_engine.errors import DataError
from ptv2_engine.tasks.data import Table

Feature = dict[str, Any]
Metrics = Callable[[Any], dict[str, float]]           # transformers.EvalPrediction -> name -> value

_KINDS: dict[str, type[Task]] = {}


class Task:
    """What the rows of one data set mean.

    kind: the name in the settings file. model_task: PromptedModel's task. best: the metric that says which epoch is best (larger
    is better). epoch_decay: the published factor of the learning rate an epoch, None for a linear decay.
    """

    kind: ClassVar[str]
    model_task: ClassVar[str]
    best: str = "accuracy"
    epoch_decay: float | None = None

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:
            _KINDS[cls.kind] = cls

    def model_options(self, tokenizer: Any) -> dict[str, Any]:
        """What PromptedModel.from_pretrained needs to know beside the task: num_labels, id2label, problem_type, ..."""
        raise NotImplementedError

    def problems(self, table: Table, labelled: bool = True) -> Iterator[tuple[int, str]]:
        """(row number from 1, what is wrong with it), without a tokenizer: unknown labels, empty texts, answers that are not in
        their context. Row 0 is the whole file."""
        raise NotImplementedError

    def training_problems(self, table: Table) -> Iterator[tuple[int, str]]:
        """What is wrong with a training table alone, beside `problems`: that there is nothing to learn."""
        return iter(())

    def first_rows(self, table: Table, limit: int | None) -> list[dict[str, Any]]:
        """The first `limit` rows (None: all)."""
        return table.rows[:limit]

    def has_labels(self, table: Table) -> bool:
        """Whether a table can be scored: some label is there. A published test set often has none, or only -1."""
        column = str(getattr(self, "answers_column", None) or getattr(self, "label_column", "label"))
        return any(row.get(column) not in (None, "", -1, "-1") for row in table.rows)

    def features(self, table: Table, tokenizer: Any, max_length: int, *, training: bool = False,
                 labelled: bool = True) -> list[Feature]:
        """Tokenised examples, what batches.PackedCollator takes, with "row", the example's index in the table (one row may make
        several features, and a feature in training none).

        training: leave out what only evaluation needs. labelled=False: the table may lack labels, and the features have none.
        Raises DataError or LabelError naming the row (from 1).
        """
        raise NotImplementedError

    def metric_names(self) -> tuple[str, ...]:
        """What `metrics` can measure, known before there is data to score."""
        return ("accuracy",)

    def metrics(self, table: Table, features: Sequence[Feature]) -> Metrics:
        """The metric function for a labelled table's predictions, which come in the order of its features. Predictions are the
        model's logits, padded with -100 to the widest (tags and spans), a tuple for spans; label_ids are not needed."""
        raise NotImplementedError

    def answers(self, table: Table, features: Sequence[Feature], logits: Sequence[Any]) -> list[dict[str, Any]]:
        """One dictionary a row of the table, in its order: what the model says of it, as "prediction", and how sure it is.
        logits: one array a feature, without padding ([C], [tokens, C], (start [tokens], end [tokens]) or [choices])."""
        raise NotImplementedError

    def show(self, table: Table, features: Sequence[Feature], tokenizer: Any, index: int) -> str:
        """Feature `index` decoded, with its label in words: for `ptv2 data check`."""
        feature = features[index]
        return f"{tokenizer.decode(feature['input_ids'])}  ->  {feature.get('labels', feature.get('label'))}"

    def settings(self) -> dict[str, Any]:
        """JSON that `task_from` makes an equal task of; without "kind"."""
        raise NotImplementedError

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Task:
        return cls(**settings)


def task_from(settings: dict[str, Any]) -> Task:
    """The task that a training run's settings describe. Raises DataError for a kind this version does not have."""
    settings = dict(settings)
    kind = str(settings.pop("kind", None))
    if kind not in _KINDS:
        raise DataError(f"the settings name a task of kind {kind!r}, but there are {', '.join(sorted(_KINDS))}; train again with "
                        "this version.")
    return _KINDS[kind].from_settings(settings)


@dataclass(frozen=True)
class Benchmark:
    """A published data set: where its tables come from, and what task its rows are.

    name: "rte". hub: arguments of datasets.load_dataset. make: (training table, template id) -> its task.
    splits: our split name ("train", "validation", "test", and further ones such as "validation_mismatched" or "test_brown")
    -> the hub's. files: our split name -> stems that its local file may have, besides the usual ones.
    rows: (a table as it comes from the hub or from an official file, template id) -> the rows the task takes; also expands nested
    rows.
    """

    name: str
    hub: tuple[str, ...]
    make: Callable[[Table, int], Task]
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "validation": "validation", "test": "test"})
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rows: Callable[[Table, int], Table] | None = None
    read: Callable[[Any], Table] | None = None          # a reader for local files that read_table does not understand


def settings_of(task: Task) -> dict[str, Any]:
    return {"kind": task.kind} | task.settings()


def named_columns(task: Task) -> tuple[list[str], str]:
    """(columns with text, label column) that a task's settings name; a cloze pattern names no texts."""
    found = task.settings()
    singles = [found[name] for name in ("words_column", "question_column", "context_column") if found.get(name)]
    texts = [*(found.get("text_columns") or []), *singles, *(found.get("choice_columns") or [])]
    return texts, found.get("answers_column") or found.get("label_column") or "label"


def refuse_problems(task: Task, table: Table, labelled: bool = True, training: bool = False, shown: int = 5) -> None:
    """Raises DataError with the first few problems of a table by row number, and how many there are."""
    found = list(task.problems(table, labelled)) or (list(task.training_problems(table)) if training else [])
    if found:
        lines = "; ".join(what if not row else f"row {row}: {what}" for row, what in found[:shown])
        more = f"; and {len(found) - shown} more" if len(found) > shown else ""
        raise DataError(f"{table.source}: {lines}{more}. Correct the file (ptv2 data check shows it all).")


def as_features(features: Sequence[Feature], keys: Sequence[str] = ("row", "word_ids", "offsets")) -> list[Feature]:
    """Features without what only metrics and answers need."""
    return [{name: value for name, value in feature.items() if name not in keys} for feature in features]
