"""LoRA through PEFT: the packed batches, the loss and the files against plain transformers + PEFT."""

from __future__ import annotations

import copy
import json
import logging

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from ptv2_engine import Trainer
from ptv2_engine.batches import PackedCollator
from ptv2_engine.errors import AdapterError, ConfigError, InputError
from ptv2_engine.lora import TARGETS, is_lora, load_lora_model, make_lora_model
from ptv2_engine.testing import tiny_model

LENGTHS = (9, 4, 7, 6)


def checkpoint(tmp_path, family="bert", **overrides):
    tiny_model(family, **overrides).save_pretrained(tmp_path / family)
    return tmp_path / family


def made(source, task="sequence-classification", **options):
    """A LoRA model whose B is not zero, so that LoRA shows."""
    torch.manual_seed(1)
    model = make_lora_model(source, task, **options)
    with torch.no_grad():
        for p in model.trained_parameters().values():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def features(task, family="bert", lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(5, 120, (n,), generator=generator).tolist()} for n in lengths]
    for i, row in enumerate(rows):
        if family == "bert":
            row["token_type_ids"] = [0] * 2 + [1] * (len(row["input_ids"]) - 2)
        if task == "sequence-classification":
            row["label"] = i % 3
        elif task == "token-classification":
            row["labels"] = [-100, *(k % 3 for k in range(len(row["input_ids"]) - 1))]
        elif task == "question-answering":
            row |= {"start_positions": 1, "end_positions": len(row["input_ids"]) - 1}
    if task == "multiple-choice":
        pairs = (rows[:2], rows[2:])
        rows = [{**{name: [r[name] for r in pair] for name in pair[0]}, "label": i} for i, pair in enumerate(pairs)]
    return rows


def padded(task, rows, pad_id=0):
    """The stock layout, written here by hand."""
    flat = [ids for r in rows for ids in (r["input_ids"] if task == "multiple-choice" else [r["input_ids"]])]
    types = [t for r in rows for t in (r["token_type_ids"] if task == "multiple-choice" else [r["token_type_ids"]])] \
        if "token_type_ids" in rows[0] else None
    S = max(map(len, flat))
    made = {"input_ids": torch.tensor([i + [pad_id] * (S - len(i)) for i in flat]),
            "attention_mask": torch.tensor([[1] * len(i) + [0] * (S - len(i)) for i in flat])}
    if types is not None:
        made["token_type_ids"] = torch.tensor([t + [0] * (S - len(t)) for t in types])
    if task == "multiple-choice":
        made = {name: t.view(len(rows), 2, S) for name, t in made.items()}
    if task == "token-classification":
        made["labels"] = torch.tensor([r["labels"] + [-100] * (S - len(r["labels"])) for r in rows])
    elif task == "question-answering":
        made |= {n: torch.tensor([r[n] for r in rows]) for n in ("start_positions", "end_positions")}
    else:
        made["labels"] = torch.tensor([r["label"] for r in rows])
    return made


CASES = [*((family, "sequence-classification") for family in TARGETS), ("bert", "token-classification"),
         ("modernbert", "token-classification"), ("bert", "question-answering"), ("bert", "multiple-choice"),
         ("electra", "multiple-choice"), ("modernbert", "multiple-choice")]


@pytest.mark.parametrize("family, task", CASES)
def test_loss_gradients_and_logits_equal_plain_peft_on_padded_input(family, task, tmp_path):
    source = checkpoint(tmp_path, family)
    model = made(source, task, **({"num_labels": 3} if task[:3] in ("seq", "tok") else {}))
    lengths = (7,) * 4 if task == "question-answering" else LENGTHS      # transformers' softmax goes over padding too
    rows = features(task, family, lengths)
    theirs = copy.deepcopy(model.peft)
    expected = theirs(**padded(task, rows, model.config.pad_token_id))
    out = model(**PackedCollator()(rows))
    assert type(out) is type(expected) and abs(out.loss - expected.loss) <= 1e-5 * abs(expected.loss)
    mask = padded(task, rows)["attention_mask"].bool()
    for name, logits in expected.items():
        if name.endswith("logits"):
            assert out[name].shape == logits.shape
            if task == "token-classification":
                assert (out[name][~mask] == 0).all()
                logits = logits * mask[..., None]
            assert (out[name] - logits).abs().max() <= 1e-5 * logits.abs().max()
    out.loss.backward()
    expected.loss.backward()
    for (name, p), q in zip(model.peft.named_parameters(), theirs.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad and (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert (p.grad - q.grad).abs().max() <= 1e-5 * q.grad.abs().max().clamp(min=1e-2), name


def test_ragged_spans_are_scored_over_real_tokens(tmp_path):
    model, rows = made(checkpoint(tmp_path), "question-answering"), features("question-answering")
    out = model(**PackedCollator()(rows))
    losses = []
    for i, row in enumerate(rows):
        alone = model.peft(**{n: torch.tensor([row[n]]) for n in ("input_ids", "token_type_ids")})
        for logits, at, name in ((alone.start_logits, out.start_logits, "start"), (alone.end_logits, out.end_logits, "end")):
            losses.append(F.cross_entropy(logits, torch.tensor([row[f"{name}_positions"]])))
            torch.testing.assert_close(at[i, :logits.shape[1]], logits[0], rtol=1e-4, atol=1e-4)
    assert abs(out.loss - torch.stack(losses).mean()) <= 1e-5 * out.loss


@pytest.mark.parametrize("family, heads", [("bert", {"classifier"}), ("roberta", {"classifier"}),
                                           ("deberta-v2", {"pooler", "classifier"}), ("modernbert", {"head", "classifier"})])
def test_only_lora_and_the_head_train(family, heads, tmp_path):
    model = make_lora_model(checkpoint(tmp_path, family), num_labels=3, rank=4)
    low_rank, full, base = 0, set(), {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            base[name] = p.clone()
        elif "lora_" in name:
            assert 4 in p.shape
            low_rank += p.numel()
        else:
            full.add(name.split(".modules_to_save.")[0].rsplit(".", 1)[-1])
    sizes = {"modernbert": 64 + 192}.get(family, 2 * (64 + 64))                  # in and out of one fused, or two matrices
    assert full == heads and low_rank == 3 * 4 * sizes
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**PackedCollator()(features("sequence-classification", family))).loss.backward()
    optimizer.step()
    assert all(torch.equal(base[name], p) for name, p in model.named_parameters() if name in base)
    assert f"trained parameters: {sum(p.numel() for p in model.trained_parameters().values()):,}" in (
        model.print_trainable_parameters())


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "question-answering", "multiple-choice"])
def test_saved_and_loaded_logits_are_equal(task, tmp_path):
    source, names = checkpoint(tmp_path), {0: "no", 1: "yes", 2: "maybe"}
    model = made(source, task, rank=4, alpha=32, **({"id2label": names} if task[:3] in ("seq", "tok") else {}))
    model.save_pretrained(tmp_path / "adapter")
    back, batch = load_lora_model(tmp_path / "adapter"), PackedCollator()(features(task))
    first, second = (m(**batch, return_dict=False) for m in (model, back))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and not back.training
    assert back.task == task and is_lora(tmp_path / "adapter") and not is_lora(source)
    if task == "sequence-classification":
        assert back.id2label == back.config.id2label == names
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=3)
        plain = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        assert torch.equal(plain(**padded(task, features(task))).logits, second[1])


def test_only_what_a_checkpoint_should_have_is_reported_missing(tmp_path):
    class Records(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    source, said, logger, handler = checkpoint(tmp_path), [], logging.getLogger("transformers.modeling_utils"), Records()
    logger.addHandler(handler)
    try:
        make_lora_model(source)
        assert not said
        tensors = load_file(source / "model.safetensors")
        save_file({name: t for name, t in tensors.items() if "layer.1.output.dense.weight" not in name},
                  source / "model.safetensors", {"format": "pt"})
        make_lora_model(source)
        assert len(said) == 1 and "layer.1.output.dense.weight" in said[0]
    finally:
        logger.removeHandler(handler)


def test_hidden_dropout_is_not_attentions_and_not_loras(tmp_path):
    model = make_lora_model(checkpoint(tmp_path), dropout=0.3)
    model.set_hidden_dropout(0.5)
    base = model.peft.get_base_model()
    found = {name: m.p for name, m in base.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert found["bert.embeddings.dropout"] == found["bert.encoder.layer.2.output.dropout"] == found["dropout"] == 0.5
    assert found["bert.encoder.layer.0.attention.self.dropout"] == 0.1
    assert found["bert.encoder.layer.0.attention.self.query.lora_dropout.default"] == 0.3


def test_a_folder_of_another_model_is_refused(tmp_path):
    source = checkpoint(tmp_path)
    made(source, num_labels=3).save_pretrained(tmp_path / "three")
    with pytest.raises(AdapterError, match="classifier.bias is missing, unknown or of another shape"):
        make_lora_model(source, num_labels=2).load_adapter(tmp_path / "three")
    config = tmp_path / "three" / "adapter_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "ptv2_lora"}))
    with pytest.raises(AdapterError, match="no LoRA adapter that this package wrote"):
        load_lora_model(tmp_path / "three")


def test_what_cannot_be_made_is_refused_with_the_way_out(tmp_path):
    source = checkpoint(tmp_path)
    for call, message in (
            (lambda: make_lora_model(source, "cloze"), "'lora' has no task 'cloze'; choose one of sequence"),
            (lambda: make_lora_model(tmp_path / "nowhere"), "no config that transformers reads"),
            (lambda: make_lora_model(source, target_modules=["wrong"]), "PEFT cannot put LoRA of rank 8 on wrong"),
            (lambda: make_lora_model(checkpoint(tmp_path, "deberta"), "multiple-choice"), "makes no multiple-choice model"),
            (lambda: make_lora_model(source).set_backbone_dtype(torch.bfloat16), "trains in float32")):
        with pytest.raises(ConfigError, match=message):
            call()
    with pytest.raises(InputError, match="input_ids is missing"):
        make_lora_model(source)()


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    """Over batches of different label counts: the sum over all labels, divided by their number."""
    model, rows = made(checkpoint(tmp_path), "token-classification", num_labels=3), features("token-classification")
    model(**PackedCollator()(rows)).loss.backward()
    whole = {n: p.grad.clone() for n, p in model.trained_parameters().items()}
    model.zero_grad()
    count = sum(len(r["labels"]) - 1 for r in rows)
    for part in (rows[:1], rows[1:]):
        model(**PackedCollator()(part), num_items_in_batch=count).loss.backward()
    for name, p in model.trained_parameters().items():
        assert (p.grad - whole[name]).abs().max() <= 1e-5 * whole[name].abs().max().clamp(min=1e-2), name


def test_the_trainer_trains_it_saves_resumes_and_evaluates(tmp_path):
    source = checkpoint(tmp_path, hidden_dropout_prob=0.0)
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(5, 120, (int(n),), generator=generator).tolist()} for n in range(3, 35)]
    for row in rows:
        row["label"] = int(row["input_ids"][1] > 60)

    def run(folder, **options):
        torch.manual_seed(0)
        args = transformers.TrainingArguments(
            str(tmp_path / folder), per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=4,
            save_steps=8, learning_rate=1e-2, report_to=[], use_cpu=True, logging_steps=4, disable_tqdm=True,
            gradient_checkpointing=True)
        trainer = Trainer(make_lora_model(source), args, train_dataset=rows, eval_dataset=rows, head_learning_rate=2e-2)
        trainer.train(**options)
        return trainer

    whole = run("whole")
    log = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert log[-1] < 0.9 * log[0]
    assert [g["initial_lr"] for g in whole.optimizer.param_groups] == [1e-2, 2e-2]
    again = run("again", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert whole.evaluate()["eval_loss"] < log[-1] + 0.2
    saved = load_lora_model(tmp_path / "whole" / "checkpoint-16")
    assert torch.equal(saved(**PackedCollator()(rows[:4])).logits, whole.model.eval()(**PackedCollator()(rows[:4])).logits)
