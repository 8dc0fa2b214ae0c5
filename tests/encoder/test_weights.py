"""Loading: every source gives the same encoder, and every defect gets one sentence that names it."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptv2_engine.encoder import Encoder, load_encoder
from ptv2_engine.errors import CheckpointError, ConfigError, InputError, SequenceTooLong, WeightError
from ptv2_engine.packing import pack
from ptv2_engine.testing import padded_batch, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("bert", "SequenceClassification")


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def output(encoder):
    batch = padded_batch([6, 3])
    return encoder.eval()(pack(batch["input_ids"], batch["attention_mask"]))


def test_every_source_gives_the_same_encoder(model, folder, tmp_path_factory):
    expected, origin = load_encoder(model)
    reference = output(expected)
    bin_folder = tmp_path_factory.mktemp("bin")
    (bin_folder / "config.json").write_text((folder / "config.json").read_text())
    torch.save(model.state_dict(), bin_folder / "pytorch_model.bin")
    sharded = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(sharded, max_shard_size="40KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    bare = tmp_path_factory.mktemp("bare")
    model.bert.save_pretrained(bare)
    for source in (folder, str(folder), bin_folder, sharded, bare, model.bert):
        encoder, other = load_encoder(source)
        assert torch.equal(output(encoder), reference), source
        assert other.weights_hash == origin.weights_hash, source


def test_a_model_in_memory_shares_its_storage(model):
    encoder = Encoder.from_pretrained(model)
    assert encoder.embeddings.word.data_ptr() == model.bert.embeddings.word_embeddings.weight.data_ptr()
    assert encoder.layers[1].ffn_up.weight.data_ptr() == model.bert.encoder.layer[1].intermediate.dense.weight.data_ptr()
    assert all(not p.requires_grad for p in encoder.parameters())


def test_target_dtype_and_fingerprint(model, folder):
    encoder, origin = load_encoder(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    half, half_origin = load_encoder(tiny_model("bert", "SequenceClassification").bfloat16())
    assert half.dtype == torch.bfloat16 and half_origin.weights_hash == origin.weights_hash
    other = load_encoder(tiny_model("bert", seed=1))[1]
    assert other.weights_hash != origin.weights_hash


@pytest.mark.parametrize("kind", ["safetensors", "sharded", "bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_holds_the_weights_and_one_tensor_more(kind, dtype, tmp_path):
    """Bytes torch allocates while loading, counted by its own profiler; the files' memory maps are not memory.

    Without a cast only the fused q, k, v projections are new; with one, the weights and at most one tensor beside them.
    """
    saved = tiny_model("bert", num_hidden_layers=4)
    saved.save_pretrained(tmp_path, **({"max_shard_size": "60KB"} if kind == "sharded" else {}))
    if kind == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    mapped = {file.stat().st_size for file in tmp_path.iterdir()}
    live = peak = 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        encoder = Encoder.from_pretrained(tmp_path, dtype=dtype)
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and abs(event.nbytes()) not in mapped:
            live += event.nbytes()
            peak = max(peak, live)
    new = [p for name, p in encoder.named_parameters() if dtype != torch.float32 or "qkv" in name]
    weights, largest = sum(p.nbytes for p in new), max(p.numel() for p in encoder.parameters()) * 4
    assert weights <= peak <= weights + largest


def test_old_layer_norm_names(model, folder):
    reference = output(Encoder.from_pretrained(model))

    def rename(tensors):
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name)

    rewrite(folder, rename)
    assert torch.equal(output(Encoder.from_pretrained(folder)), reference)


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("bert.encoder.layer.1.attention.self.key.weight"),
     "lacks weight encoder.layer.1.attention.self.key.weight;"),
    (lambda t: t.update({"bert.encoder.layer.0.adapter.weight": torch.ones(2)}),
     "has the unknown weight encoder.layer.0.adapter.weight;"),
    (lambda t: t.update({"bert.encoder.layer.2.output.dense.bias": torch.ones(5)}),
     r"weight bert.encoder.layer.2.output.dense.bias is \(5,\), but config.json implies \(64,\)"),
    (lambda t: t.update({"bert.encoder.layer.2.attention.self.value.bias": torch.ones(7)}),
     r"attention.self.value.bias is \(7,\)"),
    (lambda t: t.pop("bert.pooler.dense.bias"), "lacks weight pooler.dense.bias"),
])
def test_missing_unknown_and_misshaped_weights_are_named(folder, change, words):
    rewrite(folder, change)
    with pytest.raises(WeightError, match=words):
        load_encoder(folder)


def test_heads_and_buffers_are_not_unknown(folder):
    rewrite(folder, lambda t: t.update({"cls.predictions.bias": torch.ones(3),
                                        "bert.embeddings.position_ids": torch.arange(80)[None]}))
    load_encoder(folder)


class Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_broken_and_unsafe_files(model, folder, capsys):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(CheckpointError, match="is corrupt or truncated .* download or save it again"):
        load_encoder(folder)
    torch.save(model.state_dict(), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="is a pickle, not safetensors"):
        load_encoder(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil()}))
    with pytest.raises(CheckpointError, match="pickled objects beside tensors, which are never run"):
        load_encoder(folder)
    assert "must never run" not in capsys.readouterr().out
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(WeightError, match=r"holds neither model.safetensors nor pytorch_model.bin"):
        load_encoder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="has no config.json"):
        load_encoder(folder)


@pytest.mark.parametrize("change, words", [
    ({"model_type": "gpt2"}, "model_type 'gpt2' has no encoder here"),
    ({"hidden_act": "relu"}, "hidden_act = 'relu', but this stack computes one of"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
    ({"is_decoder": True}, "is_decoder = True"),
])
def test_unsupported_switches_are_named(folder, change, words):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=words):
        load_encoder(folder)


def test_ids_and_lengths_outside_the_tables(model):
    encoder = Encoder.from_pretrained(model)
    with pytest.raises(InputError, match="token id 120 is outside the table of 120 rows"):
        encoder(pack(torch.tensor([[5, 120]])))
    with pytest.raises(InputError, match="token id -1 is outside"):
        encoder(pack(torch.tensor([[5, -1]])))
    with pytest.raises(InputError, match="token type 2 is outside the table of 2"):
        encoder(pack(torch.tensor([[5, 6]]), None, torch.tensor([[0, 2]])))
    with pytest.raises(SequenceTooLong, match=r"sequence 81 = 81 positions, but this bert model has 80. Truncate to 80 tokens"):
        encoder(pack(torch.full((1, 81), 5)))
