"""Files of a user's own: which task their columns are, unless they say it.

Lists of labels are tags, a question with a context is extractive question answering, choices are multiple choice, and everything
else is a text or a pair: names are classes, numbers with a fraction are regression.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ptv2_engine.errors import ConfigError, DataError
from ptv2_engine.tasks.base import Task
from ptv2_engine.tasks.choices import ChoiceTask
from ptv2_engine.tasks.data import Table
from ptv2_engine.tasks.features import Labels
from ptv2_engine.tasks.qa import normal_table
from ptv2_engine.tasks.sequences import SequenceTask
from ptv2_engine.tasks.spans import SpanTask
from ptv2_engine.tasks.tags import TagTask

MODEL_TASKS = ("sequence-classification", "token-classification", "question-answering", "multiple-choice")
TASKS = (*MODEL_TASKS, "regression")          # what --task takes: regression is sequence classification with one output
_LABELS = ("label", "labels", "tags", "ner_tags", "answer", "target")
_WORDS, _TAGS = ("words", "tokens"), ("tags", "ner_tags")
_IDS = ("id", "idx", "index", "guid", "uid", "uuid")
_CHOICE = re.compile(r"(choice|option|ending|alternative)s?_?[0-9]*|sol[0-9]", re.IGNORECASE)


def normalised(table: Table, tagging: bool = False) -> Table:
    """A table whose rows are examples: nested SQuAD files are laid flat, a plain answer is looked for in its context, and words
    and tags with blanks between them ("EU rejects", "B-ORG O") become lists. tagging: words without tags too.

    Raises DataError for tags that are lists written as text.
    """
    columns = set(table.columns)
    if "paragraphs" in columns or {"question", "context"} <= columns:
        return normal_table(table)
    words, tags = (next((c for c in names if c in columns), None) for names in (_WORDS, _TAGS))
    if words is None or not (tagging or _are_tags(table, words, tags)):
        return table
    split = [c for c in (words, tags) if c is not None]
    return Table([row | {c: row[c].split() for c in split if isinstance(row.get(c), str)} for row in table.rows], table.source)


def _are_tags(table: Table, words: str, tags: str | None) -> bool:
    """Whether both columns are texts, and half of the rows or more have as many words as tags; one of each says nothing."""
    texts = [(row.get(words), row.get(tags)) for row in table.rows] if tags is not None else []
    pairs = [(one, two) for one, two in texts if isinstance(one, str) and isinstance(two, str)]
    if any(two.lstrip().startswith("[") and two.rstrip().endswith("]") for _, two in pairs):
        raise DataError(f"{table.source}: the column {tags!r} holds lists written as text; save them as jsonl or parquet, where "
                        "they stay lists, or with blanks between the tags.")
    counts = [(len(one.split()), len(two.split())) for one, two in pairs]
    return 2 * sum(one == two for one, two in counts) >= len(counts) and any(one > 1 for one, _ in counts)


def infer_task(table: Table, label_column: str | None = None) -> str:
    """The model task of a table's columns."""
    columns = set(table.columns)
    if {"question", "context"} <= columns and columns & {"answers", "answer"}:
        return "question-answering"
    if _choices(table):
        return "multiple-choice"
    label = _label_column(table, label_column)
    first = next((row[label] for row in table.rows if row.get(label) is not None), None)
    return "token-classification" if isinstance(first, (list, tuple)) else "sequence-classification"


def task_for(table: Table, *, task: str | None = None, text_columns: Sequence[str] | None = None,
             label_column: str | None = None, choice_columns: Sequence[str] | None = None,
             doc_stride: int = 128, **span_options: Any) -> Task:
    """The task of a training table (after `normalised`).

    Arguments:
        task: one of TASKS; default from the columns. text_columns, label_column, choice_columns: default the usual names.
        doc_stride, span_options: of SpanTask.
    Raises:
        ConfigError, DataError: a task there is not, or columns that cannot be told apart.
    """
    if task is not None and task not in TASKS:
        raise ConfigError(f"--task {task!r} does not exist; choose one of {', '.join(TASKS)}.")
    kind = task or infer_task(table, label_column)
    if kind == "question-answering":
        return _spans(table, text_columns, label_column, doc_stride, span_options)
    label = _label_column(table, label_column)
    if kind == "multiple-choice":
        choices = list(choice_columns or _choices(table))
        if not choices:
            raise DataError(f"{table.source}: which of the columns {', '.join(table.columns)} hold the choices? Give "
                            "--choice_columns FIRST SECOND ..., or one with lists.")
        texts = list(text_columns or _texts(table, {label, *choices}))
        _need(table, (*texts, *choices, label))
        return ChoiceTask(texts, choices, label)
    if kind == "token-classification":
        predicate = "predicate" if "predicate" in table.columns else None
        words = list(text_columns or _words(table, {label, "predicate"}))
        _need(table, (words[0], label))
        return TagTask.infer(table, words[0], label, predicate)
    texts = list(text_columns or _texts(table, {label}))
    _need(table, (*texts, label))
    labels = Labels.infer([v for v in table.column(label) if v is not None], table.source)
    if labels.kind == "tags":
        raise DataError(f"{table.source}: the column {label!r} holds lists, one label a word; use --task token-classification.")
    if kind == "regression":
        return SequenceTask(texts, label, "values", [], best="pearson")
    return SequenceTask(texts, label, labels.kind, labels.names, best="pearson" if labels.kind == "values" else "accuracy")


def _spans(table: Table, text_columns: Sequence[str] | None, label_column: str | None, doc_stride: int,
           options: dict[str, Any]) -> SpanTask:
    question, context = text_columns if text_columns and len(text_columns) == 2 else ("question", "context")
    answers = label_column or "answers"
    _need(table, (question, context, answers))
    without = any(not row[answers].get("text") for row in table.rows if isinstance(row[answers], dict))
    return SpanTask(question_column=question, context_column=context, answers_column=answers, unanswerable=without,
                    doc_stride=doc_stride, **options)


def _label_column(table: Table, given: str | None) -> str:
    found = given or next((c for c in _LABELS if c in table.columns), None)
    if found not in table.columns:
        raise DataError(f"{table.source} has no column {given or 'label'!r} to learn from; it has "
                        f"{', '.join(map(repr, table.columns))}: name the one with the labels by --label_column.")
    return found


def _choices(table: Table) -> list[str]:
    """Columns that look like choices: choice1, choice2, ..., or one `choices` that holds lists."""
    found = [c for c in table.columns if _CHOICE.fullmatch(c)]
    if len(found) == 1:
        return found if table.rows and isinstance(table.rows[0][found[0]], (list, tuple)) else []
    return found


def _texts(table: Table, others: set[str]) -> list[str]:
    """One or two columns of text; a number or an id is none. Raises DataError where more could be meant."""
    possible = [c for c in table.columns if c not in others and c.lower() not in _IDS]
    columns = [c for c in possible if _is_text(table, c)] or possible
    if not 1 <= len(columns) <= 2:
        there = [c for c in table.columns if c not in others]
        raise DataError(f"{table.source}: which of the columns {', '.join(there)} hold the text? Give --text_columns ONE [TWO].")
    return columns


def _words(table: Table, others: set[str]) -> list[str]:
    """The column with lists of words."""
    columns = [c for c in table.columns if c not in others and isinstance(table.rows[0][c], (list, tuple))]
    likely = [c for c in columns if c in _WORDS]
    if not likely and len(columns) != 1:
        there = ", ".join(c for c in table.columns if c not in others)
        raise DataError(f"{table.source}: which of the columns {there} holds the lists of words? Give --text_columns ONE.")
    return (likely or columns)[:1]


def _is_text(table: Table, column: str) -> bool:
    """Strings that are not all numbers."""
    values = [row[column] for row in table.rows[:100] if row.get(column) is not None]
    numbers = all(str(v).strip().lstrip("-").replace(".", "", 1).isdigit() for v in values)
    return all(isinstance(v, str) for v in values) and not numbers


def _need(table: Table, names: Sequence[str]) -> None:
    for name in names:
        table.column(name)
