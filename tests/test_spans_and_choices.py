"""Question answering and multiple choice against transformers: losses, logits, gradients, batch layouts, and bad input."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import PrefixTuningConfig, get_peft_model

from ptv2_engine import PromptConfig, PromptedModel
from ptv2_engine.batches import PackedCollator, split_inputs
from ptv2_engine.errors import ConfigError, InputError, LabelError
from ptv2_engine.testing import padded_batch, tiny_model, with_prefix

NO_DROPOUT = PromptConfig(4, prompt_dropout=0.0)


def span_pair(family, prompt_length=4):
    base = tiny_model(family, "QuestionAnswering")
    config = PrefixTuningConfig(task_type="QUESTION_ANS", num_virtual_tokens=prompt_length)
    peft = get_peft_model(copy.deepcopy(base), config).eval()
    ours = PromptedModel.from_pretrained(base, task="question-answering", prompt=PromptConfig(prompt_length, prompt_dropout=0.0))
    head = peft.base_model.qa_outputs.modules_to_save["default"]
    with torch.no_grad():
        ours.prompt.bank.normal_(0, 0.5)
        peft.prompt_encoder["default"].embedding.weight.copy_(ours.prompt.bank[0])
        ours.head.qa_outputs.weight.copy_(head.weight)
        ours.head.qa_outputs.bias.copy_(head.bias)
    return peft, ours, head


def close(a, b, name=""):
    assert (a - b).abs().max() <= 1e-5 * b.abs().max(), name


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_span_loss_and_gradients_equal_peft(family):
    """Without padding, where transformers' softmax sees what ours does. The last example has its answer outside, which counts for
    nothing in both."""
    peft, ours, head = span_pair(family)
    batch = padded_batch([9, 9, 9], pad_id=0)
    batch |= {"start_positions": torch.tensor([2, 0, 40]), "end_positions": torch.tensor([5, 0, 40])}
    a, b = ours(**batch), peft(**batch)
    close(a.loss, b.loss)
    close(a.start_logits, b.start_logits)
    close(a.end_logits, b.end_logits)
    a.loss.backward()
    b.loss.backward()
    close(ours.prompt.bank.grad[0], peft.prompt_encoder["default"].embedding.weight.grad, "prompt")
    close(ours.head.qa_outputs.weight.grad, head.weight.grad, "head")


def test_span_loss_of_a_ragged_batch_is_the_mean_of_its_sequences():
    """Padding takes no part, packed or padded, and each sequence's loss is transformers' own without padding."""
    peft, ours, _ = span_pair("bert")
    lengths = [9, 4, 12]
    batch = padded_batch(lengths)
    starts, ends = torch.tensor([2, 0, 7]), torch.tensor([5, 3, 11])
    single = [peft(input_ids=batch["input_ids"][i:i + 1, :n], attention_mask=torch.ones(1, n), start_positions=starts[i:i + 1],
                   end_positions=ends[i:i + 1]).loss for i, n in enumerate(lengths)]
    expected = torch.stack(single).mean()
    padded = ours(**batch, start_positions=starts, end_positions=ends)
    close(padded.loss, expected)
    features = [{"input_ids": batch["input_ids"][i, :n].tolist(), "start_positions": int(starts[i]),
                 "end_positions": int(ends[i])} for i, n in enumerate(lengths)]
    packed = ours(**PackedCollator()(features))
    close(packed.loss, expected)
    assert torch.equal(packed.start_logits, padded.start_logits)
    assert (padded.start_logits[1, 4:] == -10000).all()
    whole = ours(**PackedCollator()(features), num_items_in_batch=torch.tensor(6))
    close(whole.loss, expected * 3 / 6)
    parts = [ours(**part, num_items_in_batch=3).loss for part in split_inputs(PackedCollator()(features), 2)]
    assert len(parts) == 2
    close(sum(parts), expected)


def choice_model(family="bert"):
    base = tiny_model(family, "MultipleChoice")
    ours = PromptedModel.from_pretrained(base, task="multiple-choice", prompt=NO_DROPOUT)
    with torch.no_grad():
        ours.prompt.bank.normal_(0, 0.5)
        ours.head.classifier.weight.copy_(base.classifier.weight)
        ours.head.classifier.bias.copy_(base.classifier.bias)
    return base, ours


def test_choice_loss_and_gradients_equal_transformers():
    """Against BertForMultipleChoice's own parts, driven with a prefix: pooler, classifier, reshape, cross-entropy."""
    base, ours = choice_model()
    flat = padded_batch([9, 4, 7, 12, 3, 5], types=True)
    labels = torch.tensor([2, 0])
    rows = ours.prompt.bank.detach()[0].clone().requires_grad_()
    pooled = with_prefix(base.bert, rows, flat).pooler_output
    logits = base.classifier(pooled).view(2, 3)
    expected = F.cross_entropy(logits, labels)
    expected.backward()
    out = ours(**{name: t.view(2, 3, -1) for name, t in flat.items()}, labels=labels)
    close(out.loss, expected)
    close(out.logits, logits)
    out.loss.backward()
    close(ours.prompt.bank.grad[0], rows.grad, "prompt")
    close(ours.head.classifier.weight.grad, base.classifier.weight.grad, "head")


def test_choices_may_differ_in_number():
    base, ours = choice_model()
    flat = padded_batch([9, 4, 7, 12, 3], types=True)
    rows = [flat["input_ids"][i, :n].tolist() for i, n in enumerate([9, 4, 7, 12, 3])]
    features = [{"input_ids": rows[:3], "labels": 2}, {"input_ids": rows[3:], "labels": 0}]
    batch = PackedCollator()(features)
    assert next(iter(batch)) == "choice_counts" and batch["choice_counts"].tolist() == [3, 2]
    out = ours(**batch)
    assert out.logits.shape == (2, 3) and float(out.logits[1, 2].detach()) == -10000
    alone = [ours(**PackedCollator()([feature])) for feature in features]
    close(out.loss, (alone[0].loss + alone[1].loss) / 2)
    pieces = split_inputs(batch, 2)
    assert [p["choice_counts"].tolist() for p in pieces] == [[3], [2]]
    close(torch.stack([ours(**p).loss for p in pieces]).mean(), out.loss)


def test_prompt_ids_go_to_every_choice():
    base = tiny_model("bert", "MultipleChoice")
    ours = PromptedModel.from_pretrained(base, task="multiple-choice", prompt=PromptConfig(4, num_prompts=2, init_std=1.0))
    rows = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14, 15]]
    features = [{"input_ids": rows[:2], "prompt_ids": 1}, {"input_ids": rows[2:], "prompt_ids": 0}]
    packed = ours(**PackedCollator()(features)).logits
    alone = ours(**PackedCollator()(features[:1])).logits
    close(packed[:1], alone)
    other = ours(**PackedCollator()([features[0] | {"prompt_ids": 0}])).logits
    assert (other - alone).abs().max() > 1e-3
    padded = torch.zeros(2, 2, 4, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i // 2, i % 2, :len(row)] = torch.tensor(row)
    close(ours(input_ids=padded, attention_mask=(padded > 0).long(), prompt_ids=torch.tensor([1, 0])).logits, packed)


@pytest.mark.parametrize("change, error, words", [
    ({"end_positions": None}, InputError, "belong together"),
    ({"start_positions": torch.tensor([1]), "end_positions": torch.tensor([1])}, LabelError, "there are 2 sequences"),
    ({"start_positions": torch.tensor([0, 5])}, LabelError, r"start_positions\[1\] is 5, but the sequence has 3 tokens"),
])
def test_bad_spans(change, error, words):
    _, ours, _ = span_pair("bert")
    batch = padded_batch([9, 3]) | {"start_positions": torch.tensor([1, 1]), "end_positions": torch.tensor([2, 2])}
    with pytest.raises(error, match=words):
        ours(**batch | change)


def test_bad_choices():
    base, ours = choice_model()
    batch = PackedCollator()([{"input_ids": [[5, 6], [7]], "labels": 1}])
    with pytest.raises(InputError, match="add up to 3, but the batch has 2"):
        ours(**batch | {"choice_counts": torch.tensor([3])})
    with pytest.raises(LabelError, match="label 2 is outside"):
        ours(**batch | {"labels": torch.tensor([2])})
    with pytest.raises(ConfigError, match="head has 1 outputs"):
        PromptedModel.from_pretrained(base, task="multiple-choice", num_labels=4)
