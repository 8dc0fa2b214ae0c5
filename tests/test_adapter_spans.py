"""Question answering and multiple choice in the files of others: PEFT's QUESTION_ANS, and the published code's checkpoints."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model

from ptv2_engine import PromptConfig, PromptedModel, Trainer
from ptv2_engine.errors import AdapterError
from ptv2_engine.testing import padded_batch, tiny_model, with_prefix


def close(ours, theirs, batch):
    a, b = ours(**batch), theirs(**batch)
    real = batch["attention_mask"].bool()
    for name in ("start_logits", "end_logits"):
        mine, other = getattr(a, name)[real], getattr(b, name)[real]
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max(), name


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_peft_question_answering_both_ways(family, tmp_path):
    """Without token types, which PEFT drops there."""
    base, batch = tiny_model(family, "QuestionAnswering"), padded_batch([9, 4, 7], pad_id=int(family == "roberta"))
    peft = get_peft_model(copy.deepcopy(base), PrefixTuningConfig(task_type="QUESTION_ANS", num_virtual_tokens=5)).eval()
    peft.save_pretrained(tmp_path / "theirs")
    ours = PromptedModel.from_peft(tmp_path / "theirs", base)
    assert ours.task == "question-answering"
    close(ours, peft, batch)
    ours.save_peft(tmp_path / "peft")
    ours.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["peft_type"] == "PREFIX_TUNING"
    for folder in ("peft", "ours"):
        close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder).eval(), peft, batch)


@pytest.mark.parametrize("head", ["qa_outputs", "classifier"])
def test_published_checkpoints(head, tmp_path):
    """BertPrefixForQuestionAnswering and BertPrefixForMultipleChoice: the whole model, prefix_encoder, and the head."""
    base, batch = tiny_model("bert"), padded_batch([9, 4, 7])
    torch.manual_seed(1)
    outputs = 2 if head == "qa_outputs" else 1
    rows, weight, bias = torch.randn(5, 2 * 3 * 64), torch.randn(outputs, 64), torch.randn(outputs)
    state = {f"bert.{name}": t for name, t in base.state_dict().items()}
    torch.save(state | {"prefix_encoder.embedding.weight": rows, f"{head}.weight": weight, f"{head}.bias": bias},
               tmp_path / "pytorch_model.bin")
    task = None if head == "qa_outputs" else "multiple-choice"          # looks like a classifier with one output
    ours = PromptedModel.from_thudm(tmp_path, base, task=task)
    out = with_prefix(base, rows, batch)
    if head == "qa_outputs":
        assert ours.task == "question-answering"
        expected = torch.nn.functional.linear(out.last_hidden_state, weight, bias)[..., 0]
        found, real = ours(**batch).start_logits, batch["attention_mask"].bool()
        assert (found - expected)[real].abs().max() <= 1e-5 * expected.abs().max()
    else:
        expected = torch.nn.functional.linear(out.pooler_output, weight, bias)[:, 0]
        found = ours(**{name: t[None] for name, t in batch.items()}).logits[0]
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_multiple_choice_is_no_peft_adapter(tmp_path):
    ours = PromptedModel.from_pretrained(tiny_model("bert"), task="multiple-choice", prompt=PromptConfig(3))
    with pytest.raises(AdapterError, match="task multiple-choice .PEFT has no such task"):
        ours.save_peft(tmp_path)


@pytest.mark.parametrize(("head", "task"), [("QuestionAnswering", "question-answering"), ("MultipleChoice", "multiple-choice")])
def test_a_transformers_model_is_wrapped_with_its_task(head, task, tmp_path):
    import transformers

    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    assert Trainer(tiny_model("bert", head), args, prompt=PromptConfig(3)).model.task == task
