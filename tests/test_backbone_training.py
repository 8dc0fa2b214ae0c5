"""Fine-tuning and BitFit against transformers: loss, gradients, optimizer steps; what trains, what is saved, what is refused."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open

from ptv2_engine import PromptConfig, PromptedModel, Trainer
from ptv2_engine.encoder.weights import family_of, load_encoder, random_encoder
from ptv2_engine.errors import AdapterError, AdapterMismatch, ConfigError
from ptv2_engine.optim import parameter_groups
from ptv2_engine.testing import padded_batch, tiny_model, with_prefix
from ptv2_engine.trainer import load_adapter_into

FAMILIES = ("bert", "roberta", "electra", "deberta", "deberta-v2", "modernbert")
VARIANTS = [("deberta-v2", {"share_att_key": False, "conv_kernel_size": 3}), ("deberta", {"position_biased_input": True}),
            ("modernbert", {"norm_bias": True, "attention_bias": True, "mlp_bias": True})]
NONE = PromptConfig(method="none")


def pair(family="bert", which="all", prompt=NONE, dtype=torch.float32, memory="exact", **overrides):
    """A bare transformers model with a linear layer behind it, and ours with the same values; no dropout."""
    theirs = tiny_model(family, **overrides).to(dtype)
    ours = PromptedModel.from_pretrained(theirs, task="token-classification", num_labels=3, prompt=prompt, memory=memory,
                                         trained_backbone=which, dtype=dtype)
    head = copy.deepcopy(ours.head.classifier).to(dtype)
    ours.head.to(dtype)
    batch = padded_batch([9, 4, 1, 7], pad_id=theirs.config.pad_token_id, types=getattr(theirs.config, "type_vocab_size", 0) > 1)
    labels = torch.randint(0, 3, batch["input_ids"].shape, generator=torch.Generator().manual_seed(1))
    return theirs, head, ours, batch, torch.where(batch["attention_mask"].bool(), labels, -100)


def loss_of(theirs, head, batch, labels, rows=None):
    out = theirs(**batch) if rows is None else with_prefix(theirs, rows, batch)
    return F.cross_entropy(head(out.last_hidden_state).flatten(0, 1), labels.flatten(), ignore_index=-100)


def ours_from(theirs, encoder, values):
    """Name in our encoder -> what transformers' values make of it by the family's name map; zeros for what it leaves out."""
    table = family_of(theirs.config.to_dict()).names(encoder.config)
    made = {}
    for name, parameter in encoder.named_parameters():
        if name.startswith("pooler."):
            continue
        parts = [values[n] for n in table[name].names]
        made[name] = (table[name].make(parts) if table[name].make else torch.cat(parts)) if parts else torch.zeros_like(parameter)
    return made


def gradients(model):
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def assert_close(name, ours, theirs, tolerance=1e-5):
    """Relative to the tensor's largest value, and to 1e-2: the gradients here are about 1, some are rounding errors of zero."""
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1e-2), name


@pytest.mark.parametrize("memory", ["exact", "minimal"])
@pytest.mark.parametrize("family, overrides", [*((f, {}) for f in FAMILIES), *VARIANTS])
def test_loss_and_every_gradient_of_fine_tuning_equal_transformers(family, overrides, memory):
    theirs, head, ours, batch, labels = pair(family, memory=memory, **overrides)
    expected = loss_of(theirs, head, batch, labels)
    loss = ours(**batch, labels=labels).loss
    assert abs(loss - expected) <= 1e-5 * abs(expected)
    loss.backward()
    expected.backward()
    wanted = ours_from(theirs, ours.encoder, gradients(theirs))
    trained = {name: p for name, p in ours.encoder.named_parameters() if p.requires_grad}
    assert not [n for n in wanted if n not in trained and not ours.encoder.lacks(n)]
    for name, parameter in trained.items():
        assert_close(name, parameter.grad, wanted[name])
    assert_close("head", ours.head.classifier.weight.grad, head.weight.grad)


@pytest.mark.parametrize("family, overrides", [*((f, {}) for f in FAMILIES[:-1]), *VARIANTS])
def test_bitfit_trains_exactly_the_biases(family, overrides):
    theirs, head, ours, batch, labels = pair(family, "bias", **overrides)
    for name, p in theirs.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    ours(**batch, labels=labels).loss.backward()
    loss_of(theirs, head, batch, labels).backward()
    wanted, num_biases = ours_from(theirs, ours.encoder, gradients(theirs)), 0
    for name, parameter in ours.encoder.named_parameters():
        if parameter.requires_grad:
            num_biases += parameter.numel()
            assert_close(name, parameter.grad, wanted[name])
        else:
            assert parameter.grad is None
    theirs_biases = sum(p.numel() for n, p in theirs.named_parameters() if n.endswith("bias") and not n.startswith("pooler."))
    absent = 3 * 64 if family == "deberta" else 0              # its keys have no bias, of which our fused tensor holds zeros
    assert num_biases == theirs_biases + absent


def test_deberta_v1_keys_never_get_a_bias():
    theirs, _, ours, batch, labels = pair("deberta")
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        ours(**batch, labels=labels).loss.backward()
        optimizer.step()
    assert all((layer.qkv.bias[64:128] == 0).all() and (layer.qkv.bias[:64] != 0).any() for layer in ours.encoder.layers)


def test_modernbert_without_biases_has_nothing_for_bitfit():
    with pytest.raises(ConfigError, match=r"'bias' \(bitfit\) trains biases, but this modernbert has none"):
        pair("modernbert", "bias")


@pytest.mark.parametrize("family, which", [(f, w) for f in FAMILIES for w in ("all", "bias") if (f, w) != ("modernbert", "bias")])
def test_three_adamw_steps_equal_transformers(family, which):
    """With an epsilon far above what rounding leaves of gradients that are zero (a key's bias), which AdamW would blow up."""
    theirs, head, ours, batch, labels = pair(family, which)
    for name, p in theirs.named_parameters():
        p.requires_grad_(which == "all" or name.endswith("bias"))
    first, second = (torch.optim.AdamW([p for p in some if p.requires_grad], lr=1e-2, eps=1e-3, weight_decay=0.1, fused=fused)
                     for some, fused in ((ours.parameters(), True), ([*theirs.parameters(), *head.parameters()], False)))
    history = []
    for _ in range(3):
        losses = []
        for optimizer, loss in ((first, ours(**batch, labels=labels).loss), (second, loss_of(theirs, head, batch, labels))):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        history.append(losses[0])
        with torch.no_grad():                     # the kernels, which run where no gradient is wanted, must see the new weights
            assert_close("loss", ours(**batch, labels=labels).loss, loss_of(theirs, head, batch, labels), 1e-4)
    assert max(history) - min(history) > 0.05
    wanted = ours_from(theirs, ours.encoder, dict(theirs.named_parameters()))
    for name, parameter in ours.encoder.named_parameters():
        if not name.startswith("pooler."):
            assert_close(name, parameter, wanted[name], 1e-4)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_pretrained_pooler_trains_where_it_is_read(family):
    theirs = tiny_model(family, "SequenceClassification" if family == "bert" else None, num_labels=3)
    ours = PromptedModel.from_pretrained(theirs, num_labels=3, prompt=NONE, trained_backbone="all")
    batch, labels = padded_batch([9, 4, 7], pad_id=theirs.config.pad_token_id), torch.tensor([0, 2, 1])
    ours(**batch, labels=labels).loss.backward()
    if family == "bert":
        theirs.classifier.load_state_dict(ours.head.classifier.state_dict())
        theirs(**batch, labels=labels).loss.backward()
        pooler = theirs.bert.pooler.dense
    else:
        logits = F.linear(theirs(**batch).pooler_output, ours.head.classifier.weight, ours.head.classifier.bias)
        F.cross_entropy(logits, labels).backward()
        pooler = theirs.pooler.dense
    assert_close("pooler", ours.encoder.pooler.weight.grad, pooler.weight.grad)
    tagger = pair(family)[2]
    assert not any(p.requires_grad for p in tagger.encoder.pooler.parameters())


@pytest.mark.parametrize("which", ["all", "bias"])
def test_a_deep_prompt_trains_beside_the_backbone(which):
    theirs, head, ours, batch, labels = pair("bert", which, PromptConfig(5, prompt_dropout=0.0))
    rows = ours.prompt.bank.detach()[0].clone().requires_grad_()
    loss, expected = ours(**batch, labels=labels).loss, loss_of(theirs, head, batch, labels, rows)
    assert_close("loss", loss, expected)
    loss.backward()
    expected.backward()
    assert_close("prompt", ours.prompt.bank.grad[0], rows.grad)
    wanted = ours_from(theirs, ours.encoder, gradients(theirs))
    for name, p in ours.encoder.named_parameters():
        if p.requires_grad:
            assert_close(name, p.grad, wanted[name])


@pytest.mark.parametrize("memory", ["exact", "minimal"])
def test_dropout_is_the_kernels_and_a_step_computed_again_draws_the_same(memory):
    """Frozen and trained models drop the same elements; the prompt's gradient, which both have, shows it."""
    prompt, seed, grads = PromptConfig(4, prompt_dropout=0.2), torch.tensor([7]), []
    for which in (None, "all"):
        torch.manual_seed(3)
        _, _, ours, batch, labels = pair("bert", which, prompt, memory=memory)
        ours.train()
        ours.head.dropout_p = 0.0
        ours(**batch, labels=labels, seed=seed).loss.backward()
        grads.append(ours.prompt.bank.grad)
    assert_close("prompt", grads[0], grads[1], 2e-5)


def glm(**options):
    config = {"model_type": "glm", "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 90,
              "max_sequence_length": 60, "output_dropout_prob": 0.0, "attention_dropout_prob": 0.0, "initializer_range": 0.2}
    torch.manual_seed(0)
    encoder, origin = random_encoder(config)
    return PromptedModel(encoder, origin, NONE, task="cloze", trained_backbone="all", **options).train()


@pytest.mark.parametrize("candidates", [False, True])
@pytest.mark.parametrize("memory", ["exact", "minimal"])
def test_glm_cloze_trains_the_tied_word_embeddings_through_the_head_too(candidates, memory):
    """Against finite differences in fp64: transformers has no such model. A word that is only an answer has a gradient too."""
    single = glm(verbalizer_ids=None if candidates else [50, 60])
    single.set_memory(memory)
    model = copy.deepcopy(single).double()
    lengths, T = torch.tensor([6, 5]), 11
    batch = {"input_ids": torch.arange(5, 5 + T), "seq_lengths": lengths, "causal_from": lengths - (3 if candidates else 1),
             "position_ids": torch.stack((torch.arange(T) % 6, torch.arange(T) % 3)), "labels": torch.tensor([1, 0])}
    if candidates:
        batch["target_ids"] = torch.full((T,), -100).index_copy(0, torch.tensor([3, 5, 8, 10]), torch.tensor([70, 71, 72, 73]))
        batch["candidate_ids"] = torch.full((T,), -1).index_copy(
            0, torch.tensor([3, 4, 5, 8, 9, 10]), torch.tensor([0, 1, 1, 0, 1, 1]))
    for m in (model, single):
        m(**batch).loss.backward()
    for (name, p), q in zip(single.named_parameters(), model.parameters(), strict=True):
        assert_close(name, p.grad, q.grad, 1e-4)
    word = model.encoder.embeddings.word
    for parameter, at in ((word, (70 if candidates else 60, 3)), (word, (6, 2)), (model.encoder.layers[0].qkv.weight, (4, 9)),
                          (model.encoder.final_norm_bias, (5,)), (model.encoder.embeddings.block, (1, 1))):
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter[at] += step
                losses.append(model(**batch).loss.item())
                parameter[at] -= step
        difference = (losses[0] - losses[1]) / 2e-5                 # of fp32 scores: it knows few digits
        assert parameter.grad[at] != 0 and abs(parameter.grad[at] - difference) <= 2e-2 * abs(difference) + 5e-3


def test_the_frozen_model_loses_nothing_by_it():
    """The model in memory that a backbone came from keeps its values, and a frozen model keeps sharing them."""
    theirs, _, ours, batch, labels = pair("bert")
    before = {name: t.clone() for name, t in theirs.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    ours(**batch, labels=labels).loss.backward()
    optimizer.step()
    assert all(torch.equal(before[name], t) for name, t in theirs.state_dict().items())
    frozen = PromptedModel.from_pretrained(theirs)
    assert frozen.encoder.embeddings.word.data_ptr() == theirs.embeddings.word_embeddings.weight.data_ptr()
    assert not any(p.requires_grad for p in frozen.encoder.parameters())


def test_training_does_not_write_into_the_checkpoints_file(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    ours = PromptedModel.from_pretrained(tmp_path, prompt=NONE, trained_backbone="all")
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == content
    assert not torch.equal(PromptedModel.from_pretrained(tmp_path).encoder.embeddings.word, ours.encoder.embeddings.word)


def test_a_bf16_checkpoint_is_trained_in_fp32():
    ours = PromptedModel.from_pretrained(tiny_model("bert").bfloat16(), prompt=NONE, trained_backbone="all")
    assert ours.dtype == torch.float32
    with pytest.raises(ConfigError, match="dtype torch.bfloat16: it swallows small updates; use dtype=torch.float32"):
        ours.set_backbone_dtype(torch.bfloat16)


@pytest.mark.parametrize("options, message", [
    ({"dtype": torch.bfloat16}, "dtype torch.bfloat16"), ({"frozen_dtype": "int8"}, "frozen_dtype 'int8': codes cannot"),
    ({"stream_weights": "host"}, "stream_weights 'host': nothing is written back"), ({"memory": "lean"}, "memory 'lean'"),
    ({"trained_backbone": "weights"}, "trained_backbone 'weights' does not exist; choose None, 'all'"),
])
def test_what_cannot_train_is_refused_with_the_way_out(options, message):
    with pytest.raises(ConfigError, match=message):
        PromptedModel.from_pretrained(tiny_model("bert"), **{"trained_backbone": "all"} | options)


def test_a_policy_that_cannot_train_is_refused_later_too():
    ours = pair("bert")[2]
    with pytest.raises(ConfigError, match="memory 'lean'"):
        ours.set_memory("lean")
    frozen, origin = load_encoder(tiny_model("deberta"))
    with pytest.raises(ConfigError, match="projected for good when it was loaded.*trained_backbone='all'"):
        PromptedModel(frozen, origin, NONE, trained_backbone="all")


def test_weight_decay_spares_biases_and_norms_where_the_backbone_trains():
    theirs, _, ours, *_ = pair("bert", prompt=PromptConfig(4))
    groups = {g["name"]: g for g in parameter_groups(ours, 0.1, head_lr=5e-3)}
    assert {n: g["weight_decay"] for n, g in groups.items()} == {
        "prompt": 0.1, "head": 0.1, "head, no decay": 0.0, "backbone": 0.1, "backbone, no decay": 0.0}
    assert groups["head"]["lr"] == groups["head, no decay"]["lr"] == 5e-3 and "lr" not in groups["backbone"]
    # transformers' own rule, on the backbone
    decays = transformers.trainer_pt_utils.get_parameter_names(theirs, [torch.nn.LayerNorm], ["bias"])
    wanted = sum(p.numel() for n, p in theirs.named_parameters() if n in decays and not n.startswith("pooler."))
    assert sum(p.numel() for p in groups["backbone"]["params"]) == wanted
    frozen = parameter_groups(pair("bert", None, PromptConfig(4))[2], 0.1)
    assert [(g["name"], g["weight_decay"], len(g["params"])) for g in frozen] == [("prompt", 0.1, 1), ("head", 0.1, 2)]


@pytest.mark.parametrize("family, which, task", [
    ("bert", "all", "sequence-classification"), ("roberta", "all", "sequence-classification"),
    ("roberta", "bias", "sequence-classification"), ("deberta", "all", "token-classification"),
    ("deberta-v2", "bias", "sequence-classification"), ("modernbert", "all", "question-answering"),
])
def test_a_trained_backbone_comes_back(family, which, task, tmp_path):
    base = tiny_model(family)
    ours = PromptedModel.from_pretrained(base, task=task, prompt=PromptConfig(3), trained_backbone=which)
    with torch.no_grad():
        for p in ours.trained_parameters().values():
            p.add_(torch.randn_like(p) * 0.1)
    ours.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        saved = {n.removeprefix("ptv2.encoder.") for n in file.keys() if n.startswith("ptv2.encoder.")}  # noqa: SIM118
    assert saved == {n for n, p in ours.encoder.named_parameters() if p.requires_grad}
    back = PromptedModel.from_adapter(tmp_path, backbone=base)
    batch = padded_batch([9, 4, 7], pad_id=base.config.pad_token_id)
    assert back.encoder.trained_backbone == which and set(back.trained_parameters()) == set(ours.trained_parameters())
    first = [m(**batch, return_dict=False)[0] for m in (ours, back)]
    assert torch.equal(*first)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PTV2"
    with pytest.raises(AdapterError, match="trained_backbone"):
        ours.save_peft(tmp_path / "peft")
    with pytest.raises(AdapterMismatch, match="was trained on"):
        PromptedModel.from_adapter(tmp_path, backbone=tiny_model(family, seed=5))
    load_adapter_into(ours, tmp_path)                                         # as a resumed run does
    PromptedModel.from_pretrained(base, task=task, prompt=PromptConfig(3)).save_pretrained(tmp_path / "frozen")
    with pytest.raises(AdapterError, match="lacks the tensor ptv2.encoder"):
        load_adapter_into(ours, tmp_path / "frozen")


def test_a_frozen_models_file_knows_nothing_of_it(tmp_path):
    ours = PromptedModel.from_pretrained(tiny_model("roberta"))
    ours.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert set(file.keys()) == {"prompt_embeddings", *(f"base_model.classifier.{a}.{w}" for a in ("dense", "out_proj")
                                                           for w in ("weight", "bias"))}
        assert "trained_backbone" not in file.metadata()["ptv2_config"]


def test_the_trainer_fine_tunes_saves_and_resumes_bit_for_bit(tmp_path, caplog):
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(5, 120, (int(n),), generator=generator).tolist()} for n in range(3, 35)]
    for row in rows:
        row["label"] = int(row["input_ids"][1] > 60)

    def run(folder, steps, **options):
        torch.manual_seed(0)
        model = PromptedModel.from_pretrained(tiny_model("bert"), prompt=NONE, trained_backbone="all")
        args = transformers.TrainingArguments(
            str(tmp_path / folder), per_device_train_batch_size=8, max_steps=steps, save_steps=4, learning_rate=1e-3,
            report_to=[], use_cpu=True, logging_steps=8, disable_tqdm=True, lr_scheduler_type="constant", weight_decay=0.01)
        with caplog.at_level(logging.DEBUG, "ptv2_engine"):
            trainer = Trainer(model, args, train_dataset=rows)
        return trainer, trainer.train(**options).training_loss

    whole, _ = run("whole", 8)
    assert "memory is not planned" in caplog.text
    again, _ = run("again", 8, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    fresh = dict(PromptedModel.from_pretrained(tiny_model("bert"), prompt=NONE).encoder.named_parameters())
    changed = {n for n, p in whole.model.encoder.named_parameters() if not torch.equal(p, fresh[n])}
    assert changed == {n for n, p in whole.model.encoder.named_parameters() if p.requires_grad}
    back = PromptedModel.from_adapter(tmp_path / "whole" / "checkpoint-8", backbone=tiny_model("bert"))
    batch = padded_batch([9, 4])
    assert torch.equal(back(**batch).logits, whole.model.eval()(**batch).logits)
