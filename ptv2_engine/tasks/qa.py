"""SQuAD by name and question answering files of any usual form: rows of id, question, context and answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptv2_engine.errors import DataError
from ptv2_engine.tasks.base import Benchmark
from ptv2_engine.tasks.data import Table, read_table
from ptv2_engine.tasks.spans import SpanTask

Row = dict[str, Any]


def read_squad(path: str | Path) -> Table:
    """A question answering file of any form that normal_table takes. Raises DataError."""
    return normal_table(read_table(path))


def normal_table(table: Table) -> Table:
    """Rows of question, context and answers {"text": [...], "answer_start": [...]}, whatever of these the table holds:

    articles of SQuAD's own JSON (paragraphs of a context and its qas), which are laid flat, with id, title and is_impossible;
    rows with the hub's answers, or a list of {"text", "answer_start"}; rows with an answer (a text or several), whose first
    occurrence in the context is its start, -1 where there is none, unless answer_start says it. A row without any of these stays
    as it is: it is unlabelled. What is_impossible marks has no answers, only plausible ones.
    Raises:
        DataError: an article whose parts are not there.
    """
    rows: list[Row] = []
    for number, row in enumerate(table.rows, 1):
        if "paragraphs" in row:
            rows += _article(row, f"{table.source}, article {number}")
        else:
            rows.append(_flat(row))
    if not rows:
        raise DataError(f"{table.source} has 0 questions; check the file.")
    return Table(rows, table.source)


def _article(article: Row, where: str) -> Iterator[Row]:
    for number, paragraph in enumerate(_list(article, "paragraphs", where), 1):
        at = f"{where}, paragraph {number}"
        for question in _list(paragraph, "qas", at):
            if not isinstance(question, dict) or "question" not in question or "context" not in paragraph:
                raise DataError(f"{at} lacks its context or a question; SQuAD's form is {{'context', 'qas': [{{'id', 'question', "
                                "'answers'}]}.")
            row = {"id": question.get("id"), "title": article.get("title", ""), "question": question["question"],
                   "context": paragraph["context"], "is_impossible": bool(question.get("is_impossible", False))}
            yield _flat(row | {name: question[name] for name in ("answers", "answer") if name in question})


def _list(holder: Any, name: str, where: str) -> list[Any]:
    value = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(value, list):
        raise DataError(f"{where}: {name} is {str(value)[:40]!r}, but a list is expected; check the file.")
    return value


def _flat(row: Row) -> Row:
    row = dict(row)
    if row.get("id", "") is None:
        del row["id"]
    if row.get("is_impossible") in (True, 1, "true", "True", "1"):
        row["answers"] = {"text": [], "answer_start": []}
    elif "answers" in row:
        row["answers"] = _answers(row["answers"])
    elif "answer" in row:
        row["answers"] = _searched(row["answer"], row.get("context"), row.get("answer_start"))
    return row


def _answers(answers: Any) -> Any:
    """The hub's form where that can be made; anything else stays, for SpanTask.problems to name with its row."""
    if answers is None:
        return {"text": [], "answer_start": []}
    if isinstance(answers, (list, tuple)) and all(isinstance(a, dict) and {"text", "answer_start"} <= set(a) for a in answers):
        return {"text": [a["text"] for a in answers], "answer_start": [a["answer_start"] for a in answers]}
    if isinstance(answers, dict) and isinstance(answers.get("text"), str):
        return {"text": [answers["text"]], "answer_start": [answers.get("answer_start")]}
    return answers


def _searched(answer: Any, context: Any, start: Any) -> Row:
    texts = [a for a in (answer if isinstance(answer, (list, tuple)) else [answer]) if a is not None and str(a).strip()]
    texts = [str(text).strip() for text in texts]
    if len(texts) == 1 and start not in (None, ""):
        given = str(answer if not isinstance(answer, (list, tuple)) else answer[0])
        if str(start).strip().lstrip("-").isdigit():
            return {"text": texts, "answer_start": [int(start) + len(given) - len(given.lstrip())]}
    return {"text": texts, "answer_start": [str(context).find(text) for text in texts]}


def _benchmark(name: str, version: str, unanswerable: bool) -> Benchmark:
    return Benchmark(name, (f"rajpurkar/{name}",), lambda table, template: SpanTask(unanswerable=unanswerable),
                     splits={"train": "train", "validation": "validation"},
                     files={"train": (f"train-{version}", "train-slice"), "validation": (f"dev-{version}", "dev-slice")},
                     rows=lambda table, template: normal_table(table))


QA: dict[str, Benchmark] = {"squad": _benchmark("squad", "v1.1", False), "squad_v2": _benchmark("squad_v2", "v2.0", True)}
