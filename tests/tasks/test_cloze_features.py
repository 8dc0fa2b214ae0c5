"""SuperGLUE rows as GLM's cloze inputs: exact ids for one example of each kind, properties for all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptv2_engine.errors import ConfigError, DataError
from ptv2_engine.tasks.cloze import cloze_features, cloze_rows, verbalizer_ids
from ptv2_engine.tasks.cloze_patterns import PATTERNS, find_pattern, own_pattern
from ptv2_engine.tasks.glm_tokenizer import load_glm_tokenizer
from tests.tasks import glm_vocabulary

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
ROWS = {
    "boolq": {"passage": "The cat sat on the mat.", "question": "did the cat sit", "label": 1},
    "rte": {"premise": "It rained, so the street was wet.", "hypothesis": "The street was wet.", "label": "entailment"},
    "cb": {"premise": "It rained.", "hypothesis": "The street was wet.", "label": 2},
    "wic": {"sentence1": "the mat was soft", "sentence2": "a soft voice", "word": "soft", "label": False},
    "multirc": {"paragraph": "The cat sat.", "question": "Who sat?", "answer": "the cat", "label": 1},
    "copa": {"premise": "My body cast a shadow over the grass.", "choice1": "The sun was rising.",
             "choice2": "The grass was cut.", "question": "cause", "label": 0},
    "wsc": {"text": "Mark told Pete many lies about himself", "target": {"span1_text": "Mark", "span2_text": "himself",
            "span2_index": 6}, "candidates": ["Pete", "lies"], "label": True},
    "record": {"passage": "Mark told Pete.", "query": "Who told? @placeholder did.", "entities": ["Pete", "Mark", "lies"],
               "answers": ["Mark"]},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_glm_tokenizer(glm_vocabulary.write(tmp_path_factory.mktemp("gpt2"), 600))


def ids(tokenizer, *parts):
    """Parts encoded one by one; "M" is the mask."""
    return [i for p in parts for i in ([tokenizer.mask_token_id] if p == "M" else tokenizer.encode(p, add_special_tokens=False))]


def whole(tokenizer, *parts):
    return [tokenizer.cls_token_id, *ids(tokenizer, *parts), tokenizer.eos_token_id]


def special(tokenizer, name):
    return tokenizer.convert_tokens_to_ids(f"<|{name}|>")


def test_a_single_token_task_written_out(tokenizer):
    context = whole(tokenizer, '"', "The street was wet", '" ?', "M", ', "', ROWS["rte"]["premise"], '"')
    found = cloze_features(ROWS["rte"], find_pattern("rte"), tokenizer, 256)
    mask_at = context.index(tokenizer.mask_token_id)
    assert found == {"input_ids": [*context, special(tokenizer, "startofpiece")], "causal_from": len(context), "label": 0,
                     "position_ids": [[*range(len(context)), mask_at], [0] * len(context) + [1]]}


def test_a_multi_token_task_written_out(tokenizer):
    sop, eop = special(tokenizer, "startofpiece"), special(tokenizer, "endofpiece")
    context = whole(tokenizer, '"', "the sun was rising", '" or "', "the grass was cut", '"?',
                    " My body cast a shadow over the grass", " because", "M", ".")
    one, two = (ids(tokenizer, t) for t in (" the sun was rising", " the grass was cut"))
    found = cloze_features(ROWS["copa"], find_pattern("copa"), tokenizer, 256)
    sep, mask_at, answers = len(context), context.index(tokenizer.mask_token_id), (one, two)
    assert found["input_ids"] == [*context, sop, *one, sop, *two]
    assert found["target_ids"] == [-100] * sep + [*one, eop, *two, eop]
    assert found["candidate_ids"] == [-1] * sep + [0] * (len(one) + 1) + [1] * (len(two) + 1)
    assert found["position_ids"] == [[*range(sep), *[mask_at] * (len(one) + len(two) + 2)],
                                     [0] * sep + [b for a in answers for b in range(1, len(a) + 2)]]
    assert found["label"] == 0 and found["causal_from"] == sep
    without = cloze_features(ROWS["copa"], find_pattern("copa"), tokenizer, 256, with_eop=False)
    assert without["target_ids"][sep:] == [*one, *two] and eop not in without["input_ids"]


@pytest.mark.parametrize(("name", "pattern_id", "text"), [
    ("boolq", 0, "The cat sat on the mat. Question: did the cat sit? Answer:M."),
    ("boolq", 3, "The cat sat on the mat. Based on the previous passage, did the cat sit?M."),
    ("boolq", 4, "Based on the following passage  did the cat sit?M. The cat sat on the mat."),
    ("rte", 1, "The street was wet?M, It rained, so the street was wet."),
    ("rte", 2, '"The street was wet" ?M. "It rained, so the street was wet."'),
    ("rte", 4, "It rained, so the street was wet. question: The street was wet True or False? answer:M"),
    ("cb", 4, "It rained. question: The street was wet. true, false or neither? answer:M"),
    ("wic", 0, '"the mat was soft" / "a soft voice" Similar sense of "soft"?M.'),
    ("wic", 2, 'soft . Sense (1) (a) "the mat was soft" (M) "a soft voice"'),
    ("multirc", 0, "The cat sat. Question: Who sat? Is it the cat?M."),
    ("multirc", 3, "The cat sat Who sat- [M]the cat"),
    ("copa", 1, "the sun was rising or the grass was cut? My body cast a shadow over the grass becauseM."),
    ("wsc", 0, "Mark told Pete many lies about *himself* The pronoun '*himself*' refers toM."),
    ("record", 0, "Mark told Pete. Who told?M did."),
])
def test_the_wording_of_the_published_patterns(tokenizer, name, pattern_id, text):
    found = cloze_features(ROWS[name], find_pattern(name, pattern_id), tokenizer, 256)
    context = found["input_ids"][1:found["causal_from"] - 1]
    assert "".join("M" if i == tokenizer.mask_token_id else tokenizer.decode([i]) for i in context) == text


@pytest.mark.parametrize("max_length", [96, 64])
@pytest.mark.parametrize("name", PATTERNS)
def test_properties_of_every_pattern(tokenizer, name, max_length):
    row = {k: v * 4 if k in ("passage", "premise", "paragraph", "text") else v for k, v in ROWS[name].items()}
    if name == "wsc":
        row["text"] = ROWS["wsc"]["text"] + " and then he sat on the mat" * 4
    for pattern in PATTERNS[name]:
        found = cloze_features(row, pattern, tokenizer, max_length)
        tokens, sep, (positions, blocks) = found["input_ids"], found["causal_from"], found["position_ids"]
        assert len(tokens) == len(positions) == len(blocks) <= max_length
        assert tokens[0] == tokenizer.cls_token_id and tokens[sep - 1] == tokenizer.eos_token_id
        assert tokens[:sep].count(tokenizer.mask_token_id) == 1
        assert positions[:sep] == list(range(sep)) and set(blocks[:sep]) == {0}
        assert set(positions[sep:]) == {tokens.index(tokenizer.mask_token_id)}
        starts = [i for i in range(sep, len(tokens)) if tokens[i] == special(tokenizer, "startofpiece")]
        assert [blocks[i] for i in starts] == [1] * len(starts)
        if "target_ids" in found:
            for i in range(sep, len(tokens) - 1):
                assert i + 1 in starts or tokens[i + 1] == found["target_ids"][i]


def test_verbalizers_are_one_token_each(tokenizer):
    assert verbalizer_ids(find_pattern("rte"), tokenizer) == [tokenizer.encode(w)[1] for w in (" Yes", " No")]
    with pytest.raises(ConfigError, match="needs to be one"):
        verbalizer_ids(own_pattern("{text} {mask}", ["a= Yes", "b= antidisestablishment"]), tokenizer)


def test_a_pattern_of_ones_own(tokenizer):
    pattern = own_pattern("{sentence1} Question: {sentence2}? Answer: {mask}.", ["yes= Yes", "no= No"])
    found = cloze_features({"sentence1": "It rained.", "sentence2": "Was it wet", "label": "no"}, pattern, tokenizer, 256)
    assert found["input_ids"][:-1] == whole(tokenizer, "It rained.", " Question:", " Was it wet", "? Answer:", "M", ".")
    assert found["label"] == 1


def test_record_expands_gold_answers_with_at_most_nine_negatives(tokenizer):
    row = ROWS["record"] | {"entities": [f"Pete {i}" for i in range(30)], "answers": ["Pete 3", "Pete 7", "Pete 3"]}
    made = cloze_rows([row], find_pattern("record"), tokenizer, 512, training=True)
    assert [f["label"] for f in made] == [0, 0] and [max(f["candidate_ids"]) for f in made] == [9, 9]
    assert made == cloze_rows([row], find_pattern("record"), tokenizer, 512, training=True)
    (all_of_them,) = cloze_rows([row], find_pattern("record"), tokenizer, 1024, training=False)
    assert max(all_of_them["candidate_ids"]) == 29 and all_of_them["label"] == 3


def test_wsc_trains_on_rows_whose_span_is_right(tokenizer):
    rows = [ROWS["wsc"], ROWS["wsc"] | {"label": False}]
    assert len(cloze_rows(rows, find_pattern("wsc"), tokenizer, 128, training=True)) == 1
    assert [f.get("label") for f in cloze_rows(rows, find_pattern("wsc"), tokenizer, 128, training=False)] == [0, None]


@pytest.mark.parametrize(("name", "change", "word"), [
    ("rte", {"label": "perhaps"}, "row 2: label 'perhaps'"),
    ("rte", {"premise": None}, "row 2"),
    ("wsc", {"candidates": []}, "row 2: a WSC row has no candidates"),
    ("record", {"query": "no marker"}, "row 2: the ReCoRD query"),
    ("record", {"entities": []}, "row 2"),
])
def test_bad_rows_are_named(tokenizer, name, change, word):
    row = {k: v for k, v in (ROWS[name] | change).items() if v is not None}
    with pytest.raises(DataError, match=word):
        cloze_rows([ROWS[name], row], find_pattern(name), tokenizer, 256, training=False)


def test_an_example_that_cannot_fit_is_refused(tokenizer):
    with pytest.raises(DataError, match="max_seq_length"):
        cloze_features(ROWS["copa"], find_pattern("copa"), tokenizer, 30)


@pytest.mark.parametrize(("template", "verbalizers", "word"), [
    ("{text}", ["a=b", "c=d"], "exactly one"), ("{text} {mask} {mask}", ["a=b", "c=d"], "2 blanks"),
    ("{text {mask}", ["a=b", "c=d"], "not understood"), ("{text} {mask}", ["a=b"], "two or more"),
    ("{text} {mask}", ["a=b", "c"], "two or more")])
def test_a_pattern_that_cannot_be_is_refused(template, verbalizers, word):
    with pytest.raises(ConfigError, match=word):
        own_pattern(template, verbalizers)


def test_unknown_patterns_name_what_there_is():
    with pytest.raises(ConfigError, match="boolq"):
        find_pattern("sst2")
    with pytest.raises(ConfigError, match="0 to 4"):
        find_pattern("rte", 5)


@pytest.mark.skipif(not (SHARED / "superglue-rte").is_dir(), reason="no ../shared/data")
def test_real_rte_rows(tokenizer):
    rows = [json.loads(line) for line in (SHARED / "superglue-rte" / "val.jsonl").read_text().splitlines()]
    made = cloze_rows(rows, find_pattern("rte"), tokenizer, 256, training=False)
    assert len(made) == len(rows) and max(len(f["input_ids"]) for f in made) == 256
    assert [f["label"] for f in made] == [("entailment", "not_entailment").index(row["label"]) for row in rows]
