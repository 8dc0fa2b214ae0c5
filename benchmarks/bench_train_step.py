"""A full training step: forward, loss, backward, clipping, AdamW, dropout on; real length distributions.

CPU: BERT-base and MiniLM beside PEFT prefix tuning padded to the longest of each batch, and the bare matrix products of our step,
which no training step can beat. GPU: ours as the Trainer runs it (CUDA graphs from a batch on the host) and launched op by op,
PEFT in bf16, the same under torch.compile, and a packed encoder on FlexAttention. Every peer has our weights, and its loss is
compared with ours before it is timed. matrix_parameters, N: a step is 4N flops a token, forward and dX.
"""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import pytest
import torch

from benchmarks.deberta_peer import patched_step
from benchmarks.measure import attempt
from benchmarks.models import (
    DTYPES,
    batch_of,
    check_losses,
    config_of,
    flex_step,
    our_model,
    our_replayed_step,
    our_step,
    peft_step,
    stepper,
    stock_model,
    with_weights_of,
)
from benchmarks.shapes import LENGTHS, full, lengths_of
from ptv2_engine import PromptConfig, PromptedModel
from ptv2_engine.ops.frozen_linear import multiplies_bf16

BATCH, PROMPT = 32, 20


def median_batch(name: str, batch: int = BATCH) -> list[int]:
    """The lengths of the batch whose padding (padded cells over tokens) is the median of those that 512 examples make."""
    groups = [LENGTHS[name][i:i + batch] for i in range(0, 512, batch)]
    return sorted(groups, key=lambda lengths: max(lengths) * batch / sum(lengths))[len(groups) // 2]


def bare_products(config, T, dtype):
    """The matrix products of our step and nothing else: forward and dX, weights packed, the shapes the engine really runs."""
    H, F, L = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    weights = {}
    for name, (rows_out, rows_in) in {"qkv": (3 * H, H), "out": (H, H), "up": (F, H), "down": (H, F)}.items():
        w = torch.randn(rows_out, rows_in, dtype=dtype)
        weights[name] = [torch.ops.mkldnn._reorder_linear_weight(x, 2048) for x in (w, w.t().contiguous())]
    linear = torch.ops.mkldnn._linear_pointwise
    inputs = {(count, width): torch.randn(count, width, dtype=dtype) for count in (T, BATCH) for width in (H, F)}

    def run():
        for layer in range(L):
            behind = BATCH if layer == L - 1 else T  # the last layer computes first tokens only behind its attention
            for name, count in (("qkv", T), ("out", behind), ("up", behind), ("down", behind)):
                forward, backward = weights[name]
                out = linear(inputs[count, F if name == "down" else H], forward, None, "none", [], "")
                if not (layer == 0 and name == "qkv"):  # nothing below the first layer's attention is trained
                    linear(out, backward, None, "none", [], "")

    return run


def layer_matrices(model) -> int:
    """N: parameters of the layers' matrices."""
    return sum(p.numel() for layer in model.encoder.layers for p in layer.parameters() if p.dim() == 2)


@pytest.mark.parametrize("model, data, dtype", [
    ("MiniLM", "rte", "fp32"), ("MiniLM", "rte", "bf16"), ("BERT-base", "rte", "fp32"),
    *(pytest.param(*case, marks=full) for case in (("BERT-base", "mrpc", "fp32"), ("BERT-base", "rte", "bf16"),
                                                   ("BERT-base", "mrpc", "bf16")))])
def test_cpu_step(compare, model, data, dtype):
    half, config = dtype == "bf16", config_of(model)
    if half and not multiplies_bf16():
        pytest.skip("this CPU has no bf16 products: a bf16 step of torch takes minutes here")
    packed, padded = batch_of(median_batch(data), config["vocab_size"])
    ours, peft = with_weights_of(stock_model(config, torch.float32, "cpu"), PROMPT, DTYPES[dtype], "cpu")
    check_losses(ours, peft, packed, padded, 2e-2 if half else 1e-4)
    trained = [p for p in peft.parameters() if p.requires_grad]
    T = packed["input_ids"].shape[0]
    steps = {"ptv2": our_step(ours, packed),
             "PEFT padded" + (" bf16 autocast" if half else ""): stepper(peft, trained, torch.optim.AdamW(trained, 1e-3), padded,
                                                                         half)}
    steps["bare products"] = bare_products(config, T, DTYPES[dtype])
    rounds = 2 if model == "BERT-base" else 6
    compare(f"train step  {model} B={BATCH} P={PROMPT} {data} {dtype}", steps, rounds=rounds, warmup=0, tokens=T,
            padded_tokens=padded["input_ids"].numel(), batch=BATCH, prompt_length=PROMPT, op="train_step", model=model,
            lengths=data, dtype=dtype, matrix_parameters=layer_matrices(ours), **{"pass": "step"})


# model, lengths, sequences (or tokens), P; in order of weight, as gpu_check.py ends what takes too long
GPU_SHORT = [("BERT-large", "128", "16384 tokens", 16), ("BERT-large", "rte", 32, 16), ("GLM-10B", "256", "8192 tokens", 16),
             ("BERT-large", "squad", 32, 16), ("BERT-base", "mnli", 32, 20), ("MiniLM", "rte", 32, 20),
             ("DeBERTa-xlarge", "rte", 32, 20)]
GPU_FULL = [(model, data, batch, 20) for model in ("MiniLM", "BERT-base", "BERT-large", "RoBERTa-large", "DeBERTa-xlarge",
                                                   "GLM-2B", "GLM-10B")
            for data in ("rte", "mnli", "squad") for batch in (16, 32, 64) if (model, data, batch, 20) not in GPU_SHORT]
PEERS = ("BERT-base", "BERT-large", "RoBERTa-large", "MiniLM")         # families that PEFT's prefix tuning takes
NO_PEER = {"PEFT padded": "takes no prefix into this family", "FlexAttention packed": "written for BERT and RoBERTa"}
PATCHED = "patched transformers, autocast"


@pytest.mark.gpu
@pytest.mark.parametrize("model, data, size, P", [*GPU_SHORT, *(pytest.param(*case, marks=full) for case in GPU_FULL)])
def test_gpu_step(compare, request, model, data, size, P):
    with_flex = model == "BERT-large" or request.config.getoption("--grid") == "full"               # compiles for half a minute
    gpu_step(compare, model, data, size, P, ("PEFT padded", *(["FlexAttention packed"] if with_flex else [])))


@pytest.mark.gpu
@pytest.mark.parametrize("model, data, size, P", [("BERT-large", "rte", 32, 16), *(pytest.param(*case, marks=full)
                                                                                  for case in GPU_FULL if case[0] in PEERS)])
def test_gpu_step_beside_compiled(compare, model, data, size, P):
    """By itself: PEFT under torch.compile takes minutes to compile."""
    gpu_step(compare, model, data, size, P, ("PEFT padded, torch.compile",))


def gpu_step(compare, model: str, data: str, size: int | str, P: int, wanted: tuple[str, ...]) -> None:
    config, dtype = config_of(model), torch.bfloat16
    tokens = int(size.split()[0]) if isinstance(size, str) else None
    lengths = lengths_of(data, tokens=tokens) if tokens else median_batch(data, int(size))
    packed, padded = batch_of(lengths, config["vocab_size"], multiple=8)          # peers' products like it
    memory: dict[str, int] = {}
    skipped = {name: reason for name, reason in NO_PEER.items() if model not in PEERS}
    if model in PEERS or model.startswith("DeBERTa"):
        base = stock_model(config, dtype, "cuda")
        ours = PromptedModel.from_pretrained(base, num_labels=2, prompt=PromptConfig(P), dtype=dtype, device="cuda").train()
    else:
        base, ours = None, our_model(config, P, dtype, "cuda")
    held = sum(t.numel() * t.element_size() for t in (*ours.parameters(), *ours.buffers()))
    # name -> how it is built, and what of its memory is there already: peak memory is of a step by itself
    builders: dict[str, tuple[Any, int | None]] = {"ptv2 op by op": (functools.partial(our_step, ours, packed), held),
                                                   "ptv2": (functools.partial(our_replayed_step, ours, packed), None)}
    if model.startswith("DeBERTa"):
        builders[PATCHED] = functools.partial(patched_step, base, ours, packed, padded), 0
    elif base is not None:
        peft = functools.partial(peft_step, base, ours, packed, padded)
        peers = {"PEFT padded": (peft, 0), "PEFT padded, torch.compile": (functools.partial(peft, compiled=True), 0),
                 "FlexAttention packed": (functools.partial(flex_step, ours, packed), held)}
        builders |= {name: peers[name] for name in wanted}
    steps, failed = attempt({name: functools.partial(_built, build, there, memory, name)
                             for name, (build, there) in builders.items()})
    if "ptv2" not in steps:                                   # without graphs ours is the step op by op
        steps["ptv2"] = steps.pop("ptv2 op by op")
    name = f"train step  {model} {data} {size} P={P} bf16" + (" beside torch.compile" if "torch.compile" in wanted[0] else "")
    rounds, warmup = (4, 1) if model == "GLM-10B" else (12, 3)              # half a second a step
    compare(name, {"ptv2": steps.pop("ptv2")} | steps, rounds=rounds, warmup=warmup, device="cuda", skipped=skipped | failed,
            tokens=packed["input_ids"].shape[0], padded_tokens=padded["input_ids"].numel(), batch=len(lengths), prompt_length=P,
            op="train_step", model=model, lengths=data, dtype="bf16", peak_memory_bytes=memory,
            matrix_parameters=layer_matrices(ours), **{"pass": "step"})


def _built(build, there, memory, name):
    """A step that ran three times; its peak goes to memory[name] where `there`, bytes of it that were held before, is known. Of
    steps in graphs, whose memory no allocation counts, the pool and what stays cached is what was reserved meanwhile."""
    torch.cuda.empty_cache()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    step = build()
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
    torch.cuda.synchronize()
    if there is not None:
        memory[name] = torch.cuda.max_memory_allocated() - before + there
    else:
        memory[f"{name}, pool and cache beside the model"] = torch.cuda.memory_reserved() - reserved
    return step


@pytest.mark.gpu
@pytest.mark.parametrize("model, data", [("BERT-base", "mrpc"), ("BERT-large", "rte")])
def test_trainer_overhead(compare, tmp_path, model, data):
    """The Trainer's loop, callbacks and logging included, over the raw replay of the same steps. Aim: at most 1.03."""
    import transformers

    from ptv2_engine import Trainer

    config, steps = config_of(model), 40
    ours = our_model(config, 16, torch.bfloat16, "cuda")
    mean = round(statistics.mean(median_batch(data)))          # alike, so that no batch is the first of its bucket while timed
    lengths = [mean] * BATCH
    packed, _ = batch_of(lengths, config["vocab_size"])
    rows = [{"input_ids": torch.randint(1000, config["vocab_size"], (mean,)).tolist(), "labels": i % 2}
            for i in range(BATCH * steps)]
    args = transformers.TrainingArguments(str(tmp_path), per_device_train_batch_size=BATCH, max_steps=steps, report_to=[],
                                          disable_tqdm=True, save_strategy="no", logging_steps=20, bf16=True)
    trainer = Trainer(ours, args, train_dataset=rows)
    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step in (steps // 2, steps):
                torch.cuda.synchronize()
                seconds.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    replayed, half = our_replayed_step(ours, packed), steps // 2

    def several() -> None:                                    # as many as the Trainer's clock saw, and waited for once, as there
        for _ in range(half):
            replayed()

    trainer_s = seconds[1] - seconds[0]
    found = compare(f"{half} raw replays, and as many steps of the Trainer  {model} {data} B={BATCH} bf16", {"ptv2": several},
                    rounds=8, device="cuda", tokens=half * sum(lengths), op="trainer", model=model, lengths=data, dtype="bf16",
                    trainer_step_s=trainer_s, **{"pass": "step"})
    print(f"   Trainer over raw replay: {trainer_s / found['ptv2']['median_s']:.3f}")
