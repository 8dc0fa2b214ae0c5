"""The GPU tests use the checks of tests/kernels and tests/cuda."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("kernels", "cuda")]
