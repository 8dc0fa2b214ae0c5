"""What setup.py recorded about the compiled kernels, what was loaded in this process, and why: the data of `ptv2 info`."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

_FILE = Path(__file__).resolve().parent / "_build_info.json"


@functools.cache
def recorded() -> dict[str, Any]:
    """The contents of _build_info.json; without the file (setup.py never ran) a record that says so.

    Keys: archs (list of instruction sets that were built), reason (why none, or None), and after a build torch, compiler,
    flags, arch_flags, machine, threads. cuda: the same of the CUDA kernels (archs, reason, nvcc).
    """
    try:
        return json.loads(_FILE.read_text())
    except FileNotFoundError:
        return {"archs": [], "reason": "the package was never installed (run pip install -e . --no-build-isolation)"}
    except ValueError as error:
        return {"archs": [], "reason": f"{_FILE.name} is damaged ({error}); install the package again"}


def report() -> dict[str, Any]:
    """Everything known about the native kernels, as plain data.

    Keys: loaded (instruction set in use, or None), why_not (why none is, or None), cpu (this CPU's best by torch),
    torch (the running version), build (see recorded).
    """
    import torch

    from ptv2_engine import _native

    why_not = _native.load()
    return {"loaded": _native.loaded_arch(), "why_not": why_not, "cpu": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__, "build": recorded()}
