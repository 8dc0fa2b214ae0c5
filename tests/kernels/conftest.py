"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton defines them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))


def interpret() -> None:
    """Choose the interpreter, and let it run loops with bounds read from memory under NumPy 2.4 and later.

    Triton 3.6 keeps scalars as arrays of one element and calls int() on them, which NumPy now refuses: every
    `range(0, length, BLOCK)` of a kernel would raise TypeError.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_with_index


if not torch.cuda.is_available():
    interpret()
