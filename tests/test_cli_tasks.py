"""Every kind of task and every method on the command line: train, evaluate, save, resume, predict, on tiny data."""

from __future__ import annotations

import json
import random

import pytest
import torch
import transformers

from ptv2_engine.adapter import TENSORS, read_tensors
from ptv2_engine.cli import main
from ptv2_engine.testing import tiny_model

WORDS = ["rome", "paris", "ann", "bob", "went", "to", "and", "saw", "who", "where", "the", "city", "man", "yes", "no", "great",
         "bad"]
CITIES, PEOPLE = ("rome", "paris"), ("ann", "bob")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A tiny random BERT with a masked-language-model head and a WordPiece vocabulary of its own."""
    folder = tmp_path_factory.mktemp("backbone")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "?", ".", ":"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary + [f"w{i}" for i in range(120 - len(vocabulary))]))
    bare, lm = tiny_model("bert"), tiny_model("bert", "MaskedLM")
    lm.bert.load_state_dict(bare.state_dict(), strict=False)
    lm.save_pretrained(folder)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")        # both heads, as the published checkpoints have
    tensors |= {f"bert.{name}": t.clone() for name, t in bare.state_dict().items() if name.startswith("pooler.")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def rows(kind, count, seed=0):
    """Rows of a kind of task whose answer depends on their words."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        person, city, other = rng.choice(PEOPLE), rng.choice(CITIES), rng.choice(CITIES)
        words = [person, "went", "to", city, "and", "saw", "the", "city"]
        text = " ".join(words)
        made.append({
            "pair": {"premise": text, "hypothesis": f"{person} saw {other}", "label": "yes" if city == other else "no"},
            "values": {"text": text, "label": 1.5 if city == "rome" else -0.5},
            "tags": {"words": words, "tags": ["B-PER", "O", "O", "B-LOC", "O", "O", "O", "O"]},
            "srl": {"words": words, "predicate": 1, "tags": ["B-A0", "B-V", "B-A1", "I-A1", "O", "O", "O", "O"]},
            "span": {"question": "where ?" if i % 2 else "who ?", "context": text, "answer": city if i % 2 else person},
            "maybe": {"question": "where ?", "context": text if i % 2 else f"{person} saw the man .",
                      "answer": city if i % 2 else ""},
            "choice": {"text": text, "choice1": f"the city : {CITIES[0]}", "choice2": f"the city : {CITIES[1]}",
                       "label": CITIES.index(city)},
            "cloze": {"text": text, "label": "yes" if city == "rome" else "no"},
        }[kind])
    return made


def files(folder, kind):
    for name, count, seed in (("train", 24, 0), ("dev", 10, 1)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(kind, count, seed)))
    return ["--train_file", str(folder / "train.jsonl"), "--validation_file", str(folder / "dev.jsonl")]


def train(backbone, output, *words, epochs=2):
    return main(["train", "--model_name_or_path", str(backbone), "--output_dir", str(output), "--num_train_epochs", str(epochs),
                 "--per_device_train_batch_size", "8", "--prompt_length", "3", "--use_cpu", "True", *map(str, words)])


KINDS = {"pair": ("accuracy", {"yes", "no"}), "values": ("pearson", None), "tags": ("f1", None), "srl": ("f1", None),
         "span": ("f1", None), "maybe": ("f1", None), "choice": ("accuracy", {0, 1}), "cloze": ("accuracy", {"yes", "no"})}
EXTRA = {"cloze": ["--head", "cloze", "--pattern", "{text} ? {mask} .", "--verbalizers", "yes=yes", "no=no"],
         "span": ["--max_seq_length", "24", "--doc_stride", "4"]}


@pytest.mark.parametrize("kind", KINDS)
def test_train_resume_evaluate_predict(backbone, kind, tmp_path, capsys):
    metric, known = KINDS[kind]
    words = files(tmp_path, kind) + EXTRA.get(kind, [])
    assert train(backbone, tmp_path / "a", *words, "--save_strategy", "epoch") == 0
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["metric"] == metric and results["last_evaluation"]["epoch"] == 2
    capsys.readouterr()

    assert train(backbone, tmp_path / "b", *words, "--resume_from_checkpoint", tmp_path / "a" / "checkpoint-3") == 0
    ours, theirs = (read_tensors(tmp_path / name / TENSORS)[0] for name in "ab")
    assert ours and all(torch.equal(t, theirs[name]) for name, t in ours.items())      # to the bit
    capsys.readouterr()

    assert main(["evaluate", str(tmp_path / "a"), str(tmp_path / "dev.jsonl"), "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["examples"] == 10
    assert found[metric] == pytest.approx(results["last_evaluation"][f"eval_{metric}"], abs=1e-6)

    unlabelled = [{k: v for k, v in row.items() if k not in ("label", "tags", "answer")} for row in rows(kind, 10, 1)]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unlabelled))
    new = ["--file", str(tmp_path / "new.jsonl"), "--format", "jsonl", "--device", "cpu"]
    assert main(["predict", str(tmp_path / "a"), *new]) == 0
    predicted = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(row | own == row for row, own in zip(predicted, unlabelled, strict=True))
    if known is not None:
        assert {row["prediction"] for row in predicted} <= known
        right = [p["prediction"] == r["label"] for p, r in zip(predicted, rows(kind, 10, 1), strict=True)]
        assert sum(right) / 10 == pytest.approx(found["accuracy"])


@pytest.mark.parametrize("kind", ["pair", "tags", "span", "choice"])
@pytest.mark.parametrize("method", ["prompt-tuning", "p-tuning", "head-only", "fine-tuning", "bitfit", "lora"])
def test_every_method_on_every_kind(backbone, method, kind, tmp_path, capsys):
    assert train(backbone, tmp_path / "a", *files(tmp_path, kind), *EXTRA.get(kind, []), "--method", method, epochs=1) == 0
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["method"] == method
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "a"), str(tmp_path / "dev.jsonl"), "--device", "cpu"]) == 0
    metric = KINDS[kind][0]
    found = json.loads(capsys.readouterr().out)
    assert found[metric] == pytest.approx(results["last_evaluation"][f"eval_{metric}"], abs=1e-6)


def test_a_prompt_starts_from_a_text_or_an_adapter(backbone, tmp_path, capsys):
    words = files(tmp_path, "pair")
    assert train(backbone, tmp_path / "a", *words, "--method", "prompt-tuning", "--init", "text:ann went", epochs=1) == 0
    assert train(backbone, tmp_path / "b", *words, epochs=1) == 0
    assert train(backbone, tmp_path / "c", *files(tmp_path, "tags"), "--init", tmp_path / "b", "--learning_rate", "0",
                 epochs=1) == 0
    b, c = (read_tensors(tmp_path / name / TENSORS)[0]["prompt_embeddings"] for name in "bc")
    assert torch.equal(b, c)


@pytest.mark.parametrize(("words", "sentence"), [
    (["--method", "poetry"], "method 'poetry' does not exist"),
    (["--method", "lora", "--frozen_dtype", "int8"], "without --frozen_dtype"),
    (["--task", "poetry"], "--task 'poetry' does not exist"),
    (["--preset", "rte-roberta"], "did you mean rte-roberta-large"),
    (["--task", "multiple-choice"], "--choice_columns"),
    (["--method", "fine-tuning", "--reparameterization", "mlp"], "trains no prompt"),
])
def test_what_cannot_be_is_one_sentence(backbone, words, sentence, tmp_path, capsys):
    assert train(backbone, tmp_path / "a", *files(tmp_path, "pair"), *words) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "a" / TENSORS).exists()


def test_mistakes_are_named_by_row_before_anything_is_written(backbone, tmp_path, capsys):
    words = files(tmp_path, "maybe")
    bad = rows("maybe", 6)
    bad[1]["answer"], bad[4]["question"] = "berlin", " "
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    assert train(backbone, tmp_path / "a", *words) == 2
    error = capsys.readouterr().err
    assert "row 2:" in error and "berlin" in error and "row 5: the question is" in error
    assert not (tmp_path / "a").exists()
