"""Model shapes and ragged batches that the benchmarks share."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

# hidden, heads, ffn. DeBERTa-xlarge is v2's; GLM's as published.
SHAPES = {"MiniLM": (384, 12, 1536), "BERT-base": (768, 12, 3072), "BERT-large": (1024, 16, 4096),
          "DeBERTa-xlarge": (1536, 24, 6144), "GLM-2B": (2048, 32, 8192), "GLM-10B": (4096, 64, 16384)}
# of the ops on rows
GRID = [("BERT-base", "cpu gpu"), ("BERT-large", "gpu"), ("GLM-10B", "gpu"), *((model, "full") for model in SHAPES)]
_STORED = json.loads((Path(__file__).parent / "lengths.json").read_text())
full = pytest.mark.full
TOKENS = {"cpu": 2048, "cuda": 16384}                          # of a packed batch
DIRECTIONS = ["forward", pytest.param("backward", marks=full), "both"]


def _drawn(mean: float, deviation: float, low: int, high: int, count: int = 512) -> list[int]:
    """Lengths at the quantiles of a log-normal distribution, in an order that is random and fixed."""
    sigma = math.sqrt(math.log(1 + (deviation / mean) ** 2))
    normal = torch.distributions.Normal(math.log(mean) - sigma**2 / 2, sigma)
    quantiles = normal.icdf((torch.arange(count) + 0.5) / count).exp().round().clamp(low, high).long()
    return quantiles[torch.randperm(count, generator=torch.Generator().manual_seed(0))].tolist()


# mrpc, rte, squad: real (lengths.json says how they were counted). mnli: no examples at hand; a log-normal of about the length of
# its pairs, an assumption. ragged: 32 to 2048 tokens, of no data set.
LENGTHS: dict[str, list[int]] = {k: v for k, v in _STORED.items() if isinstance(v, list)} | {
    "mnli": _drawn(39, 18, 10, 128), "ragged": _drawn(500, 450, 32, 2048)}


def lengths_of(kind: str, batch: int = 32, tokens: int | None = None) -> list[int]:
    """Lengths of a batch: a name of LENGTHS, or a number for equal ones. tokens: as many sequences as hold about that many."""
    if kind not in LENGTHS:
        return [int(kind)] * (max(1, tokens // int(kind)) if tokens else batch)
    if not tokens:
        return LENGTHS[kind][:batch]
    drawn = LENGTHS[kind] * -(-tokens // sum(LENGTHS[kind]))
    ends = torch.tensor(drawn).cumsum(0)
    return drawn[:max(1, int((ends <= tokens).sum()))]


def compiles(request: pytest.FixtureRequest, model: str) -> bool:
    """Whether a case on a GPU has peers that torch.compile makes, at some seconds each: BERT-large's, and all in --grid full."""
    return model == "BERT-large" or request.config.getoption("--grid") == "full"


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def on_cpu_and_gpu(*cases: tuple, cpu: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> list:
    """pytest parameters: each case on the CPU in these dtypes and on a GPU in bf16. A case's last entry says where: "cpu", "gpu"
    or both; "full": in --grid full only, on a GPU and on the CPU in the first of the dtypes ("cpu full": on the CPU only)."""
    made = []
    for *case, where in cases:
        name = "-".join(map(str, case))
        marks = [full] if "full" in where else []
        for dtype in cpu if "cpu" in where else cpu[:where == "full"]:
            made.append(pytest.param(*case, "cpu", dtype, id=f"{name}-cpu-{short(dtype)}", marks=marks))
        if "gpu" in where or where == "full":
            made.append(pytest.param(*case, "cuda", torch.bfloat16, id=f"{name}-cuda-bf16", marks=[*marks, pytest.mark.gpu]))
    return made
