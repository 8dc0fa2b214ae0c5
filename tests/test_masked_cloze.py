"""A masked language model fills a blank under a prompt: loss and gradient against transformers, saving, and bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ptv2_engine import PromptConfig, PromptedModel
from ptv2_engine.batches import PackedCollator
from ptv2_engine.errors import ConfigError, InputError
from ptv2_engine.testing import padded_batch, tiny_model, with_prefix

LENGTHS, BLANKS, WORDS = [9, 4, 7], [3, 2, 6], [11, 40, 7]


def pair(family="bert"):
    base = tiny_model(family, "MaskedLM")
    ours = PromptedModel.from_pretrained(base, task="cloze", verbalizer_ids=WORDS, prompt=PromptConfig(4, prompt_dropout=0.0))
    with torch.no_grad():
        ours.prompt.bank.normal_(0, 0.5)
    return base, ours


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_loss_and_gradient_equal_transformers(family):
    base, ours = pair(family)
    batch, labels = padded_batch(LENGTHS, pad_id=1 if family == "roberta" else 0), torch.tensor([2, 0, 1])
    rows = ours.prompt.bank.detach()[0].clone().requires_grad_()
    hidden = with_prefix(getattr(base, family), rows, batch).last_hidden_state[torch.arange(3), torch.tensor(BLANKS)]
    head = base.cls if family == "bert" else base.lm_head
    logits = head(hidden)[:, WORDS]
    expected = F.cross_entropy(logits, labels)
    expected.backward()
    out = ours(**batch, labels=labels, mask_positions=torch.tensor(BLANKS))
    out.loss.backward()
    assert (out.logits - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert abs(out.loss - expected) <= 1e-5 * abs(expected)
    assert (ours.prompt.bank.grad[0] - rows.grad).abs().max() <= 1e-5 * rows.grad.abs().max()
    assert set(ours.trained_parameters()) == {"prompt.bank"}


def test_packed_and_reloaded(tmp_path):
    base, ours = pair()
    batch = padded_batch(LENGTHS)
    rows = [{"input_ids": batch["input_ids"][i, :n].tolist(), "mask_positions": BLANKS[i], "labels": i % 2}
            for i, n in enumerate(LENGTHS)]
    packed = PackedCollator()(rows)
    assert torch.allclose(ours(**packed).logits, ours(**batch, mask_positions=torch.tensor(BLANKS)).logits, rtol=1e-5, atol=1e-6)
    ours.save_pretrained(tmp_path)
    again = PromptedModel.from_adapter(tmp_path, backbone=base)
    assert torch.equal(again(**packed).logits, ours(**packed).logits)


def test_fine_tuning_trains_the_words_through_the_head_too():
    base = tiny_model("bert", "MaskedLM")
    ours = PromptedModel.from_pretrained(base, task="cloze", verbalizer_ids=WORDS, prompt=PromptConfig(method="none"),
                                         trained_backbone="all")
    batch, labels = padded_batch(LENGTHS), torch.tensor([2, 0, 1])
    logits = base(**batch).logits[torch.arange(3), torch.tensor(BLANKS)][:, WORDS]
    F.cross_entropy(logits, labels).backward()
    ours(**batch, labels=labels, mask_positions=torch.tensor(BLANKS)).loss.backward()
    theirs = base.bert.embeddings.word_embeddings.weight.grad
    assert (ours.encoder.embeddings.word.grad - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(("positions", "words"), [
    (None, "needs the index of the mask token"), ([1, 2], "needs the index of the mask token in each of 3"),
    ([1, 4, 2], r"mask_positions\[1\] is 4, but the sequence has 4 tokens"),
])
def test_bad_positions(positions, words):
    _, ours = pair()
    with pytest.raises(InputError, match=words):
        ours(**padded_batch(LENGTHS), mask_positions=None if positions is None else torch.tensor(positions))


def test_candidates_need_glm():
    with pytest.raises(ConfigError, match="takes no candidate answers"):
        PromptedModel.from_pretrained(tiny_model("bert", "MaskedLM"), task="cloze")
