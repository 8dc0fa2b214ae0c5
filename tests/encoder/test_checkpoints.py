"""Files that are not what their name says: each gets one sentence, never a bare KeyError, and no pickle is run."""

from __future__ import annotations

import json

import pytest
import torch

from ptv2_engine.encoder import Encoder, load_encoder
from ptv2_engine.errors import CheckpointError, ConfigError, InputError, SequenceTooLong, WeightError
from ptv2_engine.packing import from_packed, pack
from ptv2_engine.testing import tiny_model

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model():
    return tiny_model("bert")


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def bin_folder(folder):
    (folder / "model.safetensors").unlink()
    return folder


def write_bin(folder, content):
    torch.save(content, folder / "pytorch_model.bin")


def test_a_bin_file_that_is_no_dictionary_of_tensors(model, bin_folder):
    for content in ([torch.ones(2)], {"state_dict": model.state_dict(), "step": 3}, model.state_dict() | {"embeddings.x": 3.5}):
        write_bin(bin_folder, content)
        with pytest.raises(CheckpointError, match="is not a plain dictionary of tensors; save the model's state_dict"):
            load_encoder(bin_folder)


@pytest.mark.parametrize("damage", [lambda w: b"", lambda w: w[:len(w) // 2], lambda w: w[:100] + bytes(50) + w[150:]])
def test_a_damaged_bin_file(model, bin_folder, damage):
    write_bin(bin_folder, model.state_dict())
    whole = (bin_folder / "pytorch_model.bin").read_bytes()
    (bin_folder / "pytorch_model.bin").write_bytes(damage(whole))
    with pytest.raises(CheckpointError, match="pytorch_model.bin is corrupt"):
        load_encoder(bin_folder)


def test_a_bin_file_of_the_format_before_torch_1_6(model, bin_folder):
    torch.save(model.state_dict(), bin_folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert load_encoder(bin_folder)[1].weights_hash == load_encoder(model)[1].weights_hash


def test_sharded_bin_files(model, bin_folder):
    tensors = model.state_dict()
    names = sorted(tensors)
    shards = {"a.bin": names[::2], "b.bin": names[1::2]}
    for file, part in shards.items():
        torch.save({n: tensors[n] for n in part}, bin_folder / file)
    weight_map = {n: file for file, part in shards.items() for n in part}
    (bin_folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert load_encoder(bin_folder)[1].weights_hash == load_encoder(model)[1].weights_hash
    (bin_folder / "b.bin").unlink()
    with pytest.raises(WeightError, match="but not its shard b.bin"):
        load_encoder(bin_folder)


@pytest.mark.parametrize("text, words", [("{", "is not valid JSON"), ("{}", "has no weight_map"), ("[]", "holds a list")])
def test_a_defective_index(folder, text, words):
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=words):
        load_encoder(folder)


@pytest.mark.parametrize("content, words", [(b"{", "is not valid JSON"), (b"[1]", "holds a list"),
                                            (b"\xff\xfe{", "is not valid JSON")])
def test_a_defective_config_file(folder, content, words):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        load_encoder(folder)


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                                  "max_position_embeddings", "type_vocab_size"])
@pytest.mark.parametrize("value", [None, 0, "4"])
def test_a_size_that_is_missing_or_no_size(folder, name, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(ConfigError, match=f"{name} = {value!r}, but this stack computes sizes of 1 or more"):
        load_encoder(folder)


def test_more_or_fewer_layers_than_the_config_says(folder):
    config = json.loads((folder / "config.json").read_text())
    for layers, words in ((4, "lacks weight encoder.layer.3.*and 13 more"),
                          (2, "has the unknown weight encoder.layer.2.*and 13 more")):
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        with pytest.raises(WeightError, match=words):
            load_encoder(folder)


def test_roberta_without_a_pad_id_counts_positions_from_2(tmp_path):
    tiny_model("roberta").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    config = Encoder.from_pretrained(tmp_path).config
    assert (config.position_offset, config.uncounted_id, config.max_length(3)) == (2, 1, 80 - 2 - 3)


def test_a_hub_id_is_found_through_transformers(model, folder, monkeypatch):
    asked = []

    def cached_file(source, filename, **_):
        asked.append((source, filename))
        return str(folder / filename) if (folder / filename).is_file() else None

    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    assert load_encoder("someone/tiny-bert")[1].weights_hash == load_encoder(model)[1].weights_hash
    assert asked == [("someone/tiny-bert", "config.json"), ("someone/tiny-bert", "model.safetensors")]

    def offline(*_args, **_kwargs):
        raise OSError("no connection\nand a page of advice")

    monkeypatch.setattr("transformers.utils.cached_file", offline)
    with pytest.raises(WeightError, match=r"nor a hub repository that can be reached \(no connection\); check the spelling"):
        load_encoder("someone/tiny-bert")


def test_a_module_that_is_no_transformers_model():
    with pytest.raises(ConfigError, match="a Linear has no transformers config"):
        load_encoder(torch.nn.Linear(2, 2))


def test_tokens_at_columns_beyond_the_position_table(model):
    """Left padding moves tokens: the column counts, not the number of tokens."""
    encoder = Encoder.from_pretrained(model)
    mask = torch.zeros(2, 90, dtype=torch.long)
    mask[:, 70:80] = 1
    ids = torch.full((2, 90), 5)
    assert encoder(pack(ids, mask)).shape == (20, 64)
    mask[1, 80] = 1
    with pytest.raises(SequenceTooLong, match="81 positions, but this bert model has 80"):
        encoder(pack(ids, mask))


def test_prompt_ids_and_lengths_outside_the_bank(model):
    from ptv2_engine.encoder import Prefix

    encoder = Encoder.from_pretrained(model)
    parts = [torch.randn(2, 3, 4, 16) for _ in range(3)]
    for ids, lengths, words in (([0, 2], None, "prompt id 2 is outside 0..1"), ([-1, 0], None, "prompt id -1 is outside"),
                                ([0, 1], [3, 4], "prompt length 4 is outside 0..3")):
        batch = from_packed(torch.full((5,), 6), torch.tensor([4, 1]), prompt_ids=torch.tensor(ids))
        with pytest.raises(InputError, match=words):
            encoder(batch, Prefix(parts, parts, 3, None if lengths is None else torch.tensor(lengths), 0.0))
