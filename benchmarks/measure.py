"""What a benchmark needs to know of its machine, and its peers' failures as reasons. How it times: ptv2_engine/timing.py."""

from __future__ import annotations

import functools
import gc
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ptv2_engine.ops.frozen_linear import multiplies_bf16
from ptv2_engine.timing import cache_bytes, side_by_side


def cpu_name() -> str:
    """Its model, and whether it has the bf16 products that decide what a bf16 step holds."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return model + ("" if multiplies_bf16() else " without bf16 products")


def commit() -> str:
    """The commit that is measured: PTV2_COMMIT, for a copy without its history, or what git says."""
    if named := os.environ.get("PTV2_COMMIT"):
        return named
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True,
                              cwd=Path(__file__).parent)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@functools.cache
def limits(device: str) -> dict[str, Any]:
    """What this machine can do, measured here: bytes a second of a large copy (read and written), flops a second of a large
    matrix product for each dtype."""
    size = (1 << 30) if device == "cuda" else 8 * cache_bytes("cpu")
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copy = min(side_by_side({"copy": lambda: target.copy_(source)}, device, 8, 2)[0]["copy"])
    n, rates = 8192 if device == "cuda" else 2048, {}
    # A CPU whose oneDNN has no bf16 multiplies it in fp32 (ops/frozen_linear.py): torch's own loop would take minutes here
    on_cpu = (torch.float32, torch.bfloat16) if multiplies_bf16() else (torch.float32,)
    for dtype in on_cpu if device == "cpu" else (torch.bfloat16, torch.float16):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = min(side_by_side({"matmul": lambda a=a, b=b: a @ b}, device, 6, 2)[0]["matmul"])
        rates[str(dtype).removeprefix("torch.")] = 2 * n**3 / seconds
    if device == "cpu":
        rates.setdefault("bfloat16", rates["float32"])
    return {"copy_bytes_per_s": 2 * size / copy, "matmul_flops_per_s": rates, "cache_bytes": cache_bytes(device)}


def attempt(peers: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """What each peer's builder returns, and for those that cannot be built or checked here the reason."""
    made, skipped = {}, {}
    for name, build in peers.items():
        try:
            made[name] = build()
        except Exception as error:                           # a peer never stops the run
            gc.collect()
            text = str(error).strip().splitlines()[:1]
            named = [] if isinstance(error, AssertionError) and text else [type(error).__name__]
            skipped[name] = ": ".join([*named, *text])[:180]
    return made, skipped
