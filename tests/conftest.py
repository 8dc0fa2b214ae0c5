"""What this run must have, so that a missing backend is a failure and never a silent skip."""

from __future__ import annotations

import importlib.util
import os
import shutil

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is first imported, which any test module may do: without a GPU its kernels are interpreted
    os.environ["TRITON_INTERPRET"] = "1"
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=25,
                                     suppress_health_check=list(hypothesis.HealthCheck))
# new seeds each time, thousands of examples: --hypothesis-profile=night with -k one test (tests/kernels/attention_cases.py)
hypothesis.settings.register_profile("night", deadline=None, derandomize=False, max_examples=10_000, print_blob=True,
                                     suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.load_profile("ci")
EXPECTABLE = ("native", "interpreter", "aot")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--expect", default="", help=f"comma list of what must be there: {', '.join(EXPECTABLE)}")
    parser.addoption("--require-gpu", action="store_true", help="fail instead of skipping when no CUDA device is there")
    parser.addoption("--shard", default=None, help="i/n: every n-th test from the i-th on, for n processes")


def pytest_configure(config: pytest.Config) -> None:
    for backend in filter(None, config.getoption("--expect").split(",")):
        if backend not in EXPECTABLE:
            raise pytest.UsageError(f"--expect {backend} is unknown; choose from {', '.join(EXPECTABLE)}")
        if reason := _missing(backend):
            raise pytest.UsageError(f"--expect {backend}: {reason}")
    if config.getoption("--require-gpu") and not torch.cuda.is_available():
        raise pytest.UsageError("--require-gpu: torch sees no CUDA device")


def _missing(backend: str) -> str | None:
    if backend == "native":
        from ptv2_engine.ops import _dispatch

        return _dispatch.native_unavailable()
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if backend == "aot":
        found = importlib.util.find_spec("triton")
        assert found is not None and found.submodule_search_locations
        ptxas = shutil.which("ptxas") or next(iter(_bundled_ptxas(found.submodule_search_locations[0])), None)
        return None if ptxas else "no ptxas beside triton"
    return None


def _bundled_ptxas(root: str) -> list[str]:
    from pathlib import Path

    return [str(p) for p in Path(root).rglob("ptxas*") if p.is_file()]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if shard := config.getoption("--shard"):                 # last: of those that -m and -k left
        first, count = map(int, shard.split("/"))
        kept = items[first::count]
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != first])
        items[:] = kept
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded_on_one_thread() -> None:
    """Tests run tiny models, where a second thread costs more than it brings; tests about threads set their own number."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
