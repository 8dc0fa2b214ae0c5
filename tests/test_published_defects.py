"""What goes wrong in the published P-Tuning v2 code, and does not here.

Its tagging defects (training that needs a test file, labels longer than the cut inputs, the last sentence lost) are in
tests/tasks/test_ner.py and test_tags.py; embedding shallow prompts once, in test_model.py.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from ptv2_engine import PromptConfig, PromptedModel, Trainer
from ptv2_engine.batches import PackedCollator
from ptv2_engine.cli import main
from ptv2_engine.testing import padded_batch, tiny_model
from tests.test_cli_tasks import backbone, rows, train  # noqa: F401


def write(folder, name, made):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))


@pytest.mark.parametrize(("name", "metric"), [("cola", "matthews"), ("stsb", "pearson")])
def test_the_best_epoch_of_cola_and_stsb_is_by_their_own_metric(backbone, name, metric, tmp_path, capsys):  # noqa: F811
    """There: KeyError 'eval_accuracy' after the first epoch."""
    made = [{"sentence": r["premise"], "label": int(r["label"] == "yes")} if name == "cola" else
            {"sentence1": r["premise"], "sentence2": r["hypothesis"], "label": 5.0 if r["label"] == "yes" else 0.5}
            for r in rows("pair", 24)]
    for split in ("train", "validation"):
        write(tmp_path, split, made)
    words = ["--task_name", "glue", "--dataset_name", name, "--data_dir", str(tmp_path), "--load_best_model_at_end", "True",
             "--save_strategy", "epoch"]
    assert train(backbone, tmp_path / "out", *words) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["metric"] == metric and -1 <= results["best_evaluation"][f"eval_{metric}"] <= 1
    # the best adapter on disk is the one that is kept, and scores what is said of it
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "out"), str(tmp_path / "validation.jsonl"), "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)[metric] == pytest.approx(results["best_evaluation"][f"eval_{metric}"], abs=1e-6)


def test_padding_to_the_longest_needs_no_flag(backbone, tmp_path, capsys):  # noqa: F811
    """There: without --pad_to_max_length and without fp16 there is no collator. Here nothing is padded at all."""
    write(tmp_path, "train", rows("pair", 24))
    words = ["--train_file", tmp_path / "train.jsonl", "--pad_to_max_length", "False"]
    assert train(backbone, tmp_path / "out", *words, epochs=1) == 0
    assert "no effect" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_record_has_token_types_for_all_rows_or_none(family, tmp_path):
    """There: RoBERTa's rows have an empty token_type_ids column."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    from ptv2_engine.tasks.benchmarks import find_benchmark, load_benchmark

    row = {"passage": {"text": "Ann saw Bob .", "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}]},
           "qas": [{"idx": 0, "query": "@placeholder saw him .", "answers": [{"text": "Ann"}]}], "idx": 0}
    write(tmp_path, "train", [row])
    benchmark = find_benchmark("superglue", "record")
    table = load_benchmark(benchmark, tmp_path)["train"]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", "[CLS]", "[SEP]", "Ann", "saw", "Bob"])}, "[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1",
                                                         [("[CLS]", 1), ("[SEP]", 2)])
    names = ["input_ids", *(["token_type_ids"] if family == "bert" else []), "attention_mask"]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", model_input_names=names)
    features = benchmark.make(table, 0).features(table, tokenizer, 64)
    assert len(features) == 2 and [f["labels"] for f in features] == [1, 0]
    assert all(("token_type_ids" in f) == (family == "bert") for f in features)
    batch = PackedCollator()(features)
    assert "token_type_ids" not in batch or batch["token_type_ids"].shape == batch["input_ids"].shape
    model = PromptedModel.from_pretrained(tiny_model(family), prompt=PromptConfig(2))
    assert torch.isfinite(model(**batch).loss)


def test_choices_are_pooled_at_their_first_token_behind_a_shallow_prompt():
    """There: the first row of the prompt is pooled. Here a prompt of one row that no token sees changes nothing else."""
    model = PromptedModel.from_pretrained(tiny_model("bert"), task="multiple-choice", prompt=PromptConfig(3, method="shallow"))
    features = [{"input_ids": [[5, 6, 7], [8, 9]], "labels": 0}]
    batch = model.packed_batch(**{k: v for k, v in PackedCollator()(features).items() if k in ("input_ids", "seq_lengths")})
    every = model.hidden_states(batch)
    first = model.hidden_states(batch, first_tokens_only=True)
    assert torch.allclose(first, every[[0, 3]], atol=1e-6)
    expected = model.head(model.encoder.pool(every[[0, 3]]))[:, 0]
    assert torch.allclose(model(**PackedCollator()(features)).logits[0], expected, atol=1e-6)


@pytest.mark.parametrize("family", ["deberta", "deberta-v2"])
def test_deberta_takes_a_batch_without_an_attention_mask(family):
    """There: None has no size. No mask means that every position is a token."""
    model = PromptedModel.from_pretrained(tiny_model(family), prompt=PromptConfig(3))
    batch = padded_batch([6, 6])
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, model(**batch).logits)


def test_it_trains_in_bf16(tmp_path):
    """There: fp32 only. The frozen weights are bf16, prompt and head stay fp32."""
    model = PromptedModel.from_pretrained(tiny_model("bert"), prompt=PromptConfig(3), dtype=torch.bfloat16)
    args = transformers.TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
    before = model.prompt.bank.detach().clone()
    Trainer(model, args, train_dataset=[{"input_ids": [5, 6, 7 + i], "labels": i % 2} for i in range(8)]).train()
    assert model.prompt.bank.dtype == torch.float32 and not torch.equal(model.prompt.bank, before)
    assert {p.dtype for p in model.encoder.parameters()} == {torch.bfloat16}


def test_what_is_trained_is_kept(backbone, tmp_path, capsys):  # noqa: F811
    """There: saving is switched off, and switched on it writes the whole model."""
    write(tmp_path, "train", rows("pair", 24))
    assert train(backbone, tmp_path / "out", "--train_file", tmp_path / "train.jsonl", epochs=1) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size < 10_000
    assert PromptedModel.from_adapter(tmp_path / "out").prompt_config.prompt_length == 3
