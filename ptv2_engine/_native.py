"""Loads the compiled CPU kernels: the library of the widest instruction set that was built and that this CPU has."""

from __future__ import annotations

from pathlib import Path

import torch

from ptv2_engine import build_info

_HERE = Path(__file__).resolve().parent
# What torch reports for the CPU (it obeys ATEN_CPU_CAPABILITY) -> the libraries it can run, best first.
_RUNS = {"AVX512": ("avx512", "avx2", "default"), "AVX2": ("avx2", "default")}

_outcome: dict[str, str | None] = {}


def runnable_archs() -> list[str]:
    """The instruction sets that were built and that this CPU has, best first."""
    runs = _RUNS.get(torch.backends.cpu.get_cpu_capability(), ("default",))
    return [arch for arch in runs if arch in build_info.recorded()["archs"]]


def load(arch: str | None = None) -> str | None:
    """Load the kernels, once a process. Returns None when they are usable, else why they are not.

    `arch` picks one of runnable_archs() instead of the best; only the first call decides.
    """
    if not _outcome:
        reason, chosen = _load(arch)
        _outcome.update(reason=reason, arch=chosen)
    return _outcome["reason"]


def loaded_arch() -> str | None:
    """The instruction set of the loaded library, None when none is loaded."""
    return _outcome.get("arch")


def _load(arch: str | None) -> tuple[str | None, str | None]:
    build = build_info.recorded()
    if not build["archs"]:
        return f"not built ({build['reason']})", None
    if build["torch"] != torch.__version__:
        return (f"built with torch {build['torch']}, but torch {torch.__version__} is running: install the package again with "
                "pip install --no-build-isolation"), None
    runnable = runnable_archs()
    chosen = arch or next(iter(runnable), None)
    if chosen is None or chosen not in runnable:
        missing = "it has none" if arch is None else f"{arch} is not one it has"
        return (f"this CPU runs {torch.backends.cpu.get_cpu_capability()}, and of the libraries built "
                f"({', '.join(build['archs'])}) {missing}: install the package again with PTV2_CPU_ARCHS=all"), None
    import ptv2_engine.ops  # noqa: F401  defines the schemas that the library implements

    try:
        torch.ops.load_library(_HERE / f"_C_{chosen}.so")
    except OSError as error:
        return f"_C_{chosen}.so does not load: {error}", None
    return None, chosen
