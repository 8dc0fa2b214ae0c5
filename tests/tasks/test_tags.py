"""Sentences to features and back: labels at first sub-words, cuts that lose no word, roles, entity scores against seqeval."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from seqeval.metrics import classification_report
from seqeval.metrics.sequence_labeling import get_entities
from tokenizers.pre_tokenizers import ByteLevel

from ptv2_engine.errors import ConfigError, DataError, LabelError
from ptv2_engine.packing import IGNORE
from ptv2_engine.tasks.base import refuse_problems, settings_of, task_from
from ptv2_engine.tasks.data import Table, read_table
from ptv2_engine.tasks.tags import TagTask, spans

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not beside the checkout")
NAMES = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
TABLE = Table([{"words": ["Ann", "Lee", "left", "New-York", "."], "tags": ["B-PER", "I-PER", "O", "B-LOC", "O"]},
               {"words": ["No"], "tags": ["O"]}], "x")


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    """Letters and their continuations: words of many pieces, none of them unknown in ASCII text."""
    folder = tmp_path_factory.mktemp("wordpiece")
    letters = string.ascii_lowercase + string.digits
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters), *string.punctuation]
    (folder / "vocab.txt").write_text("\n".join([*vocabulary, "ann", "##ork", "left", "the"]))
    return transformers.BertTokenizerFast(str(folder / "vocab.txt"))


@pytest.fixture(scope="module")
def byte_level():
    """RoBERTa's kind: bytes, a blank before each word, no token types, and </s> for a separator."""
    blank = "\u0120"
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet()), blank + "l", blank + "A", "nn"]
    merges = [(blank, "l"), (blank, "A"), ("n", "n")]
    return transformers.RobertaTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, add_prefix_space=True)


@pytest.fixture(params=["wordpiece", "byte_level"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def task(**changes):
    return TagTask(**({"words_column": "words", "label_column": "tags", "names": NAMES} | changes))


def long_table(rng, sentences=6, most=120):
    def word():
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 6)))

    return Table([{"words": [word() for _ in range(n)], "tags": rng.choices(NAMES, k=n)}
                  for n in (rng.randint(1, most) for _ in range(sentences))], "long")


def check_pieces(table, features, tokenizer, max_length, names):
    """Every word has one first sub-word over the pieces of its row, with its label; pieces are whole words in order."""
    pieces = {}
    for feature in features:
        pieces.setdefault(feature["row"], []).append(feature)
    assert list(pieces) == list(range(len(table)))
    for index, row in enumerate(table.rows):
        labelled = []
        for feature in pieces[index]:
            assert len(feature["input_ids"]) == len(feature["labels"]) == len(feature["word_ids"]) <= max_length
            assert feature["input_ids"][0] == tokenizer.cls_token_id and feature["input_ids"][-1] == tokenizer.sep_token_id
            own = [(w, label) for w, label in zip(feature["word_ids"], feature["labels"], strict=True) if label != IGNORE]
            assert [w for w, _ in own] == sorted({w for w in feature["word_ids"] if w is not None})
            labelled += own
        assert [w for w, _ in labelled] == list(range(len(row["words"])))
        assert [names[label] for _, label in labelled] == row["tags"]


def test_features_are_the_tokenizers_own(tokenizer):
    features = task().features(TABLE, tokenizer, 64)
    for row, feature in zip(TABLE.rows, features, strict=True):
        encoded = tokenizer(row["words"], is_split_into_words=True)
        assert {k: v for k, v in encoded.items() if k != "attention_mask"} == {
            k: feature[k] for k in encoded if k != "attention_mask"}
        assert feature["word_ids"] == encoded.word_ids()
        expected, before = [], None
        for word in encoded.word_ids():
            expected.append(IGNORE if word is None or word == before else NAMES.index(row["tags"][word]))
            before = word
        assert feature["labels"] == expected and feature["row"] == TABLE.rows.index(row)
    assert len(features[0]["input_ids"]) > len(TABLE.rows[0]["words"]) + 2                  # some words have several pieces


def test_without_labels(tokenizer):
    bare = Table([{"words": row["words"]} for row in TABLE.rows], "x")
    features = task().features(bare, tokenizer, 64, labelled=False)
    assert not any("labels" in f for f in features)
    assert [f["input_ids"] for f in features] == [f["input_ids"] for f in task().features(TABLE, tokenizer, 64)]
    with pytest.raises(DataError, match="has no column 'tags'"):
        task().features(bare, tokenizer, 64)


@pytest.mark.parametrize("max_length", [3, 4, 9, 16, 64])
def test_cutting_loses_no_word(max_length, tokenizer):
    rng = random.Random(max_length)
    table = long_table(rng)
    features = task().features(table, tokenizer, max_length)
    check_pieces(table, features, tokenizer, max_length, NAMES)
    if max_length == 64:                                           # a piece behind a cut sees words before its own
        behind = [f for f, g in zip(features[1:], features, strict=False) if f["row"] == g["row"]]
        assert behind and all(f["word_ids"][1] is None for f in behind)


def test_labels_are_cut_with_the_inputs(wordpiece):
    """The published code cuts the inputs at 512 tokens and not the labels, so that a longer sentence breaks training."""
    table = Table([{"words": ["left"] * 800, "tags": ["B-LOC", "I-LOC"] * 400}], "x")
    features = task().features(table, wordpiece, 512)
    assert [len(f["labels"]) for f in features] == [len(f["input_ids"]) for f in features] == [512, 2 + 290 + 127]
    check_pieces(table, features, wordpiece, 512, NAMES)


def test_a_word_longer_than_a_piece_keeps_its_beginning(tokenizer):
    word = "q" * 50
    table = Table([{"words": ["Ann", word, "left"], "tags": ["B-PER", "I-PER", "O"]}], "x")
    features = task().features(table, tokenizer, 10)
    check_pieces(table, features, tokenizer, 10, NAMES)
    piece = next(f for f in features if 1 in f["word_ids"])
    assert piece["input_ids"][1:-1] == tokenizer([word], is_split_into_words=True, add_special_tokens=False)["input_ids"][:8]


def test_a_word_that_the_tokenizer_drops_keeps_its_label(wordpiece):
    table = Table([{"words": ["left", "\u200b", "left"], "tags": ["O", "B-LOC", "O"]}], "x")
    assert wordpiece.tokenize("\u200b") == []
    feature = task().features(table, wordpiece, 16)[0]
    assert feature["labels"] == [IGNORE, 0, 1, 0, IGNORE] and feature["input_ids"][2] == wordpiece.unk_token_id


def test_a_tokenizer_in_python_gives_the_same(wordpiece):
    class Slow:
        is_fast = False

        def __getattr__(self, name):
            return getattr(wordpiece, name)

        def __call__(self, *args, **kwargs):
            return dict(wordpiece(*args, **kwargs))

    assert task().features(TABLE, Slow(), 9) == task().features(TABLE, wordpiece, 9)


@needs_data
@pytest.mark.parametrize("file", ["conll2003/test.txt", "conll04/dev.txt"])
def test_no_word_of_a_real_file_is_lost_and_gold_scores_one(file, wordpiece):
    table = read_table(SHARED / file)
    tags = TagTask.infer(table, "words", "tags")
    assert len(tags.names) == 9
    features = tags.features(table, wordpiece, 16)
    check_pieces(table, features, wordpiece, 16, tags.names)
    assert len(features) > 2 * len(table)
    classes = np.full((len(features), 16), 3)
    for row, feature in zip(classes, features, strict=True):
        labels = np.array(feature["labels"])
        row[:len(labels)] = np.where(labels == IGNORE, 3, labels)
    found = tags.metrics(table, features)(SimpleNamespace(predictions=np.eye(9)[classes]))
    assert found == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "accuracy": 1.0}


ROLES = Table([{"words": ["The", "cat", "that", "slept", "ran"], "predicate": 3, "tags": ["B-A0", "I-A0", "B-R-A0", "B-V", "O"]},
               {"words": ["Ann", "ran"], "predicate": "ran", "tags": ["B-A0", "B-V"]},
               {"words": ["Ann", "ran"], "predicate": "1", "tags": ["B-A0", "B-V"]}], "roles")


def test_roles_are_asked_for_with_the_predicate(wordpiece, byte_level):
    roles = TagTask.infer(ROLES, "words", "tags", "predicate")
    assert roles.names == ["O", "B-A0", "I-A0", "B-R-A0", "B-V"]
    features = roles.features(ROLES, wordpiece, 64)
    for feature, words, verb in zip(features, [row["words"] for row in ROLES.rows], ["slept", "ran", "ran"], strict=True):
        as_published = wordpiece([*words, "[SEP]", verb], is_split_into_words=True)
        assert feature["input_ids"] == as_published["input_ids"] and feature["token_type_ids"] == as_published["token_type_ids"]
        assert [w for w in feature["word_ids"] if w is not None] == [
            w for w in as_published.word_ids() if w is not None and w < len(words)]
        behind = as_published.word_ids().index(len(words))
        assert set(feature["labels"][behind:]) == {IGNORE} and len(feature["labels"]) == len(feature["input_ids"])
    # the published code writes "[SEP]" for RoBERTa too, whose separator it is not: four characters of text
    feature = roles.features(ROLES, byte_level, 64)[1]
    assert feature["input_ids"].count(byte_level.sep_token_id) == 2
    assert "[" not in byte_level.decode(feature["input_ids"]) and byte_level.decode(feature["input_ids"]).endswith("</s> ran</s>")


def test_every_piece_has_the_predicate(tokenizer):
    rng = random.Random(3)
    table = long_table(rng)
    for row in table.rows:
        row["predicate"] = rng.randrange(len(row["words"]))
    features = task(predicate_column="predicate").features(table, tokenizer, 24)
    check_pieces(table, features, tokenizer, 24, NAMES)
    for feature in features:
        row = table.rows[feature["row"]]
        verb = tokenizer([row["words"][row["predicate"]]], is_split_into_words=True, add_special_tokens=False)["input_ids"]
        assert feature["input_ids"][-len(verb) - 2:-1] == [tokenizer.sep_token_id, *verb]
    long = Table([{"words": ["Ann", "z" * 60], "predicate": 1, "tags": ["O", "B-LOC"]}], "x")
    check_pieces(long, task(predicate_column="predicate").features(long, tokenizer, 12), tokenizer, 12, NAMES)


def logits_of(features, rng, width, names=NAMES, padding=-100.0):
    """Random class scores in the shape a Trainer gathers: [N, width, C], padded."""
    scores = np.full((len(features), width, len(names)), padding)
    for row, feature in zip(scores, features, strict=True):
        row[:len(feature["input_ids"])] = rng.normal(size=(len(feature["input_ids"]), len(names)))
    return scores


def test_scores_are_seqevals_over_whole_sentences(wordpiece):
    table = long_table(random.Random(7), sentences=12)
    features = task().features(table, wordpiece, 16)
    scores = logits_of(features, np.random.default_rng(0), 16)
    guesses = [[] for _ in table.rows]
    for feature, row in zip(features, scores, strict=True):
        guesses[feature["row"]] += [NAMES[row[i].argmax()] for i, label in enumerate(feature["labels"]) if label != IGNORE]
    truth = [row["tags"] for row in table.rows]
    report = classification_report(truth, guesses, output_dict=True, zero_division=0)["micro avg"]
    found = task().metrics(table, features)(SimpleNamespace(predictions=(scores, None)))
    assert found == pytest.approx({"precision": report["precision"], "recall": report["recall"], "f1": report["f1-score"],
                                   "accuracy": np.mean([t == g for ts, gs in zip(truth, guesses, strict=True)
                                                        for t, g in zip(ts, gs, strict=True)])})
    # a span that a cut goes through counts once: piece by piece there would be more of them
    by_piece = sum(len(get_entities([NAMES[label] for label in f["labels"] if label != IGNORE])) for f in features)
    assert by_piece > report["support"] == sum(len(get_entities(tags)) for tags in truth)


def test_answers_are_for_people(tokenizer):
    features = task().features(TABLE, tokenizer, 10, labelled=False)
    gold = task().features(TABLE, tokenizer, 10)
    assert len(features) > len(TABLE)
    logits = [np.eye(5)[[max(label, 0) for label in feature["labels"]]] for feature in gold]
    first, second = task().answers(TABLE, features, logits)
    assert first["prediction"] == ["B-PER", "I-PER", "O", "B-LOC", "O"] and second == {"prediction": ["O"], "entities": []}
    assert [tuple(e.values()) for e in first["entities"]] == [("PER", "Ann Lee", 0, 2), ("LOC", "New-York", 3, 4)]
    with pytest.raises(AssertionError, match="no prediction"):
        task().answers(TABLE, features[:-1], logits[:-1])
    roles = task(names=["O", "B-A0", "B-V"], predicate_column="predicate")
    table = Table([{"words": ["Ann", "ran"], "predicate": 1}], "x")
    feature = roles.features(table, tokenizer, 16, labelled=False)
    answer = roles.answers(table, feature, [np.tile([0.0, 1.0, 0.0], (len(feature[0]["input_ids"]), 1))])[0]
    assert answer["prediction"] == ["B-A0", "B-A0"] and [e["text"] for e in answer["entities"]] == ["Ann", "ran"]


def test_show_says_the_labels_in_words(wordpiece):
    features = task().features(TABLE, wordpiece, 64)
    text, labels = task().show(TABLE, features, wordpiece, 0).split("  ->  ")
    assert text.startswith("[CLS] ann") and labels == "Ann=B-PER Lee=I-PER left=O New-York=B-LOC .=O"


@pytest.mark.parametrize("prefixes", ["BI", "I", "BIES"])
def test_spans_are_seqevals(prefixes):
    rng = random.Random(prefixes)
    tags = ["O"] * 2 + [f"{p}-{kind}" for p in prefixes for kind in ("X", "R-A0")]
    for _ in range(300):
        sentence = rng.choices(tags, k=rng.randint(0, 8))
        assert spans(sentence) == [(kind, first, last + 1) for kind, first, last in get_entities(sentence)]


@pytest.mark.parametrize("tags", [["B-X", "I-X", "L-X", "B-X", "L-X", "U-X", "U-X", "O"],
                                  ["B-X", "M-X", "E-X", "B-X", "E-X", "S-X", "S-X", "O"]])
def test_other_names_of_the_same_scheme(tags):
    assert spans(tags) == [("X", 0, 3), ("X", 3, 5), ("X", 5, 6), ("X", 6, 7)]
    table = Table([{"words": list("abcdefgh"), "tags": tags}], "x")
    other = TagTask.infer(table, "words", "tags")
    feature = {"row": 0, "input_ids": list(range(8)), "word_ids": list(range(8))}
    wrong = [*tags[:-2], "O", "O"]                                       # one span of four is missed
    scores = np.eye(len(other.names))[[[other.names.index(t) for t in wrong]]]
    found = other.metrics(table, [feature])(SimpleNamespace(predictions=scores))
    assert (found["precision"], found["recall"]) == (1.0, 0.75)


def test_word_classes_have_an_accuracy_only(wordpiece):
    table = Table([{"words": ["the", "cat"], "tags": ["DET", "NOUN"]}], "x")
    words = TagTask.infer(table, "words", "tags")
    features = words.features(table, wordpiece, 16)
    assert words.best == "accuracy" and task().best == "f1" and not list(words.problems(table))
    scores = np.eye(2)[[[0] * len(features[0]["input_ids"])]]
    assert words.metrics(table, features)(SimpleNamespace(predictions=scores)) == {"accuracy": 0.5}
    assert "entities" not in words.answers(table, features, scores)[0]


def test_settings_make_the_same_task():
    for made in (task(), TagTask.infer(ROLES, "words", "tags", "predicate")):
        again = task_from(json.loads(json.dumps(settings_of(made))))
        assert isinstance(again, TagTask) and vars(again) == vars(made)
    assert task().model_options(None) == {"num_labels": 5, "id2label": dict(enumerate(NAMES))}
    assert (TagTask.kind, TagTask.model_task, TagTask.epoch_decay) == ("tags", "token-classification", 0.95)


def test_names_come_from_the_training_table():
    assert TagTask.infer(TABLE, "words", "tags").names == ["O", "B-LOC", "B-PER", "I-PER"]
    with pytest.raises(DataError, match="row 2 has 'O' as 'tags', but a list"):
        TagTask.infer(Table([{"words": ["a"], "tags": ["O"]}, {"words": ["a"], "tags": "O"}], "x"), "words", "tags")


def test_problems_are_reported_by_row():
    table = Table([{"words": ["a", "b"], "tags": ["O", "B-LOC"]},
                   {"words": ["a", "b"], "tags": ["O"]},
                   {"words": [], "tags": []},
                   {"words": ["a", " "], "tags": ["O", "O"]},
                   {"words": ["a", "b"], "tags": ["I-LOC", "B-ORG"]},
                   {"words": "a b", "tags": ["O", "O"]},
                   {"words": ["a"], "tags": None}], "x")
    found = list(task().problems(table))
    assert [row for row, _ in found] == [2, 3, 4, 5, 6, 7]
    for (_, what), words in zip(found, ["2 words but 1 tags", "is [], but", "word 2 of 2 is empty", "tag 'B-ORG' is not one",
                                        "is 'a b', but a list", "'tags' is None"], strict=True):
        assert words in what
    assert [row for row, _ in task().problems(table, labelled=False)] == [3, 4, 6]
    with pytest.raises(DataError, match="x: row 2: 2 words but 1 tags; row 3: .*; and 1 more"):
        refuse_problems(task(), table)
    assert list(task(names=[*NAMES, "LOC"]).problems(Table([{"words": ["a"], "tags": ["LOC"]}], "x")))[0][1].startswith(
        "tag 'LOC' is not 'O' or a prefix and a type")
    outside = Table([{"words": ["a"], "tags": ["O"]}] * 3, "x")
    said = "all 3 sentences are tagged 'O' throughout, so there is nothing to find"
    assert list(task().training_problems(outside)) == [(0, said)]
    assert not list(task().problems(outside))            # a validation file may well hold no entity


@pytest.mark.parametrize("predicate", [2, -1, "fly", None, True])
def test_predicates_that_are_not_there(predicate, wordpiece):
    table = Table([{"words": ["Ann", "ran"], "predicate": 1, "tags": ["O", "O"]},
                   {"words": ["Ann", "ran"], "predicate": predicate, "tags": ["O", "B-LOC"]}], "x")
    roles = task(predicate_column="predicate")
    message = f"predicate {predicate!r} is neither one of the 2 words nor the index of one"
    assert [(row, what.startswith(message)) for row, what in roles.problems(table)] == [(2, True)]
    with pytest.raises(DataError, match=f"x: row 2: {message}"):
        roles.features(table, wordpiece, 16)


@pytest.mark.parametrize(
    "row, error, message",
    [
        ({"words": ["a", "b"], "tags": ["O"]}, DataError, "x: row 2 has 2 words but 1 tags"),
        ({"words": ["a"], "tags": ["B-ORG"]}, LabelError, r"x: row 2: tag 'B-ORG' is not one of the 5 known \(O, B-LOC"),
        ({"words": [], "tags": []}, DataError, "x: row 2 has"),
        ({"words": "abc", "tags": ["O"] * 3}, DataError, "x: row 2 has 'abc' as 'words', but a list"),
        ({"words": ["a"]}, DataError, "row 2 has no 'tags'"),
    ],
)
def test_features_name_the_row(row, error, message, wordpiece):
    with pytest.raises(error, match=message):
        task().features(Table([TABLE.rows[0], row], "x"), wordpiece, 16)


def test_no_room_for_a_word(wordpiece):
    with pytest.raises(ConfigError, match="max_length 2 leaves no room"):
        task().features(TABLE, wordpiece, 2)
    with pytest.raises(ConfigError, match="max_length 4 leaves no room"):
        task(predicate_column="predicate").features(Table([TABLE.rows[0] | {"predicate": 1}], "x"), wordpiece, 4)
