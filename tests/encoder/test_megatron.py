"""Megatron checkpoints: the merged tensors are the unsplit ones, no pickle is run, and one tensor is read at a time."""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from ptv2_engine.encoder import Encoder, megatron
from ptv2_engine.encoder.glm_sizes import BPE, SIZES, glm_config, num_parameters
from ptv2_engine.encoder.megatron import open_megatron
from ptv2_engine.errors import CheckpointError, ConfigError
from ptv2_engine.packing import pack
from tests.encoder.plain_glm import PlainGLM

HIDDEN, LAYERS, VOCAB, LENGTH = 128, 2, 256, 12
WORDS = "word_embeddings.weight"


def shapes(hidden=HIDDEN, layers=LAYERS):
    """Names and shapes of an unsplit GLM."""
    table = {WORDS: (VOCAB, hidden)}
    table |= {f"transformer.{kind}position_embeddings.weight": (LENGTH + 1, hidden) for kind in ("", "block_")}
    for i in range(layers):
        p = f"transformer.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            table |= {f"{p}{norm}.weight": (hidden,), f"{p}{norm}.bias": (hidden,)}
        for linear, (rows, columns) in {"attention.query_key_value": (3 * hidden, hidden), "attention.dense": (hidden, hidden),
                                        "mlp.dense_h_to_4h": (4 * hidden, hidden),
                                        "mlp.dense_4h_to_h": (hidden, 4 * hidden)}.items():
            table |= {f"{p}{linear}.weight": (rows, columns), f"{p}{linear}.bias": (rows,)}
    return table | {"transformer.final_layernorm.weight": (hidden,), "transformer.final_layernorm.bias": (hidden,)}


def model(hidden=HIDDEN, dtype=torch.float16):
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes(hidden).items()}


def part_of(name, tensor, rank, ranks):
    """What rank `rank` of `ranks` holds: ColumnParallelLinear splits outputs, RowParallelLinear inputs, q, k, v each alike."""
    def cut(t, dim=0):
        size = t.shape[dim] // ranks
        return t.narrow(dim, rank * size, size)

    if "query_key_value" in name:
        third = tensor.shape[0] // 3
        return torch.cat([cut(tensor[:third]), cut(tensor[third:2 * third]), cut(tensor[2 * third:])])
    if name == WORDS or "dense_h_to_4h" in name:
        return cut(tensor).clone()
    if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
        return cut(tensor, 1).clone()
    return tensor.clone()


def junk():
    """What training leaves beside the weights."""
    return {"iteration": 7, "optimizer": {"state": {0: {"exp_avg": torch.zeros(64, 64)}}, "fp32": [torch.ones(5)]},
            "np_rng_state": np.random.get_state(), "random_rng_state": random.getstate(),
            "torch_rng_state": torch.get_rng_state(), "loss_scale": np.float32(2.0), "param_shapes": [torch.Size([2, 3])],
            "csr_tensor_module_names": set(), "lr_scheduler": {"num_iters": 3}, "mp_world_size": 2}


def write(folder, tensors, ranks=1, prefix="", **beside):
    folder.mkdir(exist_ok=True)
    for rank in range(ranks):
        module = {prefix + name: part_of(name, tensor, rank, ranks) for name, tensor in tensors.items()}
        torch.save({"module": module, **beside}, folder / f"mp_rank_{rank:02d}_model_states.pt")
    return folder


@pytest.fixture(scope="module")
def whole():
    return model()


def assert_is(checkpoint, whole):
    assert set(checkpoint.names()) == set(whole)
    for name, tensor in whole.items():
        found = checkpoint.get(name)
        assert found.dtype == tensor.dtype and found.is_contiguous()
        torch.testing.assert_close(found, tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("with_args", [False, True])
def test_merged_tensors_and_config(whole, tmp_path, ranks, with_args):
    beside = junk() | ({"args": argparse.Namespace(num_attention_heads=4, attention_scale=8.0, fp16=True, params=torch.half,
                                                   seed=np.int64(3))} if with_args else {})
    checkpoint = open_megatron(write(tmp_path, whole, ranks, **beside))
    assert_is(checkpoint, whole)
    assert checkpoint.location == str(tmp_path)
    expected = glm_config(LAYERS, HIDDEN, 4 if with_args else HIDDEN // 64, VOCAB, LENGTH)
    assert checkpoint.config == expected | ({"attention_scale": 8.0} if with_args else {})


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_encoder_from_a_megatron_folder_computes_what_the_plain_model_does(tmp_path, ranks):
    plain = PlainGLM().double()
    args = argparse.Namespace(num_attention_heads=4, layernorm_epsilon=1e-5)
    write(tmp_path / "glm", plain.state_dict(), ranks, args=args, **junk())
    ids, positions = torch.randint(5, 120, (9,)), torch.stack((torch.arange(9), torch.zeros(9, dtype=torch.long)))
    ours = Encoder.from_pretrained(tmp_path / "glm", dtype=torch.float64).eval()(pack(ids[None]))
    exact = plain(ids, positions, torch.ones(9, 9, dtype=torch.bool))
    assert (ours - exact).abs().max() <= 1e-12 * exact.abs().max()


@pytest.mark.parametrize("prefix", ["model.", "module.", "glm.", "module.module.model."])
def test_prefixes_of_wrappers(whole, tmp_path, prefix):
    write(tmp_path, whole, 2, prefix)
    for file in tmp_path.iterdir():
        found = torch.load(file)
        found["module"] |= {"pool_layer.weight": torch.ones(2, 2), "extra_state": None}
        torch.save(found, file)
    checkpoint = open_megatron(tmp_path)
    assert_is(checkpoint, whole | {"pool_layer.weight": torch.ones(2, 2)})


def test_one_position_table(whole, tmp_path):
    tensors = {name: tensor for name, tensor in whole.items() if "block" not in name}
    config = open_megatron(write(tmp_path, tensors)).config
    assert (config["block_position_encoding"], config["max_sequence_length"]) == (False, LENGTH + 1)


@pytest.mark.parametrize("tracker, tag", [("latest_checkpointed_iteration.txt", "250000\n"), ("latest", "global_step5")])
def test_folder_with_a_tracker_file(whole, tmp_path, tracker, tag):
    write(tmp_path / tag.strip(), whole, 2)
    (tmp_path / tracker).write_text(tag)
    assert_is(open_megatron(str(tmp_path)), whole)
    for wrong in ("6", "", "..", str(tmp_path / tag.strip())):
        (tmp_path / tracker).write_text(wrong)
        with pytest.raises(CheckpointError, match=f"{tracker} names the folder .* which is not beside it"):
            open_megatron(tmp_path)


def test_other_folders_are_none(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"")
    assert open_megatron(tmp_path) is None
    (tmp_path / "latest").write_text("step")
    (tmp_path / "step").mkdir()
    assert open_megatron(tmp_path) is None
    assert open_megatron(tmp_path / "latest") is None and open_megatron("THUDM/glm-2b") is None


def test_a_file_from_before_torch_1_6(whole, tmp_path):
    torch.save({"module": whole, "np_rng_state": np.random.get_state()}, tmp_path / "mp_rank_00_model_states.pt",
               _use_new_zipfile_serialization=False)
    assert_is(open_megatron(tmp_path), whole)


def test_missing_ranks(whole, tmp_path):
    write(tmp_path, whole, 4)
    (tmp_path / "mp_rank_03_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="holds 3 of 4 model-parallel ranks; copy"):
        open_megatron(tmp_path)
    (tmp_path / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="mp_rank_02_model_states.pt but no mp_rank_01_model_states.pt"):
        open_megatron(tmp_path)


def change(file, **tensors):
    found = torch.load(file)
    found["module"] |= tensors
    torch.save({**found, "module": {name: t for name, t in found["module"].items() if t is not None}}, file)


def test_ranks_that_do_not_fit_together(whole, tmp_path):
    first, second = sorted(write(tmp_path, whole, 2).iterdir())
    change(second, **{WORDS: torch.zeros(VOCAB // 2 + 1, HIDDEN).half()})
    with pytest.raises(CheckpointError, match=r"holds word_embeddings.weight as \(129, 128\) torch.float16, but mp_rank_00"):
        open_megatron(tmp_path)
    change(second, **{WORDS: torch.zeros(VOCAB // 2, HIDDEN)})
    with pytest.raises(CheckpointError, match="torch.float32, but mp_rank_00"):
        open_megatron(tmp_path)
    change(second, **{WORDS: None, "glm.word_embeddings.weight": torch.zeros(VOCAB // 2, HIDDEN).half()})
    assert open_megatron(tmp_path).get(WORDS).shape == (VOCAB, HIDDEN)
    change(second, **{"transformer.final_layernorm.bias": None})
    with pytest.raises(CheckpointError, match="transformer.final_layernorm.bias is only in one of them"):
        open_megatron(tmp_path)
    first.write_bytes(torch_bytes(tmp_path, whole))
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="has 384 rows on each of 2 ranks, but hidden_size 128 needs 384 together"):
        open_megatron(tmp_path)


def torch_bytes(tmp_path, whole):
    return next(write(tmp_path / "one", whole).iterdir()).read_bytes()


@pytest.mark.parametrize("damage", [lambda w: b"", lambda w: w[:len(w) // 2], lambda w: w[:100] + bytes(50) + w[150:]])
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files(whole, tmp_path, damage, zipped):
    file = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": whole}, file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states.pt cannot be read and is probably truncated"):
        open_megatron(tmp_path)


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1], {"module": torch.ones(2)}])
def test_files_without_a_module(tmp_path, content):
    torch.save(content, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="holds no dictionary called 'module'"):
        open_megatron(tmp_path)


@pytest.mark.parametrize("gone", [WORDS, "transformer.position_embeddings.weight",
                                  "transformer.layers.0.attention.query_key_value.weight"])
def test_other_models(whole, tmp_path, gone):
    write(tmp_path, {name: tensor for name, tensor in whole.items() if name != gone})
    with pytest.raises(CheckpointError, match=f"no (matrix )?{re.escape(gone)}.*, so it is no GLM checkpoint"):
        open_megatron(tmp_path)


def test_heads_that_cannot_be_told(tmp_path):
    write(tmp_path, model(48))
    with pytest.raises(ConfigError, match="hidden_size 48 is no multiple of 64; add 'args'"):
        open_megatron(tmp_path)
    write(tmp_path, model(48), args=argparse.Namespace(num_attention_heads=3))
    assert open_megatron(tmp_path).config["num_attention_heads"] == 3


class Evil:
    """Pickles as a call of `function` that would leave a file behind."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


class Plain:
    pass


@pytest.mark.parametrize("where", ["module", "optimizer", "args"])
@pytest.mark.parametrize("function, name", [(os.system, "posix.system"), (eval, "eval"), (os.mkdir, "posix.mkdir"),
                                            (Path, "pathlib"), (np.save, "numpy.save")])
def test_an_unnamed_global_is_refused_and_not_run(whole, tmp_path, where, function, name):
    marker = tmp_path / "was_run"
    argument = {os.system: f"touch {marker}", eval: f"open({str(marker)!r}, 'w')"}.get(function, str(marker))
    evil = Evil(function, argument, *([1] if function is np.save else []))
    beside = {"optimizer": {"state": evil}} if where == "optimizer" else {"args": argparse.Namespace(evil=evil)}
    write(tmp_path / "checkpoint", whole | {"x": torch.ones(1)}, **(beside if where != "module" else {}))
    if where == "module":
        torch.save({"module": whole | {"x": evil}}, tmp_path / "checkpoint" / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=rf"holds a pickled {re.escape(name)}\S*, and objects .* are never run"):
        open_megatron(tmp_path / "checkpoint")
    assert not list(tmp_path.glob("was_run*"))


def test_what_the_process_allows_elsewhere_stays_elsewhere(whole, tmp_path):
    write(tmp_path, whole, np_rng_state=np.random.get_state())
    with torch.serialization.safe_globals([Plain, np.dtype, (np.ndarray, "numpy.ndarray")]):
        before = set(torch.serialization.get_safe_globals())
        assert_is(open_megatron(tmp_path), whole)               # real numpy classes would not mix with the stand-ins
        write(tmp_path, whole, client=Plain())
        with pytest.raises(CheckpointError, match=r"holds a pickled \S*Plain,"):
            open_megatron(tmp_path)
        assert set(torch.serialization.get_safe_globals()) == before


def test_loss_scalers_are_not_looked_up(whole, tmp_path, monkeypatch):
    for package in ("fp16", "deepspeed.runtime.fp16"):
        module = types.ModuleType(f"{package}.loss_scaler")
        module.DynamicLossScaler = type("DynamicLossScaler", (), {"__module__": module.__name__})
        scaler = module.DynamicLossScaler()
        scaler.cur_scale = 65536.0
        with monkeypatch.context() as patch:
            parts = module.__name__.split(".")
            for i in range(1, len(parts)):
                patch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
            patch.setitem(sys.modules, module.__name__, module)
            write(tmp_path, whole, optimizer={"loss_scaler": scaler})
        assert_is(open_megatron(tmp_path), whole)


def test_get_merges_one_tensor_and_no_other(whole, tmp_path, monkeypatch):
    asked = []
    cat = torch.cat
    monkeypatch.setattr(megatron.torch, "cat", lambda parts, dim=0: asked.append([p.numel() for p in parts]) or cat(parts, dim))
    checkpoint = open_megatron(write(tmp_path, whole, 4))
    asked.clear()
    checkpoint.get("transformer.layers.1.mlp.dense_4h_to_h.weight")
    assert asked == [[HIDDEN * HIDDEN] * 4]
    checkpoint.get("transformer.layers.1.mlp.dense_4h_to_h.bias")
    assert len(asked) == 1                                      # the same on all ranks: rank 0's, still in its file


def resident_bytes(folder):
    """Bytes of the files of a folder that are mapped, and of these the bytes in memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    mapped = resident = 0
    for line in lines:
        if str(folder) in line:
            mapped += int(next(lines).split()[1]) << 10
            while not (line := next(lines)).startswith("Rss:"):
                pass
            resident += int(line.split()[1]) << 10
    return mapped, resident


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc/self/smaps")
def test_files_stay_on_disk_until_asked_for(whole, tmp_path):
    big = torch.zeros(16 << 20, dtype=torch.uint8)
    write(tmp_path, whole | {"unused": big}, 2, optimizer={"exp_avg": big})
    checkpoint = open_megatron(tmp_path)
    name = "transformer.layers.0.mlp.dense_h_to_4h.weight"
    assert torch.equal(checkpoint.get(name), whole[name])
    mapped, resident = resident_bytes(tmp_path)
    assert mapped >= 4 * big.numel() and resident < big.numel() // 4
    assert checkpoint.get("unused").sum() == 0
    assert resident_bytes(tmp_path)[1] >= big.numel()


def test_published_numbers_of_parameters():
    counts = {name: num_parameters(config) for name, config in SIZES.items()}
    assert counts["glm-2b"] == 1_920_122_880 and counts["glm-10b"] == 9_880_682_496
    for name, millions in {"glm-base": 110, "glm-large": 335, "glm-large-chinese": 335, "glm-410m": 410, "glm-515m": 515}.items():
        assert abs(counts[name] / 1e6 - millions) < 0.08 * millions, (name, counts[name])
    assert counts["glm-10b"] - counts["glm-10b-chinese"] == (BPE - 50048) * 4096
    assert all(c["hidden_size"] == 64 * c["num_attention_heads"] and c["vocab_size"] % 128 == 0 for c in SIZES.values())


@pytest.mark.parametrize("blocks", [True, False])
def test_num_parameters_counts_a_state_dict(blocks):
    sizes = {name: shape for name, shape in shapes().items() if blocks or "block" not in name}
    config = glm_config(LAYERS, HIDDEN, 2, VOCAB, LENGTH + (not blocks), block_position_encoding=blocks)
    assert num_parameters(config) == sum(torch.Size(shape).numel() for shape in sizes.values())
