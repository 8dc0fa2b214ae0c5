"""Files of a user's own: what their columns say, before any row is looked at."""

from __future__ import annotations

import json

import pytest

from ptv2_engine.errors import DataError
from ptv2_engine.tasks.custom import normalised, task_for
from ptv2_engine.tasks.data import Table, read_table

ROWS = [{"words": "EU rejects German call", "tags": "B-ORG O B-MISC O"}, {"words": "Peter", "tags": "B-PER"}]
LISTS = [{name: value.split() for name, value in row.items()} for row in ROWS]


@pytest.mark.parametrize("words, tags", [("words", "tags"), ("tokens", "ner_tags")])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_words_and_tags_with_blanks_between_them(words, tags, suffix, tmp_path):
    rows = [{words: row["words"], tags: row["tags"]} for row in ROWS]
    lines = [f"{words},{tags}", *map(",".join, (row.values() for row in rows))] if suffix == ".csv" else map(json.dumps, rows)
    (tmp_path / f"x{suffix}").write_text("\n".join(lines))
    table = normalised(read_table(tmp_path / f"x{suffix}"))
    assert [(row[words], row[tags]) for row in table.rows] == [(row["words"], row["tags"]) for row in LISTS]
    task = task_for(table)
    assert task.model_task == "token-classification" and task.names == ["O", "B-MISC", "B-ORG", "B-PER"]


def test_a_row_with_fewer_tags_than_words_is_named():
    table = normalised(Table([*ROWS, ROWS[0] | {"tags": "B-ORG O"}, ROWS[0] | {"tags": None}], "x"))
    assert list(task_for(Table(table.rows[:3], "x")).problems(table)) == [
        (3, "4 words but 2 tags"), (4, "'tags' is None, but a list of tags is expected")]


@pytest.mark.parametrize("rows", [
    [{"words": "a fine day", "tags": "good"}, {"words": "a bad day", "tags": "bad"}],                       # classes
    [{"words": "fine", "tags": "good"}, {"words": "bad", "tags": "bad"}],                                   # one of each
    [{"text": "a b", "tags": "O O"}], LISTS])
def test_what_is_no_tagging_stays(rows):
    assert normalised(Table(rows, "x")).rows == rows


def test_lists_written_as_text():
    with pytest.raises(DataError, match="x: the column 'tags' holds lists written as text; save them as jsonl or parquet"):
        normalised(Table([{name: str(value) for name, value in row.items()} for row in LISTS], "x"))


def test_words_alone_are_split_for_a_tagging_model():
    rows = [{"words": row["words"]} for row in ROWS]
    assert normalised(Table(rows, "x")).rows == rows
    assert normalised(Table(rows, "x"), tagging=True).rows == [{"words": row["words"]} for row in LISTS]
