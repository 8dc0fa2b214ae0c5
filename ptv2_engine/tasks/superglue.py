"""SuperGLUE's eight data sets: the published inputs, from the hub's flat rows and from the official nested jsonl.

Label -1 (the hub's test splits) means that the label is not known.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ptv2_engine.errors import ConfigError, DataError
from ptv2_engine.tasks.base import Benchmark
from ptv2_engine.tasks.choices import ChoiceTask
from ptv2_engine.tasks.data import Table
from ptv2_engine.tasks.features import label_name, pick_columns, without_unknown
from ptv2_engine.tasks.sequences import published_task

Row = dict[str, Any]
HUB = "aps/super_glue"
BLANK = "@placeholder"
TRUTH = ("False", "True")


def wsc_words(row: Mapping[str, Any]) -> tuple[list[str], int]:
    """The text's words, and which of them is the pronoun: the one spelled like span2_text that is nearest to span2_index.

    Official files have indices that are off by one, and pronouns joined to punctuation ('him,"'), which is split off here.
    row: flat (hub) or with "target" (official). Raises DataError when the pronoun is not in the text.
    """
    target = row.get("target") or row
    pronoun, at, words = str(target["span2_text"]).strip(), int(target["span2_index"]), str(row["text"]).split()
    form = re.compile(rf"(\W*)({re.escape(pronoun.strip(string.punctuation))})((?:\W.*)?)", re.IGNORECASE)
    found = [i for i, word in enumerate(words) if word == pronoun or form.fullmatch(word)]
    if not found or not pronoun:
        raise DataError(f"the pronoun {pronoun!r} is not a word of the text {str(row['text'])[:60]!r}; correct span2_text.")
    at = min(found, key=lambda i: (abs(i - at), words[i] != pronoun))
    match = form.fullmatch(words[at])
    if words[at] == pronoun or match is None:
        return words, at
    return [*words[:at], *filter(None, match.groups()), *words[at + 1:]], at + bool(match[1])


def multirc_rows(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """One row an answer: paragraph, question, answer, label (where it is known), idx {"paragraph", "question", "answer"}.

    rows: the hub's, which are that already, or official ones, {"passage": {"text", "questions": [{"question", "answers":
    [{"text", "label"}]}]}}. Raises DataError naming the row (from 1).
    """
    found: list[Row] = []
    numbers: dict[Any, int] = {}                    # of paragraphs and questions, where rows bring no idx
    for number, row in enumerate(rows):
        if "paragraph" in row and {"question", "answer"} <= set(row):
            paragraph, question = row["paragraph"], (row["paragraph"], row["question"])
            found.append({"idx": {"paragraph": numbers.setdefault(paragraph, len(numbers)),
                                  "question": numbers.setdefault(question, len(numbers)), "answer": number}} | dict(row))
            continue
        try:
            passage = row["passage"]
            for q, question in enumerate(passage["questions"]):
                for a, answer in enumerate(question["answers"]):
                    flat = {"paragraph": passage["text"], "question": question["question"], "answer": answer["text"]}
                    flat |= {"label": answer["label"]} if "label" in answer else {}
                    found.append(flat | {"idx": {"paragraph": row.get("idx", number), "question": question.get("idx", q),
                                                 "answer": answer.get("idx", a)}})
        except (KeyError, TypeError) as error:
            raise DataError(f"MultiRC row {number + 1} is neither the hub's nor the official form ({_what(error)}); give "
                            "paragraph, question and answer, or passage with text and questions.") from None
    return found


def record_rows(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """One row a query: passage (text), query, entities and answers (lists of different texts), idx {"passage", "query"}.

    rows: the hub's, which are that already, or official ones, {"passage": {"text", "entities": [{"start", "end"}]}, "qas":
    [{"query", "answers": [{"text"}]}]}, whose "end" is the last character of the entity. Entities come in the order of the text.
    Test rows have answers []. Raises DataError naming the row (from 1).
    """
    found: list[Row] = []
    for number, row in enumerate(rows):
        try:
            if not isinstance(row["passage"], Mapping):
                idx = row["idx"] if isinstance(row.get("idx"), Mapping) else {"passage": number, "query": number}
                found.append(dict(row) | {"query": row["query"], "entities": _different(row["entities"]),
                                          "answers": _different(row.get("answers") or []), "idx": idx})
                continue
            text, spans = row["passage"]["text"], row["passage"]["entities"]
            entities = _different(text[s["start"]:s["end"] + 1] for s in sorted(spans, key=lambda s: s["start"]))
            for q, query in enumerate(row["qas"]):
                idx = {"passage": row.get("idx", number), "query": query.get("idx", q)}
                found.append({"passage": text, "query": query["query"], "entities": entities,
                              "answers": _different(a["text"] for a in query.get("answers") or []), "idx": idx})
        except (KeyError, TypeError) as error:
            raise DataError(f"ReCoRD row {number + 1} is neither the hub's nor the official form ({_what(error)}); give passage, "
                            "query and entities, or passage with text and entities, and qas.") from None
    return found


def _different(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _what(error: Exception) -> str:
    return f"no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)


def _multirc(table: Table, template: int) -> Table:
    rows = multirc_rows(table.rows)
    made = [{"paragraph": row["paragraph"], "question_answer": f"{row['question']} {row['answer']}",
             "label": label_name(row.get("label"), TRUTH), "idx": row["idx"]} for row in rows]
    return Table(without_unknown(made), table.source)


def _record(table: Table, template: int) -> Table:
    """One row an entity: the passage, and the query with the entity in its blank. An entity that is no answer is class 0."""
    made: list[Row] = []
    for number, row in enumerate(record_rows(table.rows), 1):
        if BLANK not in row["query"]:
            raise DataError(f"{table.source} query {number}: {row['query'][:60]!r} has no {BLANK}; correct the row.")
        passage = row["passage"].replace("@highlight\n", "- ")
        made += ({"passage": passage, "query": row["query"].replace(BLANK, entity), "entity": entity, "answers": row["answers"],
                  "label": ("1" if entity in row["answers"] else "0") if row["answers"] else None, "idx": row["idx"]}
                 for entity in row["entities"])
    return Table(without_unknown(made), table.source)


def _wic(table: Table, template: int) -> Table:
    """Template 0: one text that ends in a question. Template 1: a pair, the word before both sentences."""
    rows = pick_columns(table, {name: (name,) for name in ("word", "sentence1", "sentence2")}, TRUTH)
    for row in rows:
        word, one, two = row.pop("word"), row.pop("sentence1"), row.pop("sentence2")
        if _template(template) == 0:
            row["sentences_question"] = f"{one} {two} Does {word} have the same meaning in both sentences?"
        else:
            row |= {"word_sentence1": f"{word}: {one}", "word_sentence2": f"{word}: {two}"}
    return Table(rows, table.source)


def _wsc(table: Table, template: int) -> Table:
    """A pair: the text with the pronoun named before it (template 0) or between asterisks (1), and what it may refer to."""
    rows = pick_columns(table, {"text": ("text",)}, TRUTH)
    for number, (row, given) in enumerate(zip(rows, table.rows, strict=True), 1):
        target, text = given.get("target") or given, row.pop("text")
        try:
            if _template(template) == 0:
                row["pronoun_text"] = f"{target['span2_text']}: {text}"
            else:
                words, at = wsc_words(given)
                row["marked_text"] = " ".join([*words[:at], f"*{words[at]}*", *words[at + 1:]])
            row["span1_text"] = target["span1_text"]
        except KeyError as error:
            raise DataError(f"{table.source} row {number} has no {error.args[0]!r}; WSC needs text, span1_text, span2_text and "
                            "span2_index.") from None
        except DataError as error:
            raise DataError(f"{table.source} row {number}: {error}") from None
    return Table(rows, table.source)


def _copa(table: Table, template: int) -> Table:
    names = ("choice1", "choice2")
    rows = pick_columns(table, {name: (name,) for name in ("premise", "question", *names)}, names)
    for row in rows:
        row["premise_link"] = f"{row.pop('premise')} {'because' if row.pop('question') == 'cause' else 'so'}"
    return Table(rows, table.source)


def _template(number: int) -> int:
    if number not in (0, 1):
        raise ConfigError(f"--template_id {number} does not exist; WiC and WSC have 0 and 1.")
    return number


def _texts(name: str, *columns: str, classes: Sequence[str] = TRUTH, labels: Sequence[str] = ("label",),
           extra: Sequence[str] = ()) -> Benchmark:
    """A data set whose rows are a pair of texts already."""
    known = {column: (column,) for column in columns}
    return Benchmark(name, (HUB, name), lambda table, _: published_task(table, columns, classes, extra),
                     rows=lambda table, template: Table(pick_columns(table, known, classes, labels=labels), table.source))


_WIC = (("sentences_question",), ("word_sentence1", "word_sentence2"))                  # by template
_WSC = (("pronoun_text", "span1_text"), ("marked_text", "span1_text"))
SUPERGLUE: dict[str, Benchmark] = {
    "boolq": _texts("boolq", "question", "passage", labels=("label", "answer")),
    "cb": _texts("cb", "premise", "hypothesis", classes=("entailment", "contradiction", "neutral"), extra=("f1_macro",)),
    "copa": Benchmark("copa", (HUB, "copa"), lambda table, _: ChoiceTask(["premise_link"], ["choice1", "choice2"], "label"),
                      rows=_copa),
    "multirc": Benchmark("multirc", (HUB, "multirc"), lambda table, _: published_task(
        table, ("paragraph", "question_answer"), TRUTH, best="f1", group="multirc"), rows=_multirc),
    "record": Benchmark("record", (HUB, "record"), lambda table, _: published_task(
        table, ("passage", "query"), ("0", "1"), best="f1", group="record"), rows=_record),
    "rte": _texts("rte", "premise", "hypothesis", classes=("entailment", "not_entailment")),
    "wic": Benchmark("wic", (HUB, "wic"), lambda table, template: published_task(table, _WIC[_template(template)], TRUTH),
                     rows=_wic),
    "wsc": Benchmark("wsc", (HUB, "wsc"), lambda table, template: published_task(table, _WSC[_template(template)], TRUTH),
                     rows=_wsc),
}
