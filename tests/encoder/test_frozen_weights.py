"""Frozen weights that are smaller, or somewhere else: quantised codes, and layers that are streamed from host memory or a
file."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from ptv2_engine import PromptConfig, PromptedModel
from ptv2_engine.encoder import load_encoder
from ptv2_engine.encoder.streaming import FileBlocks, WeightStream, matrices, start_stream
from ptv2_engine.errors import ConfigError, WeightError
from ptv2_engine.ops import FrozenLinear, dequantise, use_backend
from ptv2_engine.testing import padded_batch, tiny_model

FAMILIES = ("bert", "electra", "deberta", "deberta-v2", "modernbert")


def saved(tmp_path, family="bert", **overrides) -> str:
    tiny_model(family, **overrides).save_pretrained(tmp_path / family)
    return str(tmp_path / family)


def outcome(model: PromptedModel, policy: str = "exact") -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the prompt's gradient."""
    model.zero_grad()
    model.encoder.set_memory(policy)
    out = model(**padded_batch([7, 20, 1, 12]), labels=torch.tensor([0, 1, 2, 1]))
    out.loss.backward()
    return out.logits.detach(), model.prompt.bank.grad.clone()


def build(source, seed=0, **placement) -> PromptedModel:
    torch.manual_seed(seed)
    return PromptedModel.from_pretrained(source, num_labels=3, prompt=PromptConfig(5), **placement)


def plainly_decoded(model: PromptedModel) -> PromptedModel:
    """The same model with each code's value in a plain weight."""
    for layer in model.encoder.layers:
        for _, linear in matrices(layer):
            held, linear.held = linear.held, None
            linear.weight = torch.nn.Parameter(dequantise(held, model.dtype), requires_grad=False)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_codes_compute_what_their_values_would(tmp_path, family, kind):
    """A quantised model is the model with rounded weights, in forward and in the prompt's gradient; and it is smaller."""
    source = saved(tmp_path, family)
    small = build(source, frozen_dtype=kind)
    linears = [linear for layer in small.encoder.layers for _, linear in matrices(layer)]
    assert all(linear.weight is None and linear.held.kind == kind and not linear.packed_bytes() for linear in linears)
    logits, gradient = outcome(small)
    limit = {"int8": 0.2, "fp8": 0.5, "nf4": 0.9}[kind]           # of a tiny random net; the exact check is below
    exact_logits, exact_gradient = outcome(build(source))
    assert 0 < (logits - exact_logits).norm() <= limit * exact_logits.norm()
    assert 0 < (gradient - exact_gradient).norm() <= limit * exact_gradient.norm()
    assert small.encoder.num_parameters() == build(source).encoder.num_parameters()
    plain_logits, plain_gradient = outcome(plainly_decoded(small))
    torch.testing.assert_close(logits, plain_logits, rtol=1e-4, atol=1e-5)
    assert (gradient - plain_gradient).norm() <= 1e-4 * plain_gradient.norm()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", [{"stream_weights": "host"}, {"stream_weights": "file"},
                                       {"stream_weights": "host", "frozen_dtype": "int8"}], ids=str)
def test_streaming_changes_no_number(tmp_path, family, placement):
    source = saved(tmp_path, family)
    still = {name: value for name, value in placement.items() if name != "stream_weights"}
    streamed, here = build(source, **placement), build(source, **still)
    for policy in ("exact", "lean", "minimal"):
        for _ in range(2):                                 # the second step starts where the first one's backward ended
            (logits, gradient), (want_logits, want_gradient) = outcome(streamed, policy), outcome(here, policy)
            torch.testing.assert_close(logits, want_logits, rtol=1e-5, atol=1e-5)
            assert (gradient - want_gradient).norm() <= 1e-4 * want_gradient.norm()
    assert streamed.encoder.stream.copied_bytes > 0
    assert not [n for n, p in streamed.encoder.named_parameters() if n.endswith(("qkv.weight", "ffn_up.weight"))]


def test_a_deep_stack_brings_each_layer_once_a_pass(tmp_path):
    """8 layers through 3 slots: forward loads 5 beyond the first 3, backward those that have left, each exactly once."""
    model = build(saved(tmp_path, num_hidden_layers=8), stream_weights="host")
    stream: WeightStream = model.encoder.stream
    per_layer = stream.blocks.layouts[0].nbytes
    outcome(model)
    first = stream.copied_bytes
    outcome(model)
    assert stream.copied_bytes - first == 2 * 5 * per_layer       # 3 of 8 are still there at each turn
    assert first == (8 + 5) * per_layer
    assert stream.nbytes == 3 * per_layer


def test_prompts_in_the_upper_layers_leave_the_lower_ones_alone(tmp_path):
    torch.manual_seed(0)
    model = PromptedModel.from_pretrained(saved(tmp_path, num_hidden_layers=8), num_labels=3, stream_weights="host",
                                          prompt=PromptConfig(5, prompt_layers=[6, 7]))
    stream = model.encoder.stream
    outcome(model)
    before = stream.copied_bytes
    outcome(model)
    # layers 5, 6, 7 are there when backward ends; forward brings 0 to 4 and, having evicted them, 5 to 7
    assert stream.copied_bytes - before == 8 * stream.blocks.layouts[0].nbytes


def test_a_slot_is_not_overwritten_while_its_layer_is_at_work():
    """Every fetch returns the bytes of its own layer, whatever the order of the calls."""
    layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(5))
    for i, layer in enumerate(layers):
        layer.qkv = FrozenLinear(torch.full((4, 4), float(i)))
    linears = [layer.qkv for layer in layers]
    from ptv2_engine.encoder.streaming import HostBlocks

    blocks = HostBlocks()
    for layer in layers:
        blocks.add(layer)
    start_stream(blocks, torch.device("cpu"), slots=2)
    generator = torch.Generator().manual_seed(0)
    for i in [0, 1, 2, 3, 4, 4, 3, 2, 1, 0, *torch.randint(5, (200,), generator=generator).tolist()]:
        assert torch.equal(linears[i].dense(torch.float32), torch.full((4, 4), float(i)))


def test_dtype_moves_leave_codes_alone(tmp_path):
    model = build(saved(tmp_path), frozen_dtype="fp8")
    held = model.encoder.layers[0].qkv.held
    model.set_backbone_dtype(torch.bfloat16)
    after = model.encoder.layers[0].qkv.held
    assert after.codes.dtype == torch.float8_e4m3fn and after.scales.dtype == torch.float32 and model.dtype == torch.bfloat16
    assert torch.equal(after.scales, held.scales)
    outcome(model)


@pytest.mark.parametrize("placement,words", [
    ({"frozen_dtype": "int3"}, "frozen_dtype 'int3' does not exist"),
    ({"stream_weights": "disk"}, "stream_weights 'disk' does not exist"),
    ({"stream_weights": "file", "frozen_dtype": "int8"}, "use stream_weights='host'"),
    ({"device": "tpux"}, "device 'tpux' does not exist"), ({"dtype": "bfloat17"}, "nothing is computed in dtype 'bfloat17'"),
], ids=str)
def test_placements_that_do_not_exist(tmp_path, placement, words):
    with pytest.raises(ConfigError, match=words):
        load_encoder(saved(tmp_path), **placement)


def test_devices_that_are_not_there_and_dtypes_they_lack(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="nothing is computed in dtype 'int8'; .* frozen_dtype for smaller weights"):
        load_encoder(model, dtype="int8")
    with pytest.raises(ConfigError, match="device 'cuda' is not there: torch sees no GPU; use device='cpu'"):
        load_encoder(model, device="cuda")
    for name, value in (("is_available", True), ("get_device_capability", (7, 5)), ("get_device_name", "Tesla T4"),
                        ("device_count", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    with pytest.raises(ConfigError, match="device 'cuda:1' is not there: torch sees 1 GPUs"):
        load_encoder(model, device="cuda:1")
    with pytest.raises(ConfigError, match=r"Tesla T4 \(compute capability 7.5\) has no bfloat16; use dtype=torch.float16"):
        load_encoder(model, device="cuda", dtype=torch.bfloat16)


def test_a_model_in_memory_has_no_file_to_stream_from():
    with pytest.raises(ConfigError, match="safetensors"):
        load_encoder(tiny_model(), stream_weights="file")


_RESIDENT = """
import sys, torch
from ptv2_engine import PromptConfig, PromptedModel

def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")) * 1024

stream = sys.argv[2] or None
torch.set_num_threads(1)
ids = torch.ones(1, 8, dtype=torch.long)
PromptedModel.from_pretrained(sys.argv[3], num_labels=2, prompt=PromptConfig(2), stream_weights=stream)(ids)     # code is loaded
before = resident()
model = PromptedModel.from_pretrained(sys.argv[1], num_labels=2, prompt=PromptConfig(2), stream_weights=stream)
for _ in range(2):
    model(ids, labels=torch.tensor([0])).loss.backward()
print((resident() - before) / model.encoder.stream.blocks.layouts[0].nbytes if stream else resident() - before)
"""


@pytest.mark.slow
def test_streaming_from_a_file_keeps_a_few_layers_resident(tmp_path):
    """24 layers of 12.6 MB: a few of them are resident at the end of a step, anonymous memory and mapped file together."""
    big = saved(tmp_path, "bert", hidden_size=512, intermediate_size=2048, num_hidden_layers=24, num_attention_heads=8)
    small = saved(tmp_path / "small", "bert")
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(_RESIDENT), big, "file", small], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) < 7, f"{float(out.stdout):.1f} of 24 layers are resident"


def test_file_blocks_refuse_nothing_silently(tmp_path):
    """A weight that the file holds in pieces (q, k, v apart) arrives whole and in order."""
    source = saved(tmp_path)
    streamed, here = load_encoder(source, stream_weights="file")[0], load_encoder(source)[0]
    assert isinstance(streamed.stream.blocks, FileBlocks)
    for a, b in zip(streamed.layers, here.layers, strict=True):
        for (_, mine), (_, theirs) in zip(matrices(a), matrices(b), strict=True):
            assert torch.equal(mine.dense(torch.float32), theirs.weight)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", [{"stream_weights": "host"}, {"stream_weights": "file"}, {"frozen_dtype": "nf4"}], ids=str)
def test_the_reference_backend_reads_weights_again_in_backward(tmp_path, family, placement):
    """Seven layers through three slots: what autograd kept of a slot would be another layer's by then."""
    source = saved(tmp_path, family, num_hidden_layers=7)
    want = outcome(plainly_decoded(build(source, **placement)) if "frozen_dtype" in placement else build(source))
    with use_backend("reference"):
        for policy in ("exact", "lean"):
            logits, gradient = outcome(build(source, **placement), policy)
            torch.testing.assert_close(logits, want[0], rtol=1e-4, atol=1e-5)
            assert (gradient - want[1]).norm() <= 1e-4 * want[1].norm()


def test_bf16_beside_an_fp32_computation(tmp_path):
    """Half the bytes; the numbers are those of weights rounded to bf16 and multiplied in fp32."""
    source = saved(tmp_path)
    half, rounded = build(source, frozen_dtype="bf16"), build(source)
    for layer in rounded.encoder.layers:
        for _, linear in matrices(layer):
            linear.weight.data = linear.weight.data.bfloat16().float()
    assert half.dtype == torch.float32 and half.encoder.layers[0].qkv.held.codes.dtype == torch.bfloat16
    for a, b in zip(outcome(half), outcome(rounded), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    same = build(source, frozen_dtype="bf16", dtype=torch.bfloat16)          # bf16 in bf16 is a plain weight
    assert same.encoder.layers[0].qkv.held is None
    for where in ("host", "file"):
        streamed = build(source, frozen_dtype="bf16", stream_weights=where)
        assert streamed.encoder.stream.slots[0].block.numel() < 2.1 * sum(
            linear.out_features * linear.in_features for _, linear in matrices(streamed.encoder.layers[0]))
        for a, b in zip(outcome(streamed), outcome(half), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert build(source, dtype="bfloat16").dtype == torch.bfloat16


def test_a_read_that_fails_leaves_the_stream_usable(tmp_path):
    """What fails once is read again; what fails twice is raised, and the next pass starts anew: no stale exception, and never a
    slot that nothing was written into."""
    source = saved(tmp_path, num_hidden_layers=4)
    model, want = build(source, stream_weights="file"), outcome(build(source))
    blocks = model.encoder.stream.blocks
    fill = blocks.fill
    failures = 0
    for failing in ({0}, {2}, {0, 1}, {3, 4, 5}):
        calls = iter(range(10**6))

        def sometimes(linear, out, failing=failing, calls=calls):
            if next(calls) in failing:
                raise MemoryError("no room for the page cache")
            fill(linear, out)

        blocks.fill = sometimes
        try:
            found = outcome(model)
        except MemoryError:
            failures += 1
            blocks.fill = fill
            found = outcome(model)
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert failures


def test_a_streamed_model_is_not_copied(tmp_path):
    with pytest.raises(ConfigError, match="cannot be copied; load it a second time"):
        copy.deepcopy(build(saved(tmp_path), stream_weights="file"))


def test_a_matrix_of_another_shape_is_found_before_it_is_streamed(tmp_path):
    source = saved(tmp_path)
    config = json.loads((tmp_path / "bert/config.json").read_text())
    (tmp_path / "bert/config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(WeightError, match=r"intermediate.dense.weight is .* but config.json implies \(96, 64\)"):
        load_encoder(source, stream_weights="file")


def test_lean_needs_columns_in_fours(tmp_path):
    with pytest.raises(ConfigError, match="this model has 130, no multiple of 4; use 'exact' or 'minimal'"):
        build(saved(tmp_path, intermediate_size=130), memory="lean")


_LOADED = """
import sys, torch
from ptv2_engine.encoder import load_encoder

def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["VmHWM"].split()[0]) * 1024

load_encoder(sys.argv[3], frozen_dtype="int8")            # code is loaded
open("/proc/self/clear_refs", "w").write("5")
before = resident()
load_encoder(sys.argv[1], **({sys.argv[2]: sys.argv[4]} if sys.argv[2] else {}))
print(resident() - before)
"""


@pytest.mark.slow
def test_loading_into_codes_peaks_at_the_small_model_and_one_shard(tmp_path):
    """24 layers in shards of 60 MB, 303 MB in all, fp32: int8 codes are 76 MB of it. The high-water mark of resident memory,
    mapped pages of the file included."""
    tiny_model("bert", hidden_size=512, intermediate_size=2048, num_hidden_layers=24, num_attention_heads=8).save_pretrained(
        tmp_path / "big", max_shard_size="60MB")
    small = saved(tmp_path, "bert")
    # glibc otherwise keeps freed blocks, as many as the order of allocations happens to leave
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(_LOADED), tmp_path / "big", "frozen_dtype", small, "int8"],
                         capture_output=True, text=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"})
    assert out.returncode == 0, out.stderr
    assert 70e6 < int(out.stdout) < 76e6 + 60e6, f"{int(out.stdout) / 1e6:.0f} MB"
