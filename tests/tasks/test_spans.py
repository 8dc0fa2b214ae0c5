"""Windows and their labels, the search for the best span, and bad rows, each against a plain computation."""

from __future__ import annotations

import collections
from types import SimpleNamespace

import numpy as np
import pytest

from ptv2_engine.errors import ConfigError, DataError, InputError
from ptv2_engine.tasks.base import as_features, settings_of, task_from
from ptv2_engine.tasks.data import Table
from ptv2_engine.tasks.span_search import search, windows_of
from ptv2_engine.tasks.spans import SpanTask, token_span
from ptv2_engine.tasks.squad_metrics import squad_scores

CONTEXT = ("The tower was built by Gustave Eiffel for the fair of 1889 . It was to stand for twenty years , but the army "
           "found a use for its height , and so the tower still stands in Paris")


@pytest.fixture(scope="module")
def words():
    """A fast tokenizer of whole words (and single letters of unknown ones), with BERT's special tokens and segment ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(f"{CONTEXT} Who When Where built it ? word".split())]
    vocabulary += [f"{p}{c}" for p in ("", "##") for c in "abcdefghijklmnopqrstuvwxyz0123456789" if f"{p}{c}" not in vocabulary]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                                                             special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                   sep_token="[SEP]", model_input_names=["input_ids", "token_type_ids", "attention_mask"])


@pytest.fixture(scope="module")
def letters():
    """Byte-level BPE without merges, with RoBERTa's special tokens: a letter outside ASCII is several tokens with one offset."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", pad_token="<pad>",
                                   unk_token="<unk>", model_input_names=["input_ids", "attention_mask"])


def table(*answers, context=CONTEXT, question="Who built it ?"):
    return Table([{"id": str(i), "question": question, "context": context,
                   "answers": {"text": [a] if a else [], "answer_start": [context.index(a)] if a else []}}
                  for i, a in enumerate(answers)], "made.json")


def test_one_window_holds_question_context_and_answer(words):
    [feature] = SpanTask().features(table("Gustave Eiffel"), words, 64)
    tokens = words.convert_ids_to_tokens(feature["input_ids"])
    assert tokens == ["[CLS]", "Who", "built", "it", "?", "[SEP]", *CONTEXT.split(), "[SEP]"]
    assert tokens[feature["start_positions"]:feature["end_positions"] + 1] == ["Gustave", "Eiffel"]
    assert feature["token_type_ids"] == [0] * 6 + [1] * (len(tokens) - 6)
    assert [None if o is None else CONTEXT[slice(*o)] for o in feature["offsets"]] == [None] * 6 + CONTEXT.split() + [None]
    assert set(as_features([feature])[0]) == {"input_ids", "token_type_ids", "start_positions", "end_positions"}


def test_what_training_evaluation_and_prediction_get(words):
    task, rows = SpanTask(), table("1889", "Paris")
    ids, labels = {"input_ids", "token_type_ids", "row"}, {"start_positions", "end_positions"}
    assert set(task.features(rows, words, 64, training=True)[0]) == ids | labels
    assert set(task.features(rows, words, 64)[0]) == ids | labels | {"offsets"}
    bare = Table([{k: v for k, v in r.items() if k != "answers"} for r in rows.rows], "x")
    assert set(task.features(bare, words, 64, labelled=False)[0]) == ids | {"offsets"}


@pytest.mark.parametrize("max_length, stride, shared", [(24, 8, 8), (24, 5, 5), (24, 0, 0), (24, 128, 8), (9, 128, 1),
                                                        (8, 128, 0)])
def test_windows_cover_the_context_and_share_what_fits(words, max_length, stride, shared):
    """Question and special tokens are 7: room for the context is max_length - 7, of which at most half is shared."""
    context = " ".join(f"word {'tower' if i % 3 else 'stands'}" for i in range(60))
    features = SpanTask(doc_stride=stride).features(table("word", context=context), words, max_length)
    windows = [[o for o in f["offsets"] if o is not None] for f in features]
    assert all(len(f["input_ids"]) <= max_length for f in features)
    assert all(before[len(before) - shared:] == after[:shared] for before, after in zip(windows[:-1], windows[1:], strict=True))
    fresh = windows[0] + [o for after in windows[1:] for o in after[shared:]]
    assert [context[slice(*o)] for o in fresh] == context.split()


def test_a_question_that_leaves_no_room(words):
    rows = table("Paris", "Paris")
    rows.rows[1]["question"] = "Who " * 30
    with pytest.raises(DataError, match="made.json, row 2: the question has 30 tokens and with 3 special ones leaves none of 33"):
        SpanTask().features(rows, words, 33)
    assert SpanTask().features(rows, words, 34)


def test_leading_blanks_of_a_question_are_left_out_and_no_others(letters):
    """As published; a byte-level tokenizer would make tokens of them."""
    features = SpanTask().features(table("Paris", question="  Who  \u00e9? "), letters, 400)
    assert letters.decode(features[0]["input_ids"]).startswith("<s>Who  \u00e9? </s></s>The tower")


def published_labels(offsets, padded_to, answer):
    """The original's loops: they walk over the end of the context into padding, whose offsets are (0, 0)."""
    offsets = [o or (0, 0) for o in offsets] + [(0, 0)] * (padded_to - len(offsets))
    inside = [i for i, o in enumerate(offsets) if o != (0, 0)]
    first, last = inside[0], inside[-1]
    if not (offsets[first][0] <= answer[0] and offsets[last][1] >= answer[1]):
        return 0, 0
    while first < len(offsets) and offsets[first][0] <= answer[0]:
        first += 1
    while offsets[last][1] >= answer[1]:
        last -= 1
    return first - 1, last + 1


def test_labels_are_the_published_ones_where_those_are_right(words):
    tokens = CONTEXT.split()
    spans = [(i, j) for i in range(len(tokens)) for j in range(i, min(i + 6, len(tokens)))]
    answers = [" ".join(tokens[i:j + 1]) for i, j in spans]
    starts = [len(" ".join(tokens[:i])) + (i > 0) for i, _ in spans]
    rows = Table([{"question": "Who ?", "context": CONTEXT, "answers": {"text": [a], "answer_start": [s]}}
                  for a, s in zip(answers, starts, strict=True)], "x")
    wrong = 0
    for feature in SpanTask(doc_stride=4).features(rows, words, 20):
        answer, start = answers[feature["row"]], starts[feature["row"]]
        found, offsets = (feature["start_positions"], feature["end_positions"]), feature["offsets"]
        inside = [o for o in offsets if o is not None]
        if start == inside[-1][0]:                  # it starts in the last token: the original labels padding, 31
            assert published_labels(offsets, 32, (start, start + len(answer)))[0] == (31 if len(answer.split()) == 1 else 0)
            wrong += len(answer.split()) == 1
        else:
            assert found == published_labels(offsets, 32, (start, start + len(answer)))
        whole = inside[0][0] <= start and start + len(answer) <= inside[-1][1]
        assert found[0] == 0 if not whole else CONTEXT[offsets[found[0]][0]:offsets[found[1]][1]] == answer
    assert wrong >= 4


def test_a_letter_of_several_tokens_is_wholly_labelled(letters):
    context = "in \u5317\u4eac, yes"
    [feature] = SpanTask().features(table("\u5317", context=context, question="where"), letters, 64)
    first, last = feature["start_positions"], feature["end_positions"]
    assert last - first == 2 and letters.decode(feature["input_ids"][first:last + 1]) == "\u5317"
    assert published_labels(feature["offsets"], 64, (3, 4)) == (last, first)             # back to front: cannot be learned
    assert "token_type_ids" not in feature and SpanTask().show(table("\u5317", context=context), [feature], letters, 0).endswith(
        "->  \u5317")


@pytest.mark.parametrize("span, expected", [(None, (0, 0)), ((0, 3), (1, 1)), ((1, 2), (1, 1)), ((3, 7), (2, 2)),
                                            ((2, 9), (1, 3)), ((8, 12), (0, 0)), ((3, 4), (0, 0))])
def test_spans_that_are_not_whole_tokens(span, expected):
    """Inside a word: the word. Outer blanks belong to no token; a blank alone, or what goes on, is not in the window."""
    assert token_span([None, (0, 3), (4, 7), (8, 11), None], span) == expected


def plain_search(example_windows, contexts, v2, n_best, max_length, threshold):
    """The published post-processing, loop by loop, but for the word "empty", its answer where it finds none."""
    answers = []
    for context, windows in zip(contexts, example_windows, strict=True):
        null, candidates = None, []
        for start_logits, end_logits, offsets in windows:
            if null is None or null > start_logits[0] + end_logits[0]:
                null = start_logits[0] + end_logits[0]
            for s in np.argsort(start_logits)[-1:-n_best - 1:-1].tolist():
                for e in np.argsort(end_logits)[-1:-n_best - 1:-1].tolist():
                    if s >= len(offsets) or e >= len(offsets) or offsets[s] is None or offsets[e] is None:
                        continue
                    if e < s or e - s + 1 > max_length:
                        continue
                    candidates.append((start_logits[s] + end_logits[e], context[offsets[s][0]:offsets[e][1]]))
        best = sorted(candidates, key=lambda c: c[0], reverse=True)[:n_best]
        margin = (0.0 if null is None else float(null)) - (float(best[0][0]) if best else 0.0)
        answers.append(("" if not best or (v2 and margin > threshold) else best[0][1], [float(c[0]) for c in best], margin))
    return answers


def random_windows(seed, rows=40):
    """(table, features, logits padded with -100): contexts of made up words, in windows of which some are tiny."""
    rng = np.random.default_rng(seed)
    features, questions = [], []
    for row in range(rows):
        tokens = [str(n) for n in rng.integers(0, 10 ** 6, rng.integers(1, 90))]
        context, ends = " ".join(tokens), np.cumsum([len(t) + 1 for t in tokens]) - 1
        places = [(int(end) - len(token), int(end)) for token, end in zip(tokens, ends, strict=True)]
        for first in range(0, len(tokens), 25):
            inside = places[first:first + 40]
            offsets = [None] * int(rng.integers(3, 9)) + inside + [None]
            features.append({"input_ids": [0] * len(offsets), "offsets": offsets, "row": row})
        questions.append({"id": f"q{row}", "question": "?", "context": context, "answers": {
            "text": [tokens[0]] if row % 3 else [], "answer_start": [0] if row % 3 else []}})
    longest = max(len(f["offsets"]) for f in features)
    logits = rng.normal(size=(2, len(features), longest)).astype(np.float32)
    for i, feature in enumerate(features):
        logits[:, i, 0] += 3                      # no answer wins about every other time
        if feature["row"] % 2 and feature["offsets"][-2][0] < 300:
            logits[:, i, feature["offsets"].index(next(o for o in feature["offsets"] if o is not None))] += 5
        logits[:, i, len(feature["offsets"]):] = -100
    return Table(questions, "random"), features, logits


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("n_best, max_length, threshold", [(20, 30, 0.0), (5, 4, 1.5), (1, 3, -1.0), (200, 1, 0.25)])
def test_search_equals_plain_loops(v2, n_best, max_length, threshold):
    rows, features, (starts, ends) = random_windows(n_best)
    windows = collections.defaultdict(list)
    for feature, start, end in zip(features, starts, ends, strict=True):
        windows[feature["row"]].append((start, end, feature["offsets"]))
    expected = plain_search([windows[r] for r in range(len(rows))], rows.column("context"), v2, n_best, max_length, threshold)
    task = SpanTask(unanswerable=v2, n_best_size=n_best, max_answer_length=max_length, null_threshold=threshold)
    lengths = [len(f["offsets"]) for f in features]
    found = task.answers(rows, features, [(s[:n], e[:n]) for s, e, n in zip(starts, ends, lengths, strict=True)])
    assert [f["prediction"] for f in found] == [text for text, _, _ in expected]
    assert [f["score"] for f in found] == pytest.approx([scores[0] if scores else 0.0 for _, scores, _ in expected])
    if v2:
        assert [f["null_score_diff"] for f in found] == pytest.approx([margin for _, _, margin in expected])
        assert 0 < sum(f["prediction"] == "" for f in found) < len(found)
    kept = search(windows_of(features), starts, ends, len(rows), n_best, max_length)
    assert [k.scores for k in kept] == [pytest.approx(scores) for _, scores, _ in expected]


def test_metrics_of_padded_logits_are_the_scores_of_the_answers():
    rows, features, (starts, ends) = random_windows(7)
    prediction = SimpleNamespace(predictions=(starts, ends), label_ids=None)
    golds = [r["answers"]["text"] for r in rows.rows]
    pairs = list(zip(starts, ends, strict=True))
    two = SpanTask(unanswerable=True, null_threshold=0.5)
    found = two.metrics(rows, features)(prediction)
    answers = two.answers(rows, features, pairs)
    plain = squad_scores(golds, [a["prediction"] for a in answers], unanswerable=True)
    assert {k: v for k, v in found.items() if not k.startswith("best")} == pytest.approx(plain)
    again = SpanTask(unanswerable=True, null_threshold=found["best_f1_thresh"]).metrics(rows, features)(prediction)
    assert again["f1"] == pytest.approx(found["best_f1"]) and found["best_f1"] > found["f1"]
    kept = [r for r in range(len(rows)) if golds[r]]
    one = [{**f, "row": kept.index(f["row"])} for f in features if f["row"] in kept]
    where = [i for i, f in enumerate(features) if f["row"] in kept]
    found = SpanTask().metrics(Table([rows.rows[r] for r in kept], "x"), one)(
        SimpleNamespace(predictions=(starts[where], ends[where])))
    best = SpanTask().answers(rows, features, pairs)
    assert found == pytest.approx(squad_scores([golds[r] for r in kept], [best[r]["prediction"] for r in kept]))
    assert set(found) == {"exact_match", "f1"}             # the prefix, eval_ or test_, is the Trainer's to add, once


def test_probability_is_the_softmax_over_what_was_kept():
    features = [{"offsets": [None, (0, 1), (2, 3)], "row": 0, "input_ids": [0, 0, 0]}]
    rows = Table([{"question": "?", "context": "a b"}], "x")
    logits = [(np.array([1.0, 2.0, -1.0]), np.array([0.5, 0.0, 1.0]))]
    scores = np.exp([2.0 + 0.0, 2.0 + 1.0, -1.0 + 1.0])
    [one] = SpanTask().answers(rows, features, logits)
    share = pytest.approx(scores[1] / scores.sum())
    assert one == {"prediction": "a b", "score": 3.0, "probability": share}
    [two] = SpanTask(unanswerable=True, null_threshold=-2.0).answers(rows, features, logits)
    null = np.exp(1.5)
    assert two["prediction"] == "" and two["null_score_diff"] == -1.5 and two["score"] == 3.0
    assert two["probability"] == pytest.approx(null / (null + scores.sum()))


def test_nothing_found_is_no_answer():
    """The published search then answers with the word "empty"."""
    rows = Table([{"question": "?", "context": ""}, {"question": "?", "context": "a"}], "x")
    features = [{"offsets": [None, None], "row": 0, "input_ids": [0, 0]}]
    for v2 in (False, True):
        found = SpanTask(unanswerable=v2).answers(rows, features, [(np.ones(2), np.ones(2))])
        assert [f["prediction"] for f in found] == ["", ""] and all(np.isfinite(f["score"]) for f in found)
    with pytest.raises(InputError, match="2 start and 2 end logits were given for 1 windows"):
        SpanTask().metrics(table("Paris"), features)(SimpleNamespace(predictions=(np.ones((2, 2)), np.ones((2, 2)))))
    with pytest.raises(InputError, match="row 1 has logits of 1 tokens for a window of 2"):
        SpanTask().answers(rows, features, [(np.ones(1), np.ones(1))])


def test_settings_make_an_equal_task():
    task = SpanTask(context_column="passage", unanswerable=True, null_threshold=-1.25, doc_stride=64)
    assert task_from(settings_of(task)) == task != SpanTask()
    assert (task.best, task.epoch_decay, task.model_task, task.model_options(None)) == (
        "f1", 0.95, "question-answering", {"num_labels": 2})
    with pytest.raises(ConfigError, match="--n_best_size 0 is below 1"):
        SpanTask(n_best_size=0)


def row(context="Cr\u00eape is \U0001f600 nice, said Rene.", question="what", text="nice", start=11, **more):
    return {"question": question, "context": context, "answers": {"text": [text], "answer_start": [start]}} | more


@pytest.mark.parametrize(
    "bad, what",
    [
        (row(), None),
        (row(question=" "), "the question is empty"),
        (row(question=None), "the question is empty"),
        (row(question=3), "the question is 3, not a text"),
        (row(context=""), "the context is empty"),
        (row(start=9), "the answer 'nice' is not at answer_start 9, where '\U0001f600 ni' stands (but at 11)"),
        (row(start=15), "the answer 'nice' is not at answer_start 15, where ', sa' stands (it is, if UTF-8 units are counted; "
                        "count characters)"),
        (row(start=12), "the answer 'nice' is not at answer_start 12, where 'ice,' stands (it is, if UTF-16 units are counted; "
                        "count characters)"),
        (row(start=400), "the answer 'nice' at answer_start 400 is outside its context of 27 characters (but at 11)"),
        (row(text="bad", start=-1), "the answer 'bad' is not in its context"),
        (row(text="rene", start=-1), "the answer 'rene' is not in its context (but 'Rene' is, at 22)"),
        (row(text="Cr\u00c3\u00aape", start=0), "the answer 'Cr\u00c3\u00aape' is not at answer_start 0, where 'Cr\u00eape ' "
                                                "stands (but is, read in another encoding; read the file as UTF-8)"),
        (row(text=" ", start=5), "an answer is an empty text"),
        (row(answers={"text": [], "answer_start": []}), "there is no answer, but every question of this task has one; leave the "
                                                        "row out, or train as for squad_v2"),
        (row(answers="nice"), "the answers are 'nice', but {\"text\": [...], \"answer_start\": [...]} of texts and as many whole "
                              "numbers is expected"),
        (row(answers={"text": ["a", "b"], "answer_start": [1]}), "the answers are \"{'text': ['a', 'b'], 'answer_start': [1]}\", "
         "but {\"text\": [...], \"answer_start\": [...]} of texts and as many whole numbers is expected"),
    ],
)
def test_bad_rows_are_reported_by_number(words, bad, what):
    rows = Table([row(), bad, row()], "made")
    assert list(SpanTask().problems(rows)) == ([] if what is None else [(2, what)])
    if what is not None and what.startswith("the answer"):
        with pytest.raises(DataError, match="made, row 2: the answer"):
            SpanTask().features(rows, words, 64)


def test_problems_of_a_whole_file():
    assert list(SpanTask().problems(Table([{"question": "a", "text": "b"}], "x"))) == [
        (0, "there is no column 'context' and no column 'answers'; the file has 'question', 'text'")]
    assert list(SpanTask().problems(Table([{"question": "a", "context": "b"}], "x"), labelled=False)) == []
    empty = row(answers={"text": [], "answer_start": []})
    assert list(SpanTask(unanswerable=True).problems(Table([empty, row(answers=None)], "x"))) == []
    assert len(list(SpanTask().problems(Table([row(answers={"text": ["nice", "bad", "nice", "nice"],
                                                            "answer_start": [11, 3, 11, 12]})], "x")))) == 2


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ConfigError, match="SimpleNamespace does not say where its tokens stand"):
        SpanTask().features(table("Paris"), SimpleNamespace(is_fast=False), 64)
