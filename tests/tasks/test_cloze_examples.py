"""Which examples and labels a row makes for GLM's patterns: training's, unknown labels, WSC's and ReCoRD's particulars."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from ptv2_engine.errors import DataError
from ptv2_engine.tasks.cloze import cloze_rows
from ptv2_engine.tasks.cloze_patterns import PATTERNS, find_pattern
from ptv2_engine.tasks.glm_tokenizer import load_glm_tokenizer
from tests.tasks import glm_vocabulary
from tests.tasks.test_cloze_features import ROWS, special, whole

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_glm_tokenizer(glm_vocabulary.write(tmp_path_factory.mktemp("gpt2"), 600))


def test_record_expands_gold_answers_with_at_most_nine_negatives(tokenizer):
    row = ROWS["record"] | {"entities": [f"Pete {i:02}" for i in range(30)], "answers": ["Pete 03", "Pete 07", "Pete 03"]}
    made = cloze_rows([row], find_pattern("record"), tokenizer, 512, training=True)
    assert [f["labels"] for f in made] == [0, 0] and [max(f["candidate_ids"]) for f in made] == [9, 9]
    assert made == cloze_rows([row], find_pattern("record"), tokenizer, 512, training=True)
    (all_of_them,) = cloze_rows([row], find_pattern("record"), tokenizer, 1024)
    assert max(all_of_them["candidate_ids"]) == 29 and all_of_them["labels"] == 3
    generator = random.Random(42)                          # the published draw, which goes on from example to example
    for example, gold in zip(made, ("Pete 03", "Pete 07"), strict=True):
        wrong = [e for e in row["entities"] if e not in row["answers"]]
        generator.shuffle(wrong)
        assert candidates(example, tokenizer) == [gold, *wrong[:9]]


def candidates(feature, tokenizer):
    """The answers behind a context, as text."""
    eop, texts = special(tokenizer, "endofpiece"), [[]]
    for i in feature["target_ids"][feature["causal_from"]:]:
        texts = [*texts, []] if i == eop else [*texts[:-1], [*texts[-1], i]]
    return [tokenizer.decode(t).strip() for t in texts[:-1]]


def test_record_passages_have_highlights_as_a_list(tokenizer):
    row = ROWS["record"] | {"passage": "Mark told Pete.\n@highlight\nMark lies\n@highlight\nPete too"}
    (found,) = cloze_rows([row], find_pattern("record"), tokenizer, 256)
    assert tokenizer.decode(found["input_ids"][1:]).startswith("Mark told Pete.\n- Mark lies\n- Pete too Who told?")


def test_copa_trains_with_its_choices_exchanged_too(tokenizer):
    rows = [ROWS["copa"], ROWS["copa"] | {"label": 1, "choice2": "The cat sat."}]
    made = cloze_rows(rows, find_pattern("copa"), tokenizer, 256, training=True)
    sun, grass, cat = "the sun was rising", "the grass was cut", "the cat sat"
    found = [(f["row"], candidates(f, tokenizer), f["labels"]) for f in made]
    assert found == [(0, [sun, grass], 0), (0, [grass, sun], 1), (1, [sun, cat], 1), (1, [cat, sun], 0)]
    assert len(cloze_rows(rows, find_pattern("copa"), tokenizer, 256)) == 2


def test_wsc_trains_on_rows_whose_span_is_right(tokenizer):
    rows = [ROWS["wsc"] | {"label": False}, ROWS["wsc"]]
    made = cloze_rows(rows, find_pattern("wsc"), tokenizer, 128, training=True)
    assert [(f["row"], f["labels"]) for f in made] == [(1, 0)]
    assert [f["labels"] for f in cloze_rows(rows, find_pattern("wsc"), tokenizer, 128)] == [-100, 0]


def test_wsc_trains_with_nine_candidates_at_a_time(tokenizer):
    others = [f"cat {i}" for i in range(11)]
    row = ROWS["wsc"] | {"candidates": [{"text": t} for t in [*others, "cat 1", "Mark"]]}       # one twice, and the span itself
    made = cloze_rows([row], find_pattern("wsc"), tokenizer, 256, training=True)
    assert [candidates(f, tokenizer) for f in made] == [["Mark", *others[:9]], ["Mark", *others[9:], *others[:7]]]
    (evaluated,) = cloze_rows([row], find_pattern("wsc"), tokenizer, 256)
    assert candidates(evaluated, tokenizer) == ["Mark", *others]


@pytest.mark.parametrize(("text", "index", "marked"), [
    ("Mark told him, and he left", 3, "Mark told *him* , and he left"),       # joined to a comma, and the index off by one
    ("Mark told him and he left", 1, "Mark told *him* and he left"),
])
def test_wsc_pronouns_are_found_where_the_index_is_wrong(tokenizer, text, index, marked):
    row = {"text": text, "target": {"span1_text": "Mark", "span2_text": "him", "span2_index": index}, "candidates": ["Pete"],
           "label": True}
    (found,) = cloze_rows([row], find_pattern("wsc"), tokenizer, 256)
    assert found["input_ids"][:found["causal_from"]] == whole(tokenizer, marked, " The pronoun '*him*' refers to", "M", ".")


@pytest.mark.parametrize("name", PATTERNS)
def test_minus_one_means_that_the_label_is_not_known(tokenizer, name):
    row = ROWS[name] | ({"answers": []} if name == "record" else {"label": -1})
    (found,) = cloze_rows([row], find_pattern(name), tokenizer, 256, labelled=False)
    assert "labels" not in found
    for training in (False, True):
        with pytest.raises(DataError, match="row 2: its label is not known"):
            cloze_rows([ROWS[name], row], find_pattern(name), tokenizer, 256, training=training)


@pytest.mark.parametrize("name", [n for n in PATTERNS if n != "record"])
def test_labels_are_read_from_the_column_that_is_named(tokenizer, name):
    row = dict(ROWS[name])
    row["gold"] = row.pop("label")
    want = cloze_rows([ROWS[name]], find_pattern(name), tokenizer, 256)
    assert cloze_rows([row], find_pattern(name), tokenizer, 256, label_column="gold") == want
    trained = cloze_rows([row | {"label": "not a label"}], find_pattern(name), tokenizer, 256, label_column="gold", training=True)
    assert trained == cloze_rows([ROWS[name]], find_pattern(name), tokenizer, 256, training=True)


@pytest.mark.skipif(not (SHARED / "superglue-wsc").is_dir(), reason="no ../shared/data")
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_real_wsc_row_has_its_pronoun_marked(tokenizer, split):
    rows = [json.loads(line) for line in (SHARED / "superglue-wsc" / f"{split}.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows, 1):
        (text, *_) = find_pattern("wsc").build(row)
        assert f" *{row['target']['span2_text']}* " in f" {text} ", (number, text)
        assert len(text.split()) - len(row["text"].split()) in (0, 1, 2), number
