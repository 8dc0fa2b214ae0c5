"""SuperGLUE rows as GLM's cloze inputs: exact ids for one example of each kind, properties for all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from ptv2_engine.errors import ConfigError, DataError
from ptv2_engine.tasks.cloze import cloze_features, cloze_rows, example_of, verbalizer_ids
from ptv2_engine.tasks.cloze_patterns import PATTERNS, find_pattern, own_pattern
from ptv2_engine.tasks.glm_tokenizer import load_glm_tokenizer
from tests.tasks import glm_vocabulary

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
ROWS = {
    "boolq": {"passage": "The cat sat on the mat.", "question": "did the cat sit", "label": 1},
    "rte": {"premise": "It rained, so the street was wet.", "hypothesis": "The street was wet.", "label": "entailment"},
    "cb": {"premise": "It rained.", "hypothesis": "The street was wet.", "label": 2},
    "wic": {"sentence1": "the mat was soft.", "sentence2": "a soft voice", "word": "soft", "label": False},
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
    """As GPT-2's, it has tokens of several punctuation marks, which show where a piece of a pattern ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glm_vocabulary, "TEXT", [*glm_vocabulary.TEXT, *['soft." soft?" "? ". "" ," "( ." (" .," ?," ]'] * 3])
        return load_glm_tokenizer(glm_vocabulary.write(tmp_path_factory.mktemp("gpt2"), 600))


def test_the_tokenizer_tells_pieces_apart(tokenizer):
    assert len(tokenizer.encode('."', add_special_tokens=False)) == 1


def ids(tokenizer, *parts):
    """Parts encoded one by one; "M" is the mask."""
    return [i for p in parts for i in ([tokenizer.mask_token_id] if p == "M" else tokenizer.encode(p, add_special_tokens=False))]


def features(row, pattern, tokenizer, max_length=256, **options):
    """One row's."""
    return cloze_features([example_of(row, pattern)], tokenizer, max_length, **options)[0]


def whole(tokenizer, *parts):
    return [tokenizer.cls_token_id, *ids(tokenizer, *parts), tokenizer.eos_token_id]


def special(tokenizer, name):
    return tokenizer.convert_tokens_to_ids(f"<|{name}|>")


def test_a_single_token_task_written_out(tokenizer):
    context = whole(tokenizer, '"', "The street was wet", '" ?', "M", ', "', ROWS["rte"]["premise"], '"')
    found = features(ROWS["rte"], find_pattern("rte"), tokenizer)
    mask_at = context.index(tokenizer.mask_token_id)
    assert found == {"input_ids": [*context, special(tokenizer, "startofpiece")], "causal_from": len(context), "labels": 0,
                     "position_ids": [[*range(len(context)), mask_at], [0] * len(context) + [1]], "row": 0}


def test_a_multi_token_task_written_out(tokenizer):
    sop, eop = special(tokenizer, "startofpiece"), special(tokenizer, "endofpiece")
    context = whole(tokenizer, '"', "the sun was rising", '" or "', "the grass was cut", '"?',
                    " My body cast a shadow over the grass", " because", "M", ".")
    one, two = (ids(tokenizer, t) for t in (" the sun was rising", " the grass was cut"))
    found = features(ROWS["copa"], find_pattern("copa"), tokenizer)
    sep, mask_at, answers = len(context), context.index(tokenizer.mask_token_id), (one, two)
    assert found["input_ids"] == [*context, sop, *one, sop, *two]
    assert found["target_ids"] == [-100] * sep + [*one, eop, *two, eop]
    assert found["candidate_ids"] == [-1] * sep + [0] * (len(one) + 1) + [1] * (len(two) + 1)
    assert found["position_ids"] == [[*range(sep), *[mask_at] * (len(one) + len(two) + 2)],
                                     [0] * sep + [b for a in answers for b in range(1, len(a) + 2)]]
    assert found["labels"] == 0 and found["causal_from"] == sep


# As the published code has them, piece by piece; each piece is tokenised alone
PASSAGE, QUESTION = "The cat sat on the mat.", " did the cat sit"
PREMISE, HYPOTHESIS = "It rained, so the street was wet.", "The street was wet"
ANSWER = ["The cat sat", ".", " Question:", " Who sat", "?"]
CHOICES = ['"', "the sun was rising", '" or "', "the grass was cut", '"?']
SHADOW = [" My body cast a shadow over the grass", " because", "M", "."]
MARKED = "Mark told Pete many lies about *himself*"
PUBLISHED = {
    "boolq": [*[[PASSAGE, " Question:", QUESTION, "? Answer:", "M", "."]] * 2,
              *[[PASSAGE, " Based on the previous passage,", QUESTION, "?", "M", "."]] * 2,
              *[["Based on the following passage", QUESTION, "?", "M", ".", f" {PASSAGE}"]] * 2],
    "rte": [['"', HYPOTHESIS, '" ?', "M", ",", ' "', PREMISE, '"'], [HYPOTHESIS, "?", "M", ",", f" {PREMISE}"],
            ['"', HYPOTHESIS, '" ?', "M", '. "', PREMISE, '"'], [HYPOTHESIS, "?", "M", ".", f" {PREMISE}"],
            [PREMISE, " question:", f" {HYPOTHESIS}", " True or False?", " answer:", "M"]],
    "cb": [['"', HYPOTHESIS, '" ?', "M", ",", ' "', "It rained.", '"'], [HYPOTHESIS, "?", "M", ",", " It rained."],
           ['"', HYPOTHESIS, '" ?', "M", '. "', "It rained.", '"'], [HYPOTHESIS, "?", "M", ".", " It rained."],
           ["It rained.", " question:", f" {HYPOTHESIS}.", " true, false or neither?", " answer:", "M"]],
    "wic": [['"the mat was soft." / "a soft voice"', ' Similar sense of "soft"?', "M", "."],
            ["the mat was soft.", " a soft voice", " Does soft have the same meaning in both sentences?", "M"],
            ["soft", " .", ' Sense (1) (a) "', "the mat was soft.", '"', " (", "M", ') "', "a soft voice", '"']],
    "multirc": [["The cat sat", ".", " Question:", " Who sat?", " Is it", " the cat", "?", "M", "."],
                [*ANSWER, ' Is the correct answer "', "the cat", '"?', "M", "."],
                ["The cat sat", ". Based on the previous passage,", " Who sat", "?",
                 ' Is "', "the cat", '" a correct answer?', "M", "."],
                ["The cat sat", " Who sat", "- [", "M", "]", "the cat"], [*ANSWER, " the cat", "?", "M", "."]],
    "copa": [[*CHOICES, *SHADOW], ["the sun was rising", " or", " the grass was cut", "?", *SHADOW]],
    "wsc": [[MARKED, " The pronoun '*himself*' refers to", "M", "."],
            [MARKED, " In the previous sentence, the pronoun '*himself*' refers to", "M", "."],
            [MARKED, " Question: In the passage above, what does the pronoun '*himself*' refer to?", " Answer:", "M", "."]],
    "record": [["Mark told Pete.", " Who told?", "M", " did."]],
}
WORDS = {"boolq": [[" No", " Yes"], [" false", " true"]] * 3,
         "rte": [[" Yes", " No"]] * 4 + [[" true", " false"]],
         "cb": [[" Yes", " No", " Maybe"]] * 4 + [[" true", " false", " neither"]],
         "wic": [[" No", " Yes"]] * 2 + [["2", "b"]], "multirc": [[" No", " Yes"]] * 3 + [[" False", " True"], [" No", " Yes"]]}


def test_there_are_the_published_patterns_and_no_others():
    assert {n: len(p) for n, p in PATTERNS.items()} == {n: len(p) for n, p in PUBLISHED.items()}
    for name, words in WORDS.items():
        assert [list(p.verbalizers.values()) for p in PATTERNS[name]] == words


@pytest.mark.parametrize(("name", "pattern_id"), [(n, i) for n, patterns in PUBLISHED.items() for i in range(len(patterns))])
def test_every_pattern_is_the_published_one_token_by_token(tokenizer, name, pattern_id):
    found = features(ROWS[name], find_pattern(name, pattern_id), tokenizer)
    context = found["input_ids"][:found["causal_from"]]
    assert context == whole(tokenizer, *PUBLISHED[name][pattern_id]), tokenizer.decode(context)


@pytest.mark.parametrize("name", [n for n in PATTERNS if n != "copa"])
def test_typographic_quotation_marks_become_plain_ones(tokenizer, name):
    typographic = "\u201cIt\u2019s a cat\u201d \u2013 so"
    plain = "\"It's a cat\" - so"
    column = find_pattern(name).columns[0]
    one, two = (cloze_rows([ROWS[name] | {column: text + " " + ROWS[name][column]} |
                            ({"span2_index": 12} if name == "wsc" else {})], find_pattern(name), tokenizer, 256)
                for text in (typographic, plain))
    assert one == two and len(one) == 1


def test_what_a_text_has_too_much_of_goes_from_the_end_of_its_longest_part(tokenizer):
    """Hypothesis and premise are two sides, and the longer one is cut, of equal ones the premise: the published rule."""
    row = {"premise": "the cat sat on the mat " * 3, "hypothesis": "the mat was soft " * 3, "label": 0}
    a, b = (ids(tokenizer, row[name]) for name in ("hypothesis", "premise"))
    full = features(row, find_pattern("rte"), tokenizer)["input_ids"]
    for max_length in range(len(full), len(full) - len(a) - len(b), -1):
        found = features(row, find_pattern("rte"), tokenizer, max_length)["input_ids"]
        assert found[:-1] == [tokenizer.cls_token_id, *ids(tokenizer, '"'), *a, *ids(tokenizer, '" ?', "M", ',', ' "'), *b,
                              *ids(tokenizer, '"'), tokenizer.eos_token_id] and len(found) == max_length
        (a if len(a) > len(b) else b).pop()


@pytest.mark.parametrize("spelled", ["[MASK]", "[CLS]", "<|endoftext|>", "<|startofpiece|>", " [gMASK]", "[SEP]"])
def test_a_special_token_that_a_text_spells_out_is_text(tokenizer, spelled):
    row = ROWS["copa"] | {"premise": f"My body {spelled} cast a shadow.", "choice1": f"The sun {spelled} rose."}
    found = features(row, find_pattern("copa"), tokenizer)
    n, special_ids = found["causal_from"], set(tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens))
    context = found["input_ids"][:n]
    assert [i for i in context if i in special_ids] == [tokenizer.cls_token_id, tokenizer.mask_token_id, tokenizer.eos_token_id]
    assert spelled in tokenizer.decode(context) and spelled in tokenizer.decode(found["target_ids"][n:])
    assert {i for i in found["target_ids"][n:] if i in special_ids} == {special(tokenizer, "endofpiece")}
    assert tokenizer.encode(spelled, add_special_tokens=False)[-1] in special_ids      # elsewhere the tokenizer is as it was


@pytest.mark.parametrize("max_length", [96, 64])
@pytest.mark.parametrize("name", PATTERNS)
def test_properties_of_every_pattern(tokenizer, name, max_length):
    row = {k: v * 4 if k in ("passage", "premise", "paragraph", "text") else v for k, v in ROWS[name].items()}
    if name == "wsc":
        row["text"] = ROWS["wsc"]["text"] + " and then he sat on the mat" * 4
    for pattern in PATTERNS[name]:
        (found,) = cloze_rows([row], pattern, tokenizer, max_length)
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
    found = features({"sentence1": "It rained.", "sentence2": "Was it wet", "label": "no"}, pattern, tokenizer)
    assert found["input_ids"][:-1] == whole(tokenizer, "It rained.", " Question:", " Was it wet", "? Answer:", "M", ".")
    assert found["labels"] == 1


def test_masked_language_models_get_an_ordinary_input_with_a_mask(bert_tokenizer):
    t = bert_tokenizer
    row = ROWS["rte"] | {"premise": "the cat [MASK] sat [SEP] on the mat.", "hypothesis": "The cat sat."}
    found = features(row, find_pattern("rte", 1), t)

    def words(text):
        return t.convert_tokens_to_ids(text.split())

    premise = words("the cat [ mask ] sat [ sep ] on the mat .")
    assert found["input_ids"] == [t.cls_token_id, *words("the cat sat ?"), t.mask_token_id, *words(","), *premise, t.sep_token_id]
    assert set(found) == {"input_ids", "mask_positions", "labels", "row"}
    assert found["input_ids"][found["mask_positions"]] == t.mask_token_id and found["labels"] == 0
    short = features(row, find_pattern("rte", 1), t, 12)
    assert len(short["input_ids"]) == 12 and short["input_ids"][short["mask_positions"]] == t.mask_token_id
    assert verbalizer_ids(find_pattern("rte"), t) == words("yes no")


def test_candidates_need_glm(bert_tokenizer):
    with pytest.raises(ConfigError, match="need GLM"):
        features(ROWS["copa"], find_pattern("copa"), bert_tokenizer)


@pytest.fixture(scope="module")
def bert_tokenizer(tmp_path_factory):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", "mask", "sep", "the", "cat", "sat", "on", "mat", "yes", "no",
             "?", ",", ".", '"']
    file = tmp_path_factory.mktemp("bert") / "vocab.txt"
    file.write_text("\n".join(words) + "\n")
    return transformers.BertTokenizer(str(file))


@pytest.mark.parametrize(("name", "change", "word"), [
    ("rte", {"label": "perhaps"}, "row 2: label 'perhaps'"),
    ("rte", {"premise": None}, "row 2"),
    ("wsc", {"candidates": []}, "row 2: a WSC row has no candidates"),
    ("record", {"query": "no marker"}, "row 2: the ReCoRD query"),
    ("record", {"entities": []}, "row 2: the column 'entities' is empty"),
    ("record", {"answers": ["Paul"]}, "row 2: the ReCoRD answer 'Paul'"),
    ("boolq", {"passage": " "}, "row 2: the column 'passage' is empty"),
    ("copa", {"label": 2}, "row 2: label 2"),
    ("copa", {"question": "why"}, "row 2: the question 'why'"),
    ("wsc", {"label": "perhaps"}, "row 2: label 'perhaps'"),
    ("wsc", {"target": {"span1_text": "Mark"}}, "row 2: a WSC row has span1_text"),
    ("wsc", {"text": "Mark told Pete"}, "row 2: the pronoun 'himself'"),
])
def test_bad_rows_are_named(tokenizer, name, change, word):
    row = {k: v for k, v in (ROWS[name] | change).items() if v is not None}
    with pytest.raises(DataError, match=word):
        cloze_rows([ROWS[name], row], find_pattern(name), tokenizer, 256)


def test_an_example_that_cannot_fit_is_refused(tokenizer):
    with pytest.raises(DataError, match="max_seq_length"):
        features(ROWS["copa"], find_pattern("copa"), tokenizer, 30)


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
    made = cloze_rows(rows, find_pattern("rte"), tokenizer, 256)
    assert len(made) == len(rows) and max(len(f["input_ids"]) for f in made) == 256
    assert [f["labels"] for f in made] == [("entailment", "not_entailment").index(row["label"]) for row in rows]
