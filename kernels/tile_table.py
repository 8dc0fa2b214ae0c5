"""The tiles that were measured: one JSON file per GPU in tuned/, written by `ptv2 tune`, asked before tuning.py's heuristic.

A file says how it was made (device, date, command, versions, commit) and holds, for each kernel, a row for each shape class:

    {"itemsize": 2, "head_dim": 64, "tokens": 128, "prompt": 16, "dropout": true, "tiles": {"block_m": ...}, "us": ...,
     "heuristic_us": ..., "a_a": ..., "sources": ...}

tokens and prompt are powers of two, the upper ends of their buckets (0: no prefix); tiles null: the heuristic's were not beaten;
sources: of the kernel as it was measured. Other code may want other tiles, or not fit a card with these, so it ignores the row.
PTV2_TUNING=off leaves the files alone; PTV2_TUNING=FOLDER reads those in a folder instead of the package's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_log = logging.getLogger("ptv2_engine")
FOLDER = Path(__file__).parent / "tuned"
_ATTENTION = ("itemsize", "head_dim", "tokens", "prompt", "dropout")
# kernel -> what its shape class consists of. rows: of add_norm and embedding.
FIELDS: dict[str, tuple[str, ...]] = {
    "forward": _ATTENTION, "sweep": (*_ATTENTION, "fused"), "dq": _ATTENTION, "dkdv": _ATTENTION, "prefix": _ATTENTION,
    "packed_forward": _ATTENTION, "packed_sweep": _ATTENTION, "packed_dq": _ATTENTION, "packed_dkdv": _ATTENTION,
    "relative_forward": _ATTENTION, "relative_dq": _ATTENTION, "relative_dkdv": _ATTENTION, "rows": ("width",)}
TILES: dict[str, tuple[str, ...]] = {
    kernel: ("rows", "warps") if kernel == "rows" else ("block_m", "block_n", "block_p", "warps", "stages", "registers")
    for kernel in FIELDS}

# where a kernel is, in this folder
_MODULES = {"forward": ("prefix_attention",), "sweep": ("prefix_attention",), "dq": ("prefix_attention_long",),
            "dkdv": ("prefix_attention_long",), "prefix": ("prefix_grad",), "packed_forward": ("prefix_attention_short",),
            "packed_sweep": ("prefix_attention_short",), "packed_dq": ("prefix_attention_short_bwd",),
            "packed_dkdv": ("prefix_attention_short_bwd",), "relative_forward": ("disentangled_attention",),
            "relative_dq": ("disentangled_attention_bwd",), "relative_dkdv": ("disentangled_attention_bwd",),
            "rows": ("add_norm", "embedding")}

Class = tuple[str, tuple[int, ...]]                # kernel, the values of its FIELDS
Tiles = dict[str, Any]                             # the values of its TILES, and why


@functools.cache
def device_name() -> str | None:
    """What torch calls this machine's GPU, or None without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def triton_version() -> str:
    import triton

    return triton.__version__


def file_name(device: str) -> str:
    """NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3.json"""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


@functools.cache
def sources(kernel: str) -> str:
    """A hash of the code of a kernel: its modules and those they import here but for tuning.py; without comments and layout."""
    code: dict[str, str] = {"tuning": ""}
    left = list(_MODULES[kernel])
    while left:
        name = left.pop()
        if name not in code:
            text = (Path(__file__).parent / f"{name}.py").read_text()
            left += re.findall(r"^from \S+\.kernels\.(\w+) import", text, re.M)
            left += re.findall(r"\w+", " ".join(re.findall(r"^from \S+\.kernels import (\([^)]+|.+$)", text, re.M)))
            code[name] = re.sub(r'(?s)""".*?"""|#[^\n]*|\s+', "", text)
    return hashlib.sha256("".join(f"{name}:{code[name]}" for name in sorted(code)).encode()).hexdigest()[:12]


def sides(kernel: str) -> tuple[str, ...]:
    """Of a tile's three, those that the kernel has."""
    if kernel == "rows":
        return ()
    return tuple(side for side, other in (("block_m", ""), ("block_n", "prefix"), ("block_p", "dkdv"))
                 if kernel.rsplit("_", 1)[-1] != other)


def problem(kernel: str, shape: Mapping[str, int], tiles: Mapping[str, Any]) -> str | None:
    """Why these tiles cannot be the kernel's for this class, or None."""
    numbers = {name: n for name, n in tiles.items() if name != "registers" or n is not None}          # None: no limit
    if set(tiles) != set(TILES[kernel]) or not all(type(n) is int for n in numbers.values()):
        return f"tiles must be whole numbers called {', '.join(TILES[kernel])}"
    sizes = [n for name, n in tiles.items() if name not in ("stages", "registers") and (n or not name.startswith("block"))]
    if any(n < 1 or n & (n - 1) for n in sizes) or tiles.get("stages", 1) < 1 or not 0 < numbers.get("registers", 1) < 256:
        return "sizes must be powers of two"
    if kernel == "rows":
        return None
    used = [side for side in sides(kernel) if side != "block_p" or shape["prompt"] or kernel == "prefix"]
    if any(tiles[side] < 16 for side in used):
        return f"{', '.join(used)} must be 16 or more"
    if tiles["block_p"] and not shape["prompt"] and kernel != "prefix" and "block_p" in sides(kernel):
        return "block_p must be 0 without a prefix"
    if kernel.endswith("sweep") and (tiles["block_n"] < shape["tokens"] or tiles["block_p"] < shape["prompt"]):
        return "a sweep holds all keys of a row, and the tiles do not"
    return None


def read(path: Path, device: str, triton: str) -> dict[Class, Tiles]:
    """The classes whose measured tiles replace the heuristic's. Raises ValueError with the reason why a file is not for here."""
    record = json.loads(path.read_text())
    if record["triton"] != triton:
        raise ValueError(f"made with Triton {record['triton']}, and {triton} runs here")
    if record["device"] != device:
        raise ValueError(f"made on {record['device']}, and this is {device}")
    found: dict[Class, Tiles] = {}
    old = set()
    for kernel, rows in record["kernels"].items():
        for row in rows if kernel in FIELDS else ():       # a kernel of another version of this package
            shape, tiles = {name: int(row[name]) for name in FIELDS[kernel]}, row["tiles"]
            if changed := row["sources"] != sources(kernel):
                old.add(kernel)
            if tiles is None or changed:
                continue
            if wrong := problem(kernel, shape, tiles):
                raise ValueError(f"{kernel} {shape}: {wrong}")
            why = f"measured: {row['us']} us, {row['heuristic_us']} with the heuristic's tiles ({path.name})"
            found[kernel, tuple(shape.values())] = {**tiles, "why": why}
    if old:
        _log.warning("measured tiles in %s are ignored where kernels have changed since (%s); `ptv2 tune` makes them anew.", path,
                     ", ".join(sorted(old)))
    return found


@functools.cache
def table() -> dict[Class, Tiles]:
    """This machine's measured tiles; empty without a GPU or a file for it, or where one logged line says why it is ignored."""
    setting = os.environ.get("PTV2_TUNING", "")
    if setting == "off" or (device := device_name()) is None:
        return {}
    path = Path(setting or FOLDER) / file_name(device)
    if not path.is_file():
        if setting:
            _log.warning("PTV2_TUNING=%s holds no %s, so tiles are the heuristic's.", setting, path.name)
        return {}
    try:
        return read(path, device, triton_version())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        _log.warning("the measured tiles in %s are ignored: %s; `ptv2 tune` makes them anew.", path, reason)
        return {}
