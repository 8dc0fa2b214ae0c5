"""Files of columns and of roles, the published data sets, hub rows, and what errors say of a line."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import transformers

from ptv2_engine.cli import main
from ptv2_engine.errors import DataError
from ptv2_engine.tasks.data import SUFFIXES, Table, read_table
from ptv2_engine.tasks.ner import CONLL2003, CONLL2005, CONLL2012, NER, ONTONOTES, SRL, entity_rows, role_rows
from ptv2_engine.testing import tiny_model

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not beside the checkout")


def published(path, separator, word):
    """The sentences that the published loaders yield: they give one out at each blank line only."""
    found, words, tags = [], [], []
    for line in path.read_text().splitlines(keepends=True):
        if line.startswith("-DOCSTART-") or line in ("", "\n"):
            if words:
                found.append({"words": words, "tags": tags})
                words, tags = [], []
        else:
            words.append(line.split(separator)[word])
            tags.append(line.split(separator)[-1].rstrip())
    return found, {"words": words, "tags": tags}


def test_conll2003_columns():
    rows = read_table(FIXTURES / "ner" / "train.txt").rows
    # the first sentence's NER column is all "O", but its chunks are not to be taken for it; "#" is a word
    assert rows == [{"words": ["Nothing", "was", "said", "."], "tags": ["O"] * 4},
                    {"words": ["Ann", "Lee", "left", "New", "York", "."], "tags": ["B-PER", "I-PER", "O", "B-LOC", "I-LOC", "O"]},
                    {"words": ["#", "1", "is", "Acme"], "tags": ["O", "O", "O", "B-ORG"]}]


@pytest.mark.parametrize("name, separator, word", [("train.txt", " ", 0), ("train.sd.conllx", "\t", 1)])
def test_the_last_sentence_is_kept(name, separator, word):
    """The published CoNLL-2004 and OntoNotes loaders lose it where the file does not end in a blank line."""
    path = FIXTURES / "ner" / name
    complete, last = published(path, separator, word)
    assert last["words"]
    assert read_table(path).rows == [*complete, last]


def test_conll2004_documents_with_an_index_and_relations():
    assert read_table(FIXTURES / "ner" / "conll04.txt").rows == [
        {"words": ["Ann", "Lee", "left", "New", "York"], "tags": ["B-Peop", "I-Peop", "O", "B-Loc", "I-Loc"]},
        {"words": ["Nobody", "stayed"], "tags": ["O", "O"]},
        {"words": ["Acme", "hired", "Bob"], "tags": ["B-Org", "O", "B-Peop"]}]


@pytest.mark.parametrize(
    "text, rows",
    [
        ("# text = Ann\nAnn B-PER\n\n#home O\n#Ann B-PER\n", [["Ann"], ["#home", "#Ann"]]),            # comment, hashtags
        ("\ufeffAnn\tx\tB-PER\r\n\t\r\nBob\tx\tB-PER\r\n", [["Ann"], ["Bob"]]),                     # BOM, CRLF, empty cells
        ("1 O\n2 B-NUM\n", [["1", "2"]]),                                                                # words that count
        ("New\u00a0York\tB-LOC\nis\tO\n", [["New\u00a0York", "is"]]),                                    # blanks inside words
        ("a\x85b I-LOC\nBonn B-LOC\n", [["a\x85b", "Bonn"]]),                                            # what splitlines cuts at
        ("Ann O\nBob O\n\nEve O", [["Ann", "Bob"], ["Eve"]]),                                            # nothing but O
        ("Ann S-PER\nNew B-LOC\nYork E-LOC\n", [["Ann", "New", "York"]]),
        ("Ann\nBob\n\nEve\n", [["Ann", "Bob"], ["Eve"]]),                                                # no tags: to predict
    ],
)
def test_columns_as_they_come(text, rows, tmp_path):
    (tmp_path / "x.conll").write_bytes(text.encode())
    assert [row["words"] for row in read_table(tmp_path / "x.conll").rows] == rows


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.txt", b"Ann B-PER\nLee I-PER\n\nBob\nran O\n", r"x.txt, line 4: 1 columns \('Bob'\), but most lines .* have 2"),
        ("x.txt", b"Ann B-PER\n\nBob ran O\nx O\n", r"line 3: 3 columns"),
        ("x.txt", b"Ann NN B-PER\nLee NN BPER\nran VB O\n", r"line 2: 'BPER' in column 3 is not a tag"),
        ("x.txt", b"Ann B-NP B-PER\nran B-VP 0\nhome B-NP O\n", r"line 2: '0' in column 3 is not a tag"),
        ("x.txt", b"Ann\tB-PER\n\tO\n", r"line 2: column 1, the word's, is empty"),
        ("x.txt", "Ann B-PER\nJos\u00e9 B-PER\n".encode() + b"Jos\xe9 B-PER\n", r"line 3 is not UTF-8 \(byte 0xe9"),
        ("x.csv", b"text,label\na,1\n\xff,0\n", r"line 3 is not UTF-8"),
        ("x.csv", b'text,label\n"a\nb",1\nc,d,2\n', r"line 4: 3 fields where the header has 2"),
        ("x.jsonl", b'{"a": 1}\n\n{"a" 2}\n', r"line 3 cannot be read as jsonl"),
        ("x.jsonl", b'{"a": 1}\n[2]\n', r"line 2 is JSON but not an object"),
        ("x.json", b'[\n {"a": 1},\n {"a" 2}\n]', r"line 3 cannot be read as json"),
        ("x.json", b'{"a": 1}\n{"a" 2}\n', r"line 2 cannot be read as jsonl"),
        ("x.json", b'[{"a": 1}, 2]', r"entry 2"),
        ("x.txt", b"0 Ann ran ||| B-A0 B-V\n1 Ann ran ||| B-A0\n", r"line 2: 2 words but 1 tags"),
        ("x.txt", b"0 Ann ran ||| B-A0 B-V\n\n2 Ann ran ||| B-A0 B-V\n", r"line 3: predicate 2 of 2 words"),
        ("x.txt", b"0 Ann ran ||| B-A0 B-V\nAnn ran ||| B-A0 B-V\n", r"line 2: not 'predicate_index"),
        ("x.txt", b"0 Ann ran ||| B-A0 V\n", r"line 1: 'V' is not a tag"),
        ("x.txt", b"Ann\t-\t(A0*\nran\trun\t(V*)\n", r"line 2: the bracket '\(V\*\)' does not fit"),
        ("x.txt", b"Ann\t-\t(A0*\nran\trun\t*\n", r"line 2: the role A0 is not closed"),
    ],
)
def test_errors_name_the_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / name)


def test_a_row_without_a_column_is_named():
    with pytest.raises(DataError, match="x: row 2 has no 'b'; it has 'a'"):
        Table([{"a": 1, "b": 2}, {"a": 1}], "x").column("b")


def test_role_files():
    rows = read_table(FIXTURES / "srl" / "conll05.train.txt").rows
    assert rows[1] == {"words": ["The", "cat", "that", "slept", "ran"], "predicate": 3,
                       "tags": ["B-A0", "I-A0", "B-R-A0", "B-V", "O"]}
    assert [row["words"][row["predicate"]] for row in rows] == ["left", "slept", "ran"]
    rows = read_table(FIXTURES / "srl" / "columns.txt").rows       # a sentence without a predicate makes no row
    assert [(r["words"][r["predicate"]], " ".join(r["tags"])) for r in rows] == [
        ("left", "B-A0 B-V B-A1 I-A1 B-AM-PNC I-AM-PNC"), ("sleep", "O O O O O B-V"), ("ran", "B-A0 B-V")]


def test_roles_as_json_lines(tmp_path):
    rows = [{"words": ["Ann", "ran"], "predicate": 1, "tags": ["B-A0", "B-V"]},
            {"words": ["Run", "now"], "predicate": "Run", "tags": ["B-V", "O"]}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = role_rows(read_table(tmp_path / "x.jsonl"))
    assert table.rows == rows and not list(SRL["conll2012"].make(table, 0).problems(table))


def files_of(benchmark, folder):
    """Our split name -> the table of its published file."""
    found = {}
    for split, stems in benchmark.files.items():
        path = next(folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES if (folder / f"{stem}{suffix}").is_file())
        found[split] = benchmark.rows(read_table(path), 0)
    return found


def test_conll2005_has_two_test_sets():
    tables = files_of(SRL["conll2005"], FIXTURES / "srl")
    assert {split: len(table) for split, table in tables.items()} == {"train": 3, "validation": 2, "test": 1, "test_brown": 2}
    task = SRL["conll2005"].make(tables["train"], 0)
    assert set(CONLL2005) == set(task.names) and task.predicate_column == "predicate" and task.names[0] == "O"
    assert not [p for table in tables.values() for p in task.problems(table)]
    assert set(SRL["conll2005"].splits) == set(tables) and SRL["conll2005"].hub == ()


def test_published_label_lists():
    assert [len(names) for names in (CONLL2003, ONTONOTES, CONLL2005, CONLL2012)] == [9, 37, 106, 116]
    assert all(len(set(names)) == len(names) for names in (CONLL2003, ONTONOTES, CONLL2005, CONLL2012))
    assert ONTONOTES[11:13] == ["B-ORG", "I-ORG"] and ONTONOTES[4:6] == ["B-PERSON", "I-PERSON"]
    table = Table([{"words": ["x"], "predicate": 0, "tags": ["B-NEW"]}], "x")       # another version of the roles keeps its own
    assert set(SRL["conll2012"].make(table, 0).names) == {*CONLL2012, "B-NEW"}
    table.rows[0]["tags"] = ["S-LOC"]                                                # another scheme of the same types
    assert set(NER["conll2003"].make(table, 0).names) == {*CONLL2003, "S-LOC"}


@pytest.mark.parametrize("name, tags, unknown, known", [
    ("ontonotes", CONLL2003, "MISC, PER", "CARDINAL, DATE, EVENT, .*, WORK_OF_ART"),
    ("conll2003", ["O", "B-Peop", "I-Loc"], "Loc, Peop", "LOC, MISC, ORG, PER"),
    ("conll2004", ["PER", "B-Org"], "PER", "Loc, Org, Other, Peop")])
def test_files_of_another_data_set(name, tags, unknown, known):
    table = Table([{"words": ["x"] * len(tags), "tags": tags}], "x.txt")
    with pytest.raises(DataError, match=f"^x.txt has entities of the types {unknown}, but {name} has {known}; give {name}'s own"):
        NER[name].make(table, 0)


def test_hub_rows_become_words_and_tags():
    ontonotes = Table([{"tokens": ["Phil", "Rosen", "of", "Fleet"], "tags": [4, 5, 0, 11]}, {"tokens": [], "tags": []}], "hub")
    assert NER["ontonotes"].rows(ontonotes, 0).rows == [
        {"words": ["Phil", "Rosen", "of", "Fleet"], "tags": ["B-PERSON", "I-PERSON", "O", "B-ORG"]}]
    conll = Table([{"id": "0", "tokens": ["EU", "said"], "pos_tags": [22, 38], "chunk_tags": [11, 21], "ner_tags": [3, 0]},
                   {"id": "1", "tokens": ["EU", "said"], "ner_tags": ["B-ORG", "O"]}], "hub")
    assert NER["conll2003"].rows(conll, 0).rows == [{"words": ["EU", "said"], "tags": ["B-ORG", "O"]}] * 2
    spans = Table([{"tokens": ["Ann", "Lee", "left", "Rome"], "relations": [], "entities": [
        {"type": "Loc", "start": 3, "end": 4}, {"type": "Peop", "start": 0, "end": 2}]}], "hub")
    assert NER["conll2004"].rows(spans, 0).rows[0]["tags"] == ["B-Peop", "I-Peop", "O", "B-Loc"]
    assert entity_rows(Table([{"tokens": ["Ann"], "ner_tags": None}], "x"), CONLL2003).rows == [{"words": ["Ann"]}]
    roles = Table([{"document_id": "x", "sentences": [
        {"words": ["It", "is"], "srl_frames": []},
        {"words": ["Ann", "saw", "Bob"], "srl_frames": [{"verb": "saw", "frames": ["B-ARG0", "B-V", "B-ARG1"]}]}]}], "hub")
    assert SRL["conll2012"].rows(roles, 0).rows == [
        {"words": ["Ann", "saw", "Bob"], "predicate": 1, "tags": ["B-ARG0", "B-V", "B-ARG1"]}]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"tokens": ["a"], "tags": [37]}, "row 1 has the tag 37, but there are 37 tags"),
        ({"tokens": ["a"], "entities": [{"type": "Loc", "start": 0, "end": 2}]}, "entity of the words 0 to 2, but there are 1"),
        ({"text": "a"}, "row 1 has no 'words' or 'tokens'; it has 'text'"),
    ],
)
def test_bad_hub_rows(row, message):
    with pytest.raises(DataError, match=message):
        entity_rows(Table([row], "hub"), ONTONOTES)
    frame = {"verb": "saw", "frames": ["B-ARG0"]}
    with pytest.raises(DataError, match="'saw' is not a word of 'Ann'"):
        role_rows(Table([{"sentences": [{"words": ["Ann"], "srl_frames": [frame]}]}], "hub"))


@needs_data
@pytest.mark.parametrize("folder, name, stems, sizes", [
    ("conll2003", "conll2003", ("train", "valid", "test"), (14041, 3250, 3453)),
    ("conll04", "conll2004", ("train", "dev", "test"), (910, 243, 288)),
])
def test_published_files(folder, name, stems, sizes):
    benchmark, tables = NER[name], [read_table(SHARED / folder / f"{stem}.txt") for stem in stems]
    tables = [benchmark.rows(table, 0) for table in tables]
    assert tuple(map(len, tables)) == sizes
    task = benchmark.make(tables[0], 0)
    assert len(task.names) == 9 and not [p for table in tables for p in task.problems(table)]
    for stem, table in zip(stems, tables, strict=True):                # no line with a word is lost
        lines = (SHARED / folder / f"{stem}.txt").read_text().split("\n")
        assert sum(len(row["words"]) for row in table.rows) == sum(bool(line) and line[:5] != "#doc " for line in lines)


@pytest.mark.parametrize("task, name", [("ner", "conll2004"), ("srl", "conll2012")])
def test_training_needs_no_test_file(task, name, tmp_path):
    """The published NER and SRL trainers crash when no prediction on a test set is asked for."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Ann", "Bob", "ran", "saw", "home"]
    backbone, data, output = (tmp_path / folder for folder in ("backbone", "data", "output"))
    tiny_model("bert").save_pretrained(backbone)
    (backbone / "vocab.txt").write_text("\n".join(words + [f"w{i}" for i in range(120 - len(words))]))
    transformers.BertTokenizerFast(str(backbone / "vocab.txt")).save_pretrained(backbone)
    data.mkdir()
    rng = random.Random(0)
    for split in ("train", "dev"):
        rows = []
        for _ in range(16):
            names = [rng.choice(["Ann", "Bob"]) for _ in range(2)]
            if task == "ner":
                rows.append(f"{names[0]} B-Peop\nsaw O\n{names[1]} B-Peop\n")
            else:
                rows.append(f"1 {names[0]} saw {names[1]} ||| B-ARG0 B-V B-ARG1")
        (data / f"{split}.txt").write_text("\n".join(rows))
    arguments = ["train", "--model_name_or_path", backbone, "--task_name", task, "--dataset_name", name, "--data_dir", data,
                 "--output_dir", output, "--prompt_length", 4, "--max_steps", 4, "--eval_strategy", "steps", "--eval_steps", 4,
                 "--learning_rate", "3e-2", "--use_cpu"]
    assert main([str(argument) for argument in arguments]) == 0
    results = json.loads((output / "results.json").read_text())
    assert 0 <= results["last_evaluation"]["eval_f1"] <= 1 and "test" not in results
