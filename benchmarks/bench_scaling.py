"""What a training step costs by tokens, prompt length, batch and layers: one is varied, a line is fitted and printed.

A step's time should be linear in tokens and layers, hardly depend on the prompt's length, and not depend on how many sequences
the tokens make. Rows of the JSON hold the points, the slope, the intercept and R^2.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.models import batch_of, config_of, our_model, our_replayed_step, our_step
from ptv2_engine.timing import side_by_side

# device -> model, tokens a sequence, and the points of each axis; the middle one is the rest's setting
AXES: dict[str, dict[str, Any]] = {
    "cpu": {"model": "MiniLM", "length": 64, "tokens": (512, 1024, 2048), "prompt": (1, 16, 64, 128), "batch": (4, 16, 64),
            "layers": (2, 4, 6)},
    "cuda": {"model": "BERT-large", "length": 128, "tokens": (4096, 8192, 16384, 32768), "prompt": (1, 16, 64, 128, 200),
             "batch": (64, 128, 512), "layers": (6, 12, 24)},
}
UNITS = {"tokens": (1000, "ms per 1,000 tokens"), "prompt": (1, "ms per prompt row"), "batch": (1, "ms per sequence"),
         "layers": (1, "ms per layer")}


def fitted(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Slope, intercept and R^2 of the least-squares line."""
    slope, intercept = statistics.linear_regression(x, y)
    rest = sum((b - slope * a - intercept) ** 2 for a, b in zip(x, y, strict=True))
    spread = sum((b - statistics.mean(y)) ** 2 for b in y)
    return slope, intercept, 1 - rest / spread if spread else 1.0


def step_for(device: str, axis: str, value: int) -> Callable[[], None]:
    made = AXES[device]
    tokens, prompt, layers = made["tokens"][-2], 16, made["layers"][-1]
    tokens = value if axis == "tokens" else tokens
    prompt = value if axis == "prompt" else prompt
    config = config_of(made["model"]) | {"num_hidden_layers": value if axis == "layers" else layers}
    length = tokens // value if axis == "batch" else made["length"]
    packed, _ = batch_of([length] * (tokens // length), config["vocab_size"])
    model = our_model(config, prompt, torch.float32 if device == "cpu" else torch.bfloat16, device)
    return our_step(model, packed) if device == "cpu" else our_replayed_step(model, packed)


def scaling(compare, device: str, axis: str) -> None:
    made, (unit, name) = AXES[device], UNITS[axis]
    values = list(made[axis])
    steps = {str(value): step_for(device, axis, value) for value in values}
    rounds = 3 if device == "cpu" else 12
    times, _ = side_by_side(steps, device, rounds, 1)
    milliseconds = [1000 * statistics.median(times[str(value)]) for value in values]
    slope, intercept, r2 = fitted([value / unit for value in values], milliseconds)
    line = f"scaling over {axis}: {slope:.4g} {name}, {intercept:.4g} ms at 0, R^2 {r2:.4f}"
    compare(f"scaling over {axis}  {made['model']} {device}", {"ptv2": steps[str(values[-1])]}, rounds=1, warmup=0, device=device,
            op="scaling", model=made["model"], dtype="fp32" if device == "cpu" else "bf16", axis=axis, values=values,
            milliseconds=milliseconds, slope=slope, intercept=intercept, r2=r2, unit=name, fit=line, **{"pass": "step"})
    print(f"   {line}", flush=True)


@pytest.mark.parametrize("axis", ["tokens", "prompt", "batch", "layers"])
def test_cpu_scaling(compare, axis):
    scaling(compare, "cpu", axis)


@pytest.mark.gpu
@pytest.mark.parametrize("axis", ["tokens", "prompt", "batch", "layers"])
def test_gpu_scaling(compare, axis):
    scaling(compare, "cuda", axis)
