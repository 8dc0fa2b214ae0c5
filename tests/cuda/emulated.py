"""Compiles csrc/cuda for the CPU behind tests/cuda/emulator.h, and hands its launchers to the checks of tests/kernels."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from ptv2_engine import _cuda

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"


def why_not() -> str | None:
    """Why nothing can be emulated on this machine, or None."""
    import platform

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "the emulator's fibers are written for x86-64"
    return None if shutil.which("g++") else "no g++"


def compile_library(target: Path, sources: Path = CSRC / "cuda") -> Path:
    """The emulated library of these sources (a changed copy of csrc/cuda, say)."""
    main = target.with_suffix(".cpp")
    main.write_text((HERE / "emulator.cpp").read_text().replace("../../csrc/cuda/", f"{sources}/"))
    command = ["g++", "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared",
               "-DPTV2_EMULATE", f"-I{CSRC / 'include'}", f"-I{sources}", f"-I{HERE}", str(main), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def as_package(library: Path | None) -> str:
    """The name of a package in which kernel_checks finds this library's launchers (None: the GPU's library)."""
    package = f"cuda_{library.stem if library else 'on_gpu'}"
    launchers = ModuleType(f"{package}.prefix_attention")
    for name in ("prefix_attention_fwd", "prefix_attention_bwd"):
        setattr(launchers, name, functools.partial(getattr(_cuda, name), library_path=library))
    sys.modules[launchers.__name__] = launchers
    return package
