"""ptv2_engine: P-Tuning v2 (deep prompt tuning, arXiv 2110.07602) on a hand-written, fused, frozen encoder.

`from ptv2_engine import PromptConfig, PromptedModel, Trainer` is the whole surface most programs need. Names are
loaded on first use: importing the package needs neither transformers, datasets, triton, a GPU nor a compiler.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
# In a source checkout kernels/ lies beside this folder, not in it. No kernels/__init__.py exists on purpose:
# transformers probes for a package called "kernels", and ours must not answer to that name.
if not (_here / "kernels").is_dir() and (_here.parent / "kernels" / "prefix_attention.py").is_file():
    __path__.append(str(_here.parent))

_PUBLIC = {
    "PromptConfig": "prompt",
    "PromptBank": "prompt",
    "PromptedModel": "model",
    "Trainer": "trainer",
    "PackedCollator": "batches",
    "PTV2Error": "errors",
}
__all__ = [*_PUBLIC, "__version__", "errors", "ops"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    if name in ("ops", "errors"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
