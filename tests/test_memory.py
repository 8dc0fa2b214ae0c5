"""The planner: what it predicts is what the CPU's allocator then measures, on every family and option; and `ptv2 memory`."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from ptv2_engine import PromptConfig
from ptv2_engine.cli import main
from ptv2_engine.encoder.glm_sizes import glm_config
from ptv2_engine.encoder.weights import empty_encoder
from ptv2_engine.errors import ConfigError, SequenceTooLong
from ptv2_engine.memory import Setup, card_bytes, largest_batch, measure, plan, ways_out
from ptv2_engine.memory.peers import PEERS, plan_peer
from ptv2_engine.memory.report import markdown
from ptv2_engine.memory.tracker import BATCH, GRADIENTS, GRAPHS, OPTIMIZER, PROMPTS, SAVED, WEIGHTS, MemoryTracker
from ptv2_engine.ops import _dispatch
from ptv2_engine.testing import tiny_config

FAMILIES = ("bert", "roberta", "electra", "deberta", "deberta-v2", "modernbert", "glm")


def config_of(family: str) -> dict:
    """Small, but large enough that tables and code do not hide the activations."""
    if family == "glm":
        return glm_config(4, 128, 4, 500, 255)
    return tiny_config(family, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, vocab_size=500,
                       max_position_embeddings=200).to_dict()


def setup_of(family: str = "bert", **changes) -> Setup:
    return Setup(config_of(family), **{"batch_size": 8, "seq_len": 128, "prompt": PromptConfig(8), "device": "cpu"} | changes)


native = pytest.mark.skipif(_dispatch.native_unavailable() is not None, reason="the C++ kernels are not built")


@native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory", ["exact", "lean", "minimal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prediction_and_measurement_agree(family, memory, dtype):
    """Within 2 %: the allocator's high-water mark of a real step against the count on fake tensors."""
    setup = setup_of(family, memory=memory, dtype=dtype)
    assert plan(setup).peak == pytest.approx(measure(setup, "cpu"), rel=0.02)


@native
@pytest.mark.parametrize("changes", [
    {"frozen_dtype": "int8"}, {"frozen_dtype": "fp8"}, {"frozen_dtype": "nf4"}, {"stream_weights": "host"},
    {"stream_weights": "host", "frozen_dtype": "int8", "memory": "minimal"},
    {"task": "token-classification"},
    {"prompt": PromptConfig(8, method="shallow")}, {"prompt": PromptConfig(8, method="none")},
    {"prompt": PromptConfig(8, prompt_layers=2)}, {"prompt": PromptConfig(8, reparameterization="mlp")},
    {"prompt": PromptConfig(8, prompt_dropout=0.0)}, {"prompt": PromptConfig(30, num_prompts=2)},
    {"lengths": (3, 128, 40, 77, 5)},
    {"accumulates": True, "prompt": PromptConfig(60, reparameterization="mlp"), "batch_size": 2},
    {"frozen_dtype": "bf16", "dtype": "float32"}, {"shift_positions": False, "prompt": PromptConfig(90)}, {"pooler": "trained"},
], ids=str)
def test_prediction_and_measurement_agree_on_options(changes):
    setup = setup_of(**changes)
    assert plan(setup).peak == pytest.approx(measure(setup, "cpu"), rel=0.02)


@native
def test_an_lstm_hides_its_workspaces():
    """oneDNN's and cuDNN's LSTM allocate inside one operator: megabytes at a hidden size of 512 that no plan sees."""
    setup = setup_of(prompt=PromptConfig(8, method="shallow", reparameterization="lstm"), dtype="float32")
    assert 0 <= measure(setup, "cpu") - plan(setup).peak < 8e6


@native
def test_prediction_and_measurement_agree_on_cloze():
    setup = setup_of("glm", task="cloze")
    assert plan(setup).peak == pytest.approx(measure(setup, "cpu"), rel=0.02)


def test_10b_without_a_gpu_or_weights():
    """The sizes of the model card and of the layers' equations: 18.4 GiB of weights, 14, 5.1 and 2 H bytes a token and layer."""
    plans = {m: plan(Setup("glm-10b", 40, 512, PromptConfig(128), memory=m)) for m in ("exact", "lean", "minimal")}
    weights = sum(p.numel() for p in empty_encoder(Setup("glm-10b").config()).parameters()) * 2
    assert plans["exact"].parts[WEIGHTS] == pytest.approx(weights, rel=1e-3)
    for memory, units in (("exact", 14.06), ("lean", 5.13), ("minimal", 2.0)):
        assert plans[memory].saved_per_token_and_layer == pytest.approx(units, abs=0.01)
        assert plans[memory].tokens == 20480
    assert plans["exact"].peak < card_bytes("h100-80gb")            # 20k tokens in one batch
    small = plan(Setup("glm-10b", 16, 512, PromptConfig(128), memory="minimal", frozen_dtype="int8"))
    streamed = plan(Setup("glm-10b", 16, 512, PromptConfig(128), memory="minimal", stream_weights="host"))
    assert small.peak < 24e9 and streamed.peak < 12e9 and streamed.host == pytest.approx(48 * 12 * 4096**2 * 2, rel=1e-3)


def test_the_parts_add_up_and_triton_is_not_launched():
    on_gpu = plan(setup_of(device="cuda"))
    assert sum(on_gpu.parts.values()) == on_gpu.peak and set(on_gpu.to_dict()) >= {"parts", "peak", "saved_by_layer", "host"}
    below = plan(setup_of(device="cuda", prompt=PromptConfig(8, prompt_layers=1))).saved_by_layer
    assert below[0] == below[1] == 0 and below[3] >= 0
    assert "P-Tuning v2, exact, bfloat16" in markdown([on_gpu])


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "multiple-choice", "question-answering"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_graphs_hold_a_steps_comings_and_goings_once_more(task, device):
    """On sizes that are a bucket's already, and on those that are filled up to the same."""
    whole, ragged = (setup_of(lengths=lengths, task=task, device=device) for lengths in ((64, 32), (61, 30)))
    eager, graphed = plan(replace(whole, accumulates=True)), plan(replace(whole, cuda_graphs=True))
    stays = sum(eager.parts[part] for part in (WEIGHTS, PROMPTS, GRADIENTS, OPTIMIZER, BATCH))
    assert graphed.parts[GRAPHS] == pytest.approx(eager.peak - stays, abs=16 << 10)        # spare rows need some indices more
    assert graphed.peak - graphed.parts[GRAPHS] == pytest.approx(eager.peak, abs=16 << 10)
    assert plan(replace(ragged, cuda_graphs=True)).parts[GRAPHS] == graphed.parts[GRAPHS] > plan(ragged).parts[SAVED]


def test_plans_leave_nothing_behind():
    """Tables are cached on real tensors only: a real run after a plan, and before another."""
    for family in ("modernbert", "deberta-v2"):
        plan(setup_of(family))
        assert measure(setup_of(family, batch_size=2), "cpu") > 0
        plan(setup_of(family))


def test_tracker_follows_births_marks_and_deaths():
    tracker = MemoryTracker(granule=1)
    x = torch.ones(100)
    with tracker:
        tracker.mark([x], WEIGHTS)
        y = torch.zeros(1000)
        del y
        leaf = torch.zeros(10, requires_grad=True)
        z = leaf.exp()
        assert tracker.totals[SAVED] == 40 and tracker.totals[WEIGHTS] == 400
        view = z[:5]
        total = tracker.total
        del z
        assert tracker.total == total, "a view keeps its storage"
        del view
    assert tracker.peak.total >= 400 + 4000 and tracker.total == 400 + 40


def test_the_largest_batch_fits_and_one_more_does_not():
    setup = setup_of(device="cuda", dtype="bfloat16")
    limit = plan(setup_of(device="cuda", batch_size=37)).peak
    best = largest_batch(setup, limit)
    assert best >= 37 and plan(setup_of(device="cuda", batch_size=best)).peak <= limit
    assert plan(setup_of(device="cuda", batch_size=best + 1)).peak > limit
    assert largest_batch(setup, 1000) == 0


def test_ways_out_save_more_and_more():
    def ways(**changes):
        return [(s.memory, s.frozen_dtype, s.stream_weights) for s, _ in ways_out(setup_of(**changes))]

    on_gpu = ways(memory="lean", device="cuda")
    assert on_gpu[0] == ("minimal", None, None) and on_gpu[-1] == ("minimal", "nf4", "host")
    assert all(memory != "exact" for memory, _, _ in on_gpu)
    on_cpu = ways(memory="lean")                    # where host memory is the device's, only the file saves
    assert on_cpu[-1] == ("minimal", None, "file") and not [w for w in on_cpu if w[2] == "host"]
    assert ways(memory="exact", stream_weights="file") == [("lean", None, "file"), ("minimal", None, "file")]


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("family", ["bert", "glm", "deberta", "modernbert"])
def test_peers_are_counted_on_their_own_code(family, peer):
    setup = setup_of(family, device="cuda", batch_size=4, seq_len=64)
    counted = plan_peer(setup, empty_encoder(setup.config()).config, peer)
    if peer == "prefix tuning" and family in ("deberta", "modernbert"):
        assert isinstance(counted, str) and family in counted
        return
    if peer == "fine-tuning":       # fp32 weights, as many again twice for AdamW
        assert counted.parts["optimizer state"] == pytest.approx(2 * counted.parts["prompts and head"], rel=0.02)
        assert counted.parts.get(WEIGHTS, 0) < 1e6          # buffers
    else:
        assert counted.parts["optimizer state"] < 0.3 * counted.parts[WEIGHTS]
    assert counted.parts[SAVED] > plan(setup).parts[SAVED]


@pytest.mark.parametrize("changes,words", [
    ({"memory": "tiny"}, "memory 'tiny' does not exist"), ({"dtype": "int4"}, "dtype 'int4' does not exist"),
    ({"frozen_dtype": "int4"}, "frozen_dtype 'int4' does not exist"), ({"batch_size": 0}, "batch size 0 is below 1"),
    ({"device": "tpu"}, "device 'tpu' does not exist"),
], ids=str)
def test_setups_that_cannot_be(changes, words):
    with pytest.raises(ConfigError, match=words):
        plan(setup_of(**changes))


def test_prompt_and_sequence_over_the_positions():
    with pytest.raises(SequenceTooLong, match="prompt_length 100 \\+ sequence 128 = 228 positions"):
        plan(setup_of(prompt=PromptConfig(100)))


def test_cards():
    assert card_bytes("H100-80GB") == card_bytes("h100-80gb") < 80 * 2**30
    assert 20e9 < card_bytes("24gb") < 24e9
    with pytest.raises(ConfigError, match="card 'quantum' is not known; use one of a10-24gb"):
        card_bytes("quantum")
    with pytest.raises(ConfigError, match="card 'V100-32gb' is older than the kernels take .* use one of a10-24gb"):
        card_bytes("V100-32gb")


def run(capsys, *words) -> tuple[int, str, str]:
    code = main(["memory", *words])
    return code, *capsys.readouterr()


def test_the_command_writes_a_table_json_and_a_picture(tmp_path, capsys):
    config = tmp_path / "model"
    config.mkdir()
    (config / "config.json").write_text(json.dumps(config_of("bert")))
    code, out, _ = run(capsys, "--model", str(config), "--batch-size", "4", "--seq_len", "64", "--prompt-length", "8", "--fit",
                       "24gb", "--output", str(tmp_path / "out"))
    assert code == 0 and "frozen" in out and "the largest batch is" in out and "fine-tuning, AdamW" in out
    found = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert [p["title"] for p in found["plans"]][:3] == [f"P-Tuning v2, {m}, bfloat16" for m in ("exact", "lean", "minimal")]
    assert found["fit"]["largest_batch"] > 4 and found["plans"][0]["peak"] == sum(found["plans"][0]["parts"].values())
    assert found["cuda_graphs"] > found["plans"][0]["peak"] and "as CUDA graphs" in out
    assert (tmp_path / "out" / "memory.png").read_bytes()[:4] == b"\x89PNG"


def test_the_default_length_is_what_the_prompt_leaves(capsys):
    code, out, _ = run(capsys, "--family", "bert", "--layers", "2", "--hidden-size", "64", "--heads", "4", "--prompt-length",
                       "30", "--no-peers", "--fit", "24gib")
    assert code == 0 and "the largest batch is" in out
    assert int(out.split("the largest batch is ")[1].split()[0]) * 482 == int(out.split("(")[-1].split()[0].replace(",", ""))


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path, capsys):
    (tmp_path / "memory.png").mkdir()
    code, _, err = run(capsys, "--family", "bert", "--layers", "2", "--hidden-size", "64", "--heads", "4", "--no-peers",
                       "--output", str(tmp_path))
    assert code == 2 and "memory.png cannot be written" in err and not (tmp_path / "memory.json").exists()
    code, _, err = run(capsys, "--model", "glm-2b", "--seq-len", "5000", "--output", str(tmp_path / "new"))
    assert code == 2 and not (tmp_path / "new").exists()


@native
def test_the_command_measures(capsys):
    code, out, _ = run(capsys, "--family", "bert", "--layers", "3", "--hidden-size", "64", "--heads", "4", "--vocab-size", "300",
                       "--ffn-size", "256", "--batch-size", "16", "--seq-len", "128", "--device", "cpu", "--measure")
    assert code == 0 and "predicted" in out and "measured" in out
    assert abs(float(out.rsplit("CPU: ", 1)[1].split(" %")[0])) < 2


@pytest.mark.parametrize("words,message", [
    ([], "which model? Give --model NAME"), (["--model", "glm-10b", "--layers", "3"], "--layers belongs to --family"),
    (["--model", "glm-10b", "--fit", "toaster"], "card 'toaster' is not known"),
    (["--model", "glm-2b", "--seq-len", "2000"], "sequence 2000 = 2000 positions"),
    (["--model", "glm-2b", "--prompt-layers", "50"], "prompt_layers"),
    (["--model", "glm-2b", "--frozen-dtype", "int8", "--stream-weights", "file"], "use stream_weights='host'"),
    (["--family", "bert", "--hidden-size", "96", "--heads", "2", "--layers", "1"], "heads of 48 have no kernel on a GPU"),
    (["--family", "glm", "--ffn-size", "64"], "--ffn-size 64 does not fit --family glm"),
    (["--model", "glm-2b", "--fit", "t4-16gb"], "card 't4-16gb' is older than the kernels take"),
    (["--model", "glm-2b", "--fit", ""], "card '' is not known"), (["--model", "glm-2b", "--fit", "\u00b2gb"], "is not known"),
    (["--model", "glm-2b", "--batch-size", "-4"], "batch size -4 is below 1"),
    (["--family", "glm", "--heads", "0"], "--heads 0 is no size of a model; use 1 to 10,000,000"),
    (["--model", "glm-2b", "--output", ""], "--output '' cannot be made"),
    (["--model", "glm-2b", "--stream-weights", "disk"], "invalid choice: 'disk'"),
    (["--model", "glm-2b", "--batch", "4"], "unrecognized arguments: --batch"),
    (["--model", "glm-2b", "--device", "cpu", "--measure", "--stream-weights", "file"], "no file to stream from"),
    (["--family", "bert", "--device", "cpu", "--dtype", "float16", "--layers", "1", "--hidden-size", "64", "--heads", "4"],
     "float16 on cpu has no kernels for this model and runs in plain PyTorch"),
])
def test_the_command_refuses_in_a_sentence(capsys, words, message):
    code, out, err = run(capsys, *words)
    assert code == 2 and message in err and not out and len(err.strip().splitlines()) == 1


def test_a_plan_for_a_gpu_without_triton_says_what_to_install(monkeypatch):
    monkeypatch.setattr("ptv2_engine.memory.setup.triton_unavailable", lambda: "triton is not installed")
    with pytest.raises(ConfigError, match=r"triton is not installed; pip install 'ptv2_engine\[gpu\]', or plan for --device cpu"):
        plan(setup_of(device="cuda"))
    assert plan(setup_of()).peak > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_measuring_a_gpu_that_is_not_there_is_refused(capsys):
    code, _, err = run(capsys, "--model", "glm-base", "--measure")
    assert code == 2 and "there is no GPU here" in err


def test_what_does_not_fit_is_told_what_would(capsys):
    """GLM-10B on cards that do not hold its bf16 weights: the way out is named, with what it takes."""
    words = ("--model", "glm-10b", "--batch-size", "16", "--prompt-length", "128", "--no-peers")
    code, out, _ = run(capsys, *words, "--fit", "24gb")
    assert code == 0 and "it fits with --memory lean --frozen_dtype int8: " in out
    code, out, _ = run(capsys, *words, "--stream-weights", "--memory", "lean", "--fit", "8gb")
    assert code == 0 and "it fits with --memory minimal" in out and "18.00 GiB of host memory" in out
