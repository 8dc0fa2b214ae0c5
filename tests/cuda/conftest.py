"""The CUDA C++ kernels use the checks of tests/kernels."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "kernels")]

import emulated  # noqa: E402


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where kernel_checks finds the emulated launchers."""
    if reason := emulated.why_not():
        pytest.skip(reason)
    return emulated.as_package(emulated.compile_library(tmp_path_factory.mktemp("cuda") / "sources.so"))


@pytest.fixture(params=["late copies", "early copies, other warps first"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ends of what cp.async and the scheduler may do."""
    if request.param != "late copies":
        monkeypatch.setitem(os.environ, "PTV2_EMULATE_EAGER", "1")
        monkeypatch.setitem(os.environ, "PTV2_EMULATE_ORDER", "7")
    return request.param
