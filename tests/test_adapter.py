"""Adapter files: round trips with PEFT both ways, the published code's checkpoints, crashes, and everything that can be wrong."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch
import transformers
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from ptv2_engine import PromptConfig, PromptedModel
from ptv2_engine import adapter as adapter_module
from ptv2_engine.errors import AdapterError, AdapterMismatch, CheckpointError, OutputError
from ptv2_engine.testing import padded_batch, tiny_model, with_prefix

TASKS = {"sequence-classification": "SequenceClassification", "token-classification": "TokenClassification"}
CASES = [(family, task) for family in ("bert", "roberta", "electra") for task in TASKS]


def make(family="bert", task="sequence-classification", prompt=None, **options):
    base = tiny_model(family, TASKS[task], num_labels=3)
    ours = PromptedModel.from_pretrained(base, task=task, num_labels=3, prompt=prompt or PromptConfig(5), **options).eval()
    with torch.no_grad():
        for p in ours.trained_parameters().values():
            p.normal_(0, 0.5)
    batch = padded_batch([9, 4, 7], pad_id=base.config.pad_token_id)
    return base, ours, batch


def assert_same_logits(a, b, batch, tolerance=1e-5):
    a, b = (m(**batch).logits for m in (a, b))
    if a.dim() == 3:
        a, b = (x[batch["attention_mask"].bool()] for x in (a, b))
    assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("family, task", CASES)
def test_our_folder_loads_in_peft(family, task, tmp_path):
    base, ours, batch = make(family, task)
    ours.save_pretrained(tmp_path)
    assert_same_logits(ours, PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval(), batch)


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_peft_loads_a_reparameterized_prompt_beside_keys_it_does_not_know(kind, tmp_path):
    base, ours, batch = make(prompt=PromptConfig(5, reparameterization=kind, reparameterization_hidden=16))
    ours.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {f"ptv2.prompt.{n}" for n, _ in ours.prompt.named_parameters()} < names and "prompt_embeddings" in names
    assert_same_logits(ours, PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval(), batch)
    ours.save_peft(tmp_path / "plain")
    assert not any(n.startswith("ptv2.") for n in load_file(tmp_path / "plain" / "adapter_model.safetensors"))
    assert_same_logits(PromptedModel.from_peft(tmp_path / "plain", base), ours, batch)


def test_a_pooler_that_transformers_left_out_is_no_other_backbone(tmp_path):
    whole = tiny_model("roberta")
    whole.save_pretrained(tmp_path / "backbone")
    headed = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "backbone", num_labels=3)
    ours = PromptedModel.from_pretrained(headed, task="token-classification").eval()
    ours.save_pretrained(tmp_path / "adapter")
    batch = padded_batch([9, 4, 7], pad_id=1)
    assert_same_logits(PromptedModel.from_adapter(tmp_path / "adapter"), ours, batch)


def test_another_pooler_is_another_backbone_only_where_it_is_used(tmp_path):
    base, ours, _ = make()
    ours.save_pretrained(tmp_path / "frozen")
    _, trained, batch = make(pooler="trained")
    trained.save_pretrained(tmp_path / "trained")
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.bert.pooler.dense.weight.add_(1)
    with pytest.raises(AdapterMismatch, match=r"\(pooler [0-9a-f]{12}\), but .* has other pooler"):
        PromptedModel.from_adapter(tmp_path / "frozen", backbone=other)
    assert_same_logits(PromptedModel.from_adapter(tmp_path / "trained", backbone=other), trained, batch)


def test_a_peft_adapter_on_a_base_without_its_pooler_is_refused(tmp_path):
    _, ours, _ = make()
    ours.save_peft(tmp_path)
    with pytest.raises(AdapterError, match="relies on the backbone's pretrained pooler, but .* has none"):
        PromptedModel.from_peft(tmp_path, tiny_model("bert", "TokenClassification"))


def test_a_backbone_that_is_gone_or_settings_of_another_version_say_so(tmp_path):
    base, ours, _ = make()
    ours.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="was trained on a model in memory, which cannot be loaded .*; pass its folder"):
        PromptedModel.from_adapter(tmp_path)
    tensors, metadata = adapter_module.read_tensors(tmp_path / "adapter_model.safetensors")
    config = json.loads(metadata["ptv2_config"])
    config["ptv2"] |= {"version": "9.9", "prompt": config["ptv2"]["prompt"] | {"colour": "red"}}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata | {"ptv2_config": json.dumps(config)})
    with pytest.raises(AdapterError, match="was saved by version 9.9 and this is .* cannot read its settings .*colour"):
        PromptedModel.from_adapter(tmp_path, backbone=base)

@pytest.mark.parametrize("family, task", CASES)
def test_a_peft_folder_loads_here(family, task, tmp_path):
    base, _, batch = make(family, task)
    peft_task = "SEQ_CLS" if task.startswith("seq") else "TOKEN_CLS"
    peft = get_peft_model(copy.deepcopy(base), PrefixTuningConfig(task_type=peft_task, num_virtual_tokens=5)).eval()
    peft.save_pretrained(tmp_path)
    ours = PromptedModel.from_peft(tmp_path, base)
    assert_same_logits(ours, peft, batch)
    again = tmp_path / "again"
    ours.save_peft(again)
    assert "ptv2" not in json.loads((again / "adapter_config.json").read_text())
    assert_same_logits(PeftModel.from_pretrained(copy.deepcopy(base), again).eval(), peft, batch)


@pytest.mark.parametrize("prompt, options", [
    (PromptConfig(5), {}), (PromptConfig(5, prompt_layers=[1]), {}),
    (PromptConfig(4, reparameterization="mlp", reparameterization_hidden=16), {}),
    (PromptConfig(4, reparameterization="lstm", reparameterization_hidden=16), {"shift_positions": False}),
    (PromptConfig(4, method="shallow"), {}), (PromptConfig(method="none"), {"pooler": "trained"}),
    (PromptConfig(6, num_prompts=2, prompt_lengths=[6, 3]), {"problem_type": "multi_label_classification"}),
])
def test_everything_trained_comes_back(prompt, options, tmp_path):
    base, ours, batch = make(prompt=prompt, id2label={0: "a", 1: "b", 2: "c"}, **options)
    ours.save_pretrained(tmp_path)
    back = PromptedModel.from_adapter(tmp_path, backbone=base)
    assert_same_logits(back, ours, batch, 1e-7)
    assert back.id2label == {0: "a", 1: "b", 2: "c"} and back.problem_type == ours.problem_type
    theirs, mine = ({n: p.tolist() for n, p in m.trained_parameters().items()} for m in (back, ours))
    assert theirs == mine


def test_the_file_holds_exactly_prompt_and_head(tmp_path):
    _, ours, _ = make()
    ours.save_pretrained(tmp_path)
    assert {n: tuple(t.shape) for n, t in load_file(tmp_path / "adapter_model.safetensors").items()} == {
        "prompt_embeddings": (5, 384), "base_model.classifier.weight": (3, 64), "base_model.classifier.bias": (3,)}
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_backbone_is_found_by_its_folder(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "backbone")
    ours = PromptedModel.from_pretrained(tmp_path / "backbone", num_labels=2).eval()
    ours.save_pretrained(tmp_path / "adapter")
    assert_same_logits(PromptedModel.from_adapter(tmp_path / "adapter"), ours, padded_batch([5, 3]), 1e-7)


def test_init_from_a_saved_adapter(tmp_path):
    base, ours, _ = make()
    ours.save_pretrained(tmp_path)
    started = PromptedModel.from_pretrained(base, num_labels=2, prompt=PromptConfig(5, init=str(tmp_path)))
    assert torch.equal(started.prompt.bank, ours.prompt.bank)


class PublishedPrefixEncoder(torch.nn.Module):
    """The prefix encoder of the published code, from its description: two shapes of state dict."""

    def __init__(self, projection: bool) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 64 if projection else 384)
        if projection:
            self.trans = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 384))

    def forward(self) -> torch.Tensor:
        return self.trans(self.embedding.weight) if hasattr(self, "trans") else self.embedding.weight


@pytest.mark.parametrize("projection", [False, True])
def test_published_deberta_checkpoints_import_with_their_trained_pooler(projection, tmp_path):
    """The published DeBERTa class keeps its ContextPooler outside the backbone, trained."""
    base = tiny_model("deberta", "SequenceClassification", num_labels=3)
    encoder = PublishedPrefixEncoder(projection)
    torch.save(base.state_dict() | {f"prefix_encoder.{n}": t for n, t in encoder.state_dict().items()},
               tmp_path / "pytorch_model.bin")
    ours = PromptedModel.from_thudm(tmp_path, base)
    assert ours.task == "sequence-classification" and ours.num_labels == 3
    torch.testing.assert_close(ours.prompt.rows()[0], encoder())
    torch.testing.assert_close(ours.head.dense.weight, base.pooler.dense.weight)
    torch.testing.assert_close(ours.head.classifier.weight, base.classifier.weight)
    bare = PromptedModel.from_pretrained(base, num_labels=3, prompt=PromptConfig(method="none"))
    bare.head.load_state_dict(ours.head.state_dict())
    batch = padded_batch([9, 4, 6])
    theirs = base(**batch).logits
    assert (bare(**batch).logits - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_published_checkpoints_import(projection, task, tmp_path):
    base, _, batch = make("bert", task)
    encoder = PublishedPrefixEncoder(projection)
    state = base.state_dict() | {f"prefix_encoder.{n}": t for n, t in encoder.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    ours = PromptedModel.from_thudm(tmp_path / "pytorch_model.bin", base)
    assert ours.task == task and ours.num_labels == 3
    torch.testing.assert_close(ours.prompt.rows()[0], encoder())
    torch.testing.assert_close(ours.head.classifier.weight, base.classifier.weight)
    assert ours(**batch).logits.shape[-1] == 3
    from_folder = PromptedModel.from_thudm(tmp_path, base)
    assert_same_logits(from_folder, ours, batch, 1e-7)


def published_file(path, base):
    encoder = PublishedPrefixEncoder(projection=False)
    torch.save(base.state_dict() | {f"prefix_encoder.{n}": t for n, t in encoder.state_dict().items()}, path)
    return encoder.embedding.weight.detach()


def test_a_published_checkpoint_equals_transformers_and_keeps_its_own_pooler(tmp_path):
    base, _, batch = make("bert")
    rows = published_file(tmp_path / "pytorch_model.bin", base)
    theirs = with_prefix(base, rows, batch)
    same = PromptedModel.from_thudm(tmp_path, base)
    assert same.pooler_kind == "frozen"
    assert_same_logits(same, lambda **_: theirs, batch)
    bare = transformers.BertForTokenClassification(base.config)      # its encoder has no pooler
    bare.load_state_dict({n: t for n, t in base.state_dict().items() if ".pooler." not in n})
    own = PromptedModel.from_thudm(tmp_path, bare)
    assert own.pooler_kind == "trained"
    assert_same_logits(own, lambda **_: theirs, batch)


def test_a_published_checkpoint_of_another_backbone_is_refused(tmp_path):
    base, _, _ = make("bert")
    published_file(tmp_path / "pytorch_model.bin", base)
    with pytest.raises(AdapterMismatch, match=r"holds a backbone \(weights [0-9a-f]{12}\) that is not"):
        PromptedModel.from_thudm(tmp_path, tiny_model("bert", seed=1))


def test_another_backbone_is_refused(tmp_path):
    _, ours, _ = make()
    ours.save_pretrained(tmp_path)
    words = r"was trained on .* \(weights [0-9a-f]{12}\), but .* has other weights .* pass the original one"
    with pytest.raises(AdapterMismatch, match=words):
        PromptedModel.from_adapter(tmp_path, backbone=tiny_model("bert", seed=1))


@pytest.mark.parametrize("prompt, words", [
    (PromptConfig(5, prompt_layers=2), "prompt_layers 2"), (PromptConfig(5, method="shallow"), "method 'shallow'"),
    (PromptConfig(5, num_prompts=2), "num_prompts 2")])
def test_what_peft_cannot_express_says_so(prompt, words, tmp_path):
    base, ours, _ = make(prompt=prompt)
    with pytest.raises(AdapterError, match=f"PEFT's PREFIX_TUNING cannot express {words}"):
        ours.save_peft(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    ours.save_pretrained(tmp_path / "y")
    assert json.loads((tmp_path / "y" / "adapter_config.json").read_text())["peft_type"] == "PTV2"


def test_damaged_files(tmp_path):
    base, ours, _ = make()
    ours.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="is corrupt or truncated"):
        PromptedModel.from_adapter(tmp_path, backbone=base)
    torch.save({"x": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match="is a pickle, not safetensors"):
        PromptedModel.from_adapter(tmp_path, backbone=base)
    file.unlink()
    with pytest.raises(AdapterError, match="holds no adapter_model.safetensors; pass the folder that save_pretrained wrote"):
        PromptedModel.from_adapter(tmp_path, backbone=base)
    torch.save({"x": torch.ones(1)}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="it has adapter_model.bin, a pickle"):
        PromptedModel.from_adapter(tmp_path, backbone=base)
    file.write_bytes(whole)
    metadata = PromptedModel.from_adapter(tmp_path, backbone=base)      # the header alone is enough without the JSON
    (tmp_path / "adapter_config.json").unlink()
    assert_same_logits(PromptedModel.from_adapter(tmp_path, backbone=base), metadata, padded_batch([4]), 1e-7)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    base, ours, _ = make()
    ours.save_pretrained(tmp_path)
    tensors, metadata = adapter_module.read_tensors(tmp_path / "adapter_model.safetensors")
    save_file(tensors | {"prompt_embeddings": torch.ones(4, 384)}, tmp_path / "adapter_model.safetensors", metadata)
    with pytest.raises(AdapterError, match=r"prompt_embeddings is \(1, 4, 384\), but \(1, 5, 384\) is expected"):
        PromptedModel.from_adapter(tmp_path, backbone=base)
    del tensors["base_model.classifier.bias"]
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata)
    with pytest.raises(AdapterError, match="lacks the tensor base_model.classifier.bias"):
        PromptedModel.from_adapter(tmp_path, backbone=base)


def test_an_unwritable_folder_loses_nothing(tmp_path):
    _, ours, _ = make()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"cannot write the adapter to .*file.* choose a folder you may write to"):
        ours.save_pretrained(tmp_path / "file" / "adapter")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_crash_while_saving_leaves_the_old_adapter(tmp_path, monkeypatch):
    base, ours, batch = make()
    ours.save_pretrained(tmp_path)
    before = copy.deepcopy(ours.state_dict())
    with torch.no_grad():
        ours.prompt.bank.add_(1)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        ours.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    ours.load_state_dict(before)
    assert_same_logits(PromptedModel.from_adapter(tmp_path, backbone=base), ours, batch, 1e-7)


def test_other_programs_files_say_what_they_lack(tmp_path):
    base, ours, _ = make()
    torch.save({"x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(AdapterError, match="lacks prefix_encoder.embedding.weight; it is not a checkpoint of P-Tuning v2"):
        PromptedModel.from_thudm(tmp_path, base)
    ours.save_peft(tmp_path)
    with pytest.raises(AdapterError, match="is a PREFIX_TUNING adapter that this package did not write; use .*from_peft"):
        PromptedModel.from_adapter(tmp_path, backbone=base)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
    with pytest.raises(AdapterError, match="is a LORA adapter for SEQ_CLS; PREFIX_TUNING for SEQ_CLS or TOKEN_CLS or QUES"):
        PromptedModel.from_peft(tmp_path, base)
