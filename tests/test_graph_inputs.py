"""Batches filled up for a graph: what stands behind the tokens, the sequences and the examples changes nothing."""

from __future__ import annotations

import pytest
import torch

from ptv2_engine import PromptConfig, PromptedModel
from ptv2_engine.batches import PackedCollator
from ptv2_engine.graph_inputs import bucket_of_longest, bucket_of_tokens, fill_up
from ptv2_engine.testing import tiny_model
from tests.encoder.plain_glm import PlainGLM
from tests.test_cloze import CONTEXTS, example

LENGTHS = [[9, 3, 17, 12], [8, 4, 16, 13], [21, 2, 5, 30], [10, 3, 17, 11], [22, 2, 5, 29], [7, 30, 1, 3]]


def batch_of(lengths, task="sequence-classification", seed=0, glm=False):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i, n in enumerate(lengths):
        ids = torch.randint(5, 119, (n,), generator=generator).tolist()
        row = {"input_ids": ids, "token_type_ids": [j % 2 for j in range(n)]}
        if task == "token-classification":
            row["labels"] = [-100] + [t % 2 for t in ids[1:]]
        elif task == "question-answering":
            row |= {"start_positions": [0, n - 1, 64][i % 3], "end_positions": [0, n - 1, 64][i % 3]}
        elif task == "multiple-choice":
            row |= {"input_ids": [ids, ids[: n // 2 + 1]], "token_type_ids": [[0] * n, [1] * (n // 2 + 1)], "labels": i % 2}
        else:
            row["labels"] = i % 2
        rows.append(row)
    return PackedCollator()(rows)


def model_of(family="bert", task="sequence-classification", dropout=True, **prompt):
    torch.manual_seed(1)
    labels = {"num_labels": 2} if task in ("sequence-classification", "token-classification") else {}
    model = PromptedModel.from_pretrained(tiny_model(family), task=task, prompt=PromptConfig(4, **prompt), **labels).train()
    if not dropout:
        model.set_hidden_dropout(0.0)
        model.encoder.attention_dropout = 0.0
    return model


def filled(batch, model, examples=9):
    return fill_up(batch, model.max_length(), model.task == "token-classification", examples)


def test_buckets_waste_less_than_an_eighth():
    buckets = {bucket_of_tokens(n): n for n in range(1, 70_000)}
    assert all(bucket >= n for bucket, n in buckets.items())
    assert all(n <= bucket_of_tokens(n) < 1.125 * n for n in range(128, 70_000))
    assert sum(16_384 < bucket <= 32_768 for bucket in buckets) == 8             # few graphs
    assert [bucket_of_longest(n, 500) for n in (1, 16, 17, 300, 500)] == [16, 16, 32, 500, 500]


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "deberta", "deberta-v2", "modernbert"])
@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "question-answering", "multiple-choice"])
def test_spare_tokens_and_sequences_change_nothing(family, task):
    model, batch = model_of(family, task), batch_of(LENGTHS[2], task)
    results = []
    for inputs in (batch, filled(batch, model)):
        model.zero_grad()
        loss = model(**inputs, seed=torch.tensor([7])).loss    # dropout on, the head's too
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert inputs["input_ids"].shape[0] > batch["input_ids"].shape[0] and inputs["max_seqlen"] > batch["max_seqlen"]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("labels, options", [(torch.tensor([0.5, -1.0, 2.0, 0.0]), {"num_labels": 1}),
                                             (torch.tensor([[1.0, 0.0, 1.0]] * 4), {"num_labels": 3})])
@pytest.mark.parametrize("num_items", [None, 8])
@pytest.mark.parametrize("size", [58, 64])                      # 64: no spare token that a spare sequence could point at
def test_spare_sequences_take_no_part_in_losses_of_numbers(labels, options, num_items, size):
    model = PromptedModel.from_pretrained(tiny_model("bert"), prompt=PromptConfig(4), **options).train()
    batch = batch_of([size - 37, 2, 5, 30]) | {"labels": labels}
    both = [model(**inputs, seed=torch.tensor([7]), num_items_in_batch=num_items).loss
            for inputs in (batch, filled(batch, model))]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)


def test_spare_examples_of_unlike_numbers_of_choices():
    model = model_of(task="multiple-choice")
    batch = batch_of([9, 3, 17, 12, 4, 6]) | {"choice_counts": torch.tensor([1, 3, 2]), "max_choices": 3,
                                               "labels": torch.tensor([0, 2, 1])}
    both = [model(**inputs, seed=torch.tensor([7])) for inputs in (batch, filled(batch, model, 5))]
    torch.testing.assert_close(both[0].loss, both[1].loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both[0].logits, both[1].logits[:3], rtol=1e-5, atol=1e-5)
    assert both[1].logits.shape == (5, 3) and (both[1].logits[3:] == -10000).all()


def test_a_masked_language_model_and_spare_sequences():
    base = tiny_model("bert", "MaskedLM")
    model = PromptedModel.from_pretrained(base, task="cloze", prompt=PromptConfig(4), verbalizer_ids=[7, 9]).train()
    batch = batch_of(LENGTHS[2]) | {"mask_positions": torch.tensor([20, 0, 4, 7])}
    both = [model(**inputs, seed=torch.tensor([7])).loss for inputs in (batch, filled(batch, model))]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prompt", [{"method": "shallow"}, {"reparameterization": "mlp"}, {"prompt_layers": 1}])
def test_spare_tokens_and_every_kind_of_prompt(prompt):
    model, batch = model_of(dropout=False, **prompt), batch_of(LENGTHS[2])
    both = [model(**inputs).loss for inputs in (batch, filled(batch, model))]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)


def test_spare_tokens_behind_part_b():
    """GLM's cloze by verbalizers: two positions a token, and a causal part that spare rows must not widen."""
    model = PromptedModel.from_pretrained(PlainGLM(), task="cloze", prompt=PromptConfig(5), verbalizer_ids=[101, 3, 55]).train()
    batch = PackedCollator()([example(*context, label=i) for i, context in enumerate(CONTEXTS)])
    results = []
    for inputs in (batch, filled(batch, model)):
        model.zero_grad()
        loss = model(**inputs, seed=torch.tensor([7])).loss
        loss.backward()
        results.append((loss.detach(), model.prompt.bank.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=2e-5, atol=2e-6)
