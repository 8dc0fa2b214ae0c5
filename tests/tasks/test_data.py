"""Reading tables, inferring labels, making features, and metrics against their definitions."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from ptv2_engine.errors import DataError, LabelError
from ptv2_engine.tasks import Labels, Table, metrics_for, read_table
from ptv2_engine.tasks.features import label_name
from ptv2_engine.tasks.metrics import text_scores

ROWS = [{"text": 'he said "no", twice', "label": "neg"}, {"text": "café", "label": "pos"}]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8-sig")
    elif path.suffix == ".csv":
        quoted = ['"' + r["text"].replace('"', '""') + '",' + r["label"] for r in rows]
        path.write_text("\n".join(["text,label", *quoted]), encoding="utf-8")
    elif path.suffix == ".tsv":
        path.write_text("\n".join(["text\tlabel", *(f"{r['text']}\t{r['label']}" for r in rows)]), encoding="utf-8")
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_table(suffix, tmp_path):
    assert read_table(write(tmp_path / f"x{suffix}", ROWS)).rows == ROWS


def test_conll_columns_keep_the_last_sentence(tmp_path):
    (tmp_path / "x.txt").write_text("-DOCSTART- O O\n\nPeter B-PER O\nsings O O\n\nParis B-LOC O")
    assert read_table(tmp_path / "x.txt").rows == [{"words": ["Peter", "sings"], "tags": ["B-PER", "O"]},
                                                   {"words": ["Paris"], "tags": ["B-LOC"]}]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("x.csv", "", "has 0 examples"),
        ("x.xls", "x", "files of .csv, .tsv"),
        ("x.csv", "a,b\n1,2,3\n", "line 2: .* fields where the header has 2"),
        ("x.jsonl", "{broken", "cannot be read as jsonl"),
        ("x.json", '{"a": 1}', "not a list of objects"),
        ("x.parquet", "nonsense", "not a readable parquet file"),
        ("x.txt", "a b\nc d\n", "holds BIO tags"),
    ],
)
def test_bad_files(name, content, words, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        read_table(tmp_path / name)


HEAD = "text,label\na,0\nb,1\n"


@pytest.mark.parametrize(
    "content, words",
    [
        (HEAD + '"open,1\nc,0\nd,1\n', r"line 4 cannot be read as csv \(unexpected end of data, on line 6\)"),
        (HEAD + '"open,1\nc,0\n"d, e",1\nf,0\n', r"line 4 cannot be read as csv \(',' expected after '\"', on line 6\)"),
        (HEAD + '"He" said,0\n', "line 4 cannot be read as csv"),
        (HEAD + '"open,1\nc,0\n6"', "line 4: 1 fields where the header has 2, over 3 lines of one quote"),
        (HEAD + '"open,1\nc,0\nsix 6",1\n', "line 4: the quote that opens there goes over 3 lines that look like rows"),
        ('label,text\n0,a\n1,b\n1,"open\n0,c\n1,six 6"\n', "line 4: the quote that opens there goes over 3 lines"),
        ("text,label,label \na,0,1\n", "line 1: 'label' is the name of more than one column"),
        (",text,label\nx,a,0\n", "line 1: column 1 of 3, which holds 'x', has no name"),
    ],
)
def test_quotes_and_names_that_would_lose_data(content, words, tmp_path):
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(DataError, match=words):
        read_table(tmp_path / "x.csv")


def test_a_field_may_go_over_lines_and_an_index_needs_no_name(tmp_path):
    (tmp_path / "x.csv").write_text(',text,label,\n0,"a, b\nc, d\n\n",0,\n7,"""x"" y",1,\n\n')   # pandas' index
    assert read_table(tmp_path / "x.csv").rows == [{"text": "a, b\nc, d\n\n", "label": "0"}, {"text": '"x" y', "label": "1"}]


@pytest.mark.parametrize(
    "lines, texts",
    [
        (['"he said ""no"""\t1', '"tab\there"\t0', '"two\nlines"\t1', "plain\t0"],                    # as pandas and Excel write
         ['he said "no"', "tab\there", "two\nlines", "plain"]),
        (['"Name\tValue\nfoo"\t1', '"x\ty"\t0'], ["Name\tValue\nfoo", "x\ty"]),                  # lines that look like rows
        (['"whole"\t1', 'and "inside\t0', '"left open\t1'], ['"whole"', 'and "inside', '"left open']),  # bare marks, as in GLUE
        (['"He came\t1', 'and saw."\t0'], ['"He came', 'and saw."']),                              # opened and closed by chance
    ],
)
def test_a_tsv_is_quoted_or_not_as_a_whole(lines, texts, tmp_path):
    (tmp_path / "x.tsv").write_text("\n".join(["text\tlabel", *lines, ""]))
    assert [row["text"] for row in read_table(tmp_path / "x.tsv").rows] == texts
    (tmp_path / "x.tsv").write_bytes("\r\n".join(["\"text\"\t\"label\"", "\"a\"\t\"1\"", ""]).encode())
    assert read_table(tmp_path / "x.tsv").rows == [{"text": "a", "label": "1"}]


def test_a_quoted_tsv_names_the_line_that_is_wrong(tmp_path):
    (tmp_path / "x.tsv").write_text('text\tlabel\n"two\nlines"\t1\nplain\t0\nbroken\n')
    with pytest.raises(DataError, match="line 5: 1 fields where the header has 2; "):
        read_table(tmp_path / "x.tsv")


def test_missing_file_and_column(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"x has no column 'txt'; it has 'text', 'label'"):
        Table(ROWS, "x").column("txt")


@pytest.mark.parametrize(
    "values, kind, names",
    [
        (["b", "a", "b"], "classes", ["a", "b"]),
        ([0, 2, 10, 2], "classes", ["0", "2", "10"]),
        ([True, False], "classes", ["False", "True"]),
        (["1", "0"], "classes", ["0", "1"]),
        ([1.0, 0.0], "classes", ["0", "1"]),
        ([0.5, 1.0], "values", []),
        (["2.5", "1"], "values", []),
        ([["O", "B-X"], ["I-X"]], "tags", ["O", "B-X", "I-X"]),
    ],
)
def test_labels_are_inferred(values, kind, names):
    labels = Labels.infer(values, "x")
    assert (labels.kind, labels.names) == (kind, names)
    encoded = labels.encode(values[0], "x")
    assert encoded == (float(values[0]) if kind == "values" else [0, 1] if kind == "tags" else names.index(str(
        int(values[0]) if isinstance(values[0], float) else values[0])))


def test_unseen_labels_are_named():
    with pytest.raises(LabelError, match=r"dev: label 'c' is not one of the 2 known labels \(a, b\)"):
        Labels("classes", ["a", "b"]).encode("c", "dev")
    with pytest.raises(LabelError, match="label 'high' is not a number"):
        Labels("values", []).encode("high", "dev")


def prediction(scores, labels):
    return SimpleNamespace(predictions=np.asarray(scores), label_ids=np.asarray(labels))


def test_metrics_equal_their_libraries():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(50, 3)), rng.integers(0, 3, 50)
    found = metrics_for("classes", [], ("f1_macro", "matthews"))(prediction(scores, labels))
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, scores.argmax(1)))
    assert found["f1_macro"] == pytest.approx(sk.f1_score(labels, scores.argmax(1), average="macro"))
    assert found["matthews"] == pytest.approx(sk.matthews_corrcoef(labels, scores.argmax(1)))
    x, y = rng.integers(0, 6, 40).astype(float), rng.normal(size=40)
    found = metrics_for("values", [])(prediction(x[:, None], y))
    assert found["pearson"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert metrics_for("values", [])(prediction([[1.0], [1.0]], [0.0, 1.0]))["pearson"] == 0.0


def test_entity_f1_leaves_out_ignored_positions():
    names = ["O", "B-X", "I-X"]
    labels = np.array([[1, 2, -100, 0], [0, 1, -100, -100]])
    scores = np.eye(3)[[[1, 2, 0, 0], [0, 0, 1, 1]]]
    found = metrics_for("tags", names)(prediction(scores, labels))
    assert found["precision"] == 1.0 and found["recall"] == 0.5 and found["accuracy"] == pytest.approx(4 / 5)


def test_text_scores_take_the_best_gold_answer():
    found = text_scores(["the U.S.", "Anna B", "none", ""], [["us", "America"], ["Anna"], [], [""]])
    assert found == pytest.approx({"exact_match": 2 / 4, "f1": (1 + 2 / 3) / 4})      # no word in common is 0, also of nothing


@pytest.mark.parametrize("value, name", [
    ("no", "no"), ("YES", "yes"), (1, "yes"), ("0", "no"), (1.0, "yes"), (2, 2), ("perhaps", "perhaps"), (None, None), ("", None),
    (-1, None), ("-1", None), (-1.0, None)])
def test_labels_of_published_files(value, name):
    assert label_name(value, ["no", "yes"]) == name


def test_labels_of_published_files_by_name_first():
    assert label_name("1", ["1", "0"]) == "1" and label_name(True, ["False", "True"]) == "True"
    assert label_name("-1", ["-1", "1"]) == "-1"
    assert label_name("2.5", []) == 2.5 and label_name(-1.0, []) is None and label_name("high", []) == "high"
