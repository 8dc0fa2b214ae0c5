"""Build only (metadata and the package list are in pyproject.toml): compiles csrc/cpu and csrc/cuda when it can.

    pip install -e . --no-build-isolation        developers: the torch to compile against must be visible
    PTV2_BUILD_NATIVE=0|1                        0 skips the compile, 1 makes a failure an error instead of a notice
    PTV2_CPU_ARCHS=all|avx512,avx2,default       instruction sets to build; without it this CPU's best and the baseline
    PTV2_BUILD_CUDA=0|1                          the same as PTV2_BUILD_NATIVE for the CUDA kernels, which need nvcc alone

Each instruction set is its own library, ptv2_engine/_C_<arch>.so, linked from kernels compiled with that set's flags and from
the objects that see PyTorch, which are compiled once. The libraries need no Python header: they register operators only.
The CUDA kernels are one library behind a C interface, ptv2_engine/_cuda_kernels.so, which knows nothing of PyTorch.
Without PyTorch or a compiler the package installs in pure Python and `ptv2 info` says why; ptv2_engine/_build_info.json keeps it.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from setuptools import Distribution, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE, SOURCES, BUILD = ROOT / "ptv2_engine", ROOT / "csrc" / "cpu", ROOT / "build" / "native"
# compiled once; all other files once an instruction set
TORCH_SOURCES = ("register.cpp", "register_attention.cpp", "parallel.cpp")
ARCH_FLAGS = {"avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"],
              "avx2": ["-mavx2", "-mfma"],
              "default": []}
COMMON_FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]
CUDA_SOURCES, CUDA_BUILD, CUDA_LIBRARY = ROOT / "csrc" / "cuda", ROOT / "build" / "cuda", PACKAGE / "_cuda_kernels.so"
CUDA_ARCHS = ("80", "90a")
CUDA_TARGETS = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS]
# sources that are compiled several times: object -> what is defined for it
CUDA_INSTANCES = {"sweep_instance": {f"sweep_{element}_{D}": [f"-DPTV2_ELEMENT={element}", f"-DPTV2_HEAD_DIM={D}"]
                                     for element in ("Bf16", "Fp16") for D in (32, 64, 80, 96, 128)}}
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
KERNEL_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-maybe-uninitialized", "-Wno-psabi"]


class CannotBuild(Exception):
    """Why the kernels are not built; the words end up in `ptv2 info`."""


def find_compiler() -> tuple[str, str]:
    """The C++ compiler and the first line of its --version."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "c++", "clang++")):
        if path := shutil.which(name):
            return path, subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    raise CannotBuild("no C++ compiler found at install (looked for $CXX, g++, c++, clang++)")


def wanted_archs(torch: Any) -> list[str]:
    """PTV2_CPU_ARCHS, or what this CPU runs best and the baseline."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    asked = os.environ.get("PTV2_CPU_ARCHS", "")
    if asked == "all":
        return list(ARCH_FLAGS) if x86 else ["default"]
    if asked:
        names = [name.strip() for name in asked.split(",")]
        if unknown := [name for name in names if name not in ARCH_FLAGS]:
            raise SystemExit(f"PTV2_CPU_ARCHS: {', '.join(unknown)} does not exist; choose from {', '.join(ARCH_FLAGS)} or all.")
        return names
    best = torch.backends.cpu.get_cpu_capability().lower()
    return [best, "default"] if x86 and best in ("avx512", "avx2") else ["default"]


def torch_flags(torch: Any, openmp: bool) -> list[str]:
    """Flags of the files that include PyTorch's headers."""
    include = Path(torch.__file__).parent / "include"
    flags = ["-O2", "-Wno-unused-parameter", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
             "-isystem", str(include), "-isystem", str(include / "torch" / "csrc" / "api" / "include")]
    return [*flags, "-fopenmp"] if openmp else flags


def compile_plan(compiler: str, torch: Any, archs: list[str], openmp: bool) -> tuple[list, list]:
    """(source, object, command) of every compile and (objects, library, command) of every link."""
    common = [*COMMON_FLAGS, f"-I{ROOT / 'csrc' / 'include'}"]
    compiles, shared = [], []
    for name in TORCH_SOURCES:
        shared.append(BUILD / f"{Path(name).stem}.o")
        compiles.append((SOURCES / name, shared[-1], [compiler, *common, *torch_flags(torch, openmp)]))
    # libgomp is left to libtorch_cpu, which brings its own: two copies would be two thread pools.
    link = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    links = []
    for arch in archs:
        objects = list(shared)
        for source in sorted(SOURCES.glob("*.cpp")):
            if source.name not in TORCH_SOURCES:
                objects.append(BUILD / f"{source.stem}.{arch}.o")
                compiles.append((source, objects[-1], [compiler, *common, *KERNEL_FLAGS, *ARCH_FLAGS[arch]]))
        links.append((objects, PACKAGE / f"_C_{arch}.so", [compiler, "-shared", "-Wl,-s", link]))
    return compiles, links


def run_plan(folder: Path, compiles: list, links: list) -> None:
    """Through ninja when there is one (parallel, only what changed), else one command after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    ninja = shutil.which("ninja")
    if ninja:
        lines = ["rule compile", "  command = $cmd -MMD -MF $out.d -c $in -o $out", "  depfile = $out.d", "  deps = gcc",
                 "rule link", "  command = $cmd $in -o $out $libs"]
        for source, target, command in compiles:
            lines += [f"build {target}: compile {source}", f"  cmd = {' '.join(command)}"]
        for objects, target, command in links:
            lines += [f"build {target}: link {' '.join(map(str, objects))}", f"  cmd = {' '.join(command[:-1])}",
                      f"  libs = {' '.join(command[-1])}"]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        commands = [[ninja, "-C", str(folder)]]
    else:
        commands = [[*command, "-c", str(source), "-o", str(target)] for source, target, command in compiles]
        commands += [[*command[:-1], *map(str, objects), "-o", str(target), *command[-1]] for objects, target, command in links]
    for command in commands:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            print(done.stdout, file=sys.stderr)
            error = next((line for line in done.stdout.splitlines() if "error" in line.lower()), f"exit {done.returncode}")
            raise CannotBuild(f"the compiler failed at install: {error.strip()[:300]}")


def build_native() -> dict[str, Any]:
    """Compile what can be compiled into ptv2_engine/; what happened, as _build_info.json keeps it."""
    if os.environ.get("PTV2_BUILD_NATIVE") == "0":
        raise CannotBuild("PTV2_BUILD_NATIVE=0 was set at install")
    if not sys.platform.startswith("linux"):
        raise CannotBuild(f"the C++ kernels are built on Linux only, not on {sys.platform}")
    try:
        import torch
    except ImportError:
        raise CannotBuild("torch was not visible at install (use pip install --no-build-isolation)") from None
    compiler, version = find_compiler()
    archs, openmp = wanted_archs(torch), "clang" not in version.lower()  # Clang's OpenMP runtime is not the one torch brings
    run_plan(BUILD, *compile_plan(compiler, torch, archs, openmp))
    return {"torch": torch.__version__, "compiler": version, "flags": [*COMMON_FLAGS, *KERNEL_FLAGS],
            "arch_flags": {arch: ARCH_FLAGS[arch] for arch in archs}, "archs": archs, "machine": platform.machine(),
            "threads": openmp, "reason": None}


def build_cuda() -> dict[str, Any]:
    """Compile csrc/cuda for all CUDA_ARCHS; what happened."""
    if os.environ.get("PTV2_BUILD_CUDA") == "0":
        raise CannotBuild("PTV2_BUILD_CUDA=0 was set at install")
    home = os.environ.get("CUDA_HOME")
    places = [Path(home, "bin", "nvcc")] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, (shutil.which(place) for place in places)), None)
    if nvcc is None:
        raise CannotBuild(f"no nvcc found at install (looked for {', '.join(map(str, places))})")
    command = [nvcc, *CUDA_FLAGS, f"-I{ROOT / 'csrc' / 'include'}"]
    compiles = []
    for source in sorted(CUDA_SOURCES.glob("*.cu")):
        targets = CUDA_TARGETS[-1:] if source.stem.endswith("_sm90") else CUDA_TARGETS
        for name, defines in CUDA_INSTANCES.get(source.stem, {source.stem: []}).items():
            compiles.append((source, CUDA_BUILD / f"{name}.o", [*command, *targets, *defines]))
    # The runtime goes in statically: the library then loads beside any torch, whose runtime may be another version.
    objects, link = [target for _, target, _ in compiles], [nvcc, "-shared", "-cudart=static", *CUDA_TARGETS, []]
    run_plan(CUDA_BUILD, compiles, [(objects, CUDA_LIBRARY, link)])
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    return {"archs": [f"sm_{arch}" for arch in CUDA_ARCHS], "nvcc": version, "reason": None}


@functools.cache
def build_and_record() -> None:
    """Compile into the source tree: an editable install finds the libraries there, a wheel takes them as package data."""
    for stale in [*PACKAGE.glob("_C_*.so"), CUDA_LIBRARY]:
        stale.unlink(missing_ok=True)
    info = built("C++ kernels", "PTV2_BUILD_NATIVE", build_native)
    info["cuda"] = built("CUDA kernels", "PTV2_BUILD_CUDA", build_cuda)
    (PACKAGE / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")


def built(what: str, variable: str, build: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The build's record; where it cannot be, why, as an error only if the variable asks for that."""
    try:
        info = build()
        print(f"ptv2_engine: {what} built for {', '.join(info['archs'])}")
        return info
    except CannotBuild as error:
        if os.environ.get(variable) == "1":
            raise SystemExit(f"ptv2_engine: {error}") from error
        print(f"ptv2_engine: installing WITHOUT the {what}: {error}", file=sys.stderr)
        return {"archs": [], "reason": str(error)}


class BuildPy(build_py):
    """pip install: the kernels before the files are gathered."""

    def run(self) -> None:
        build_and_record()
        super().run()


class BuildExt(build_ext):
    """python setup.py build_ext --inplace: the kernels alone, in a checkout that is not installed."""

    def run(self) -> None:
        build_and_record()


class BinaryDistribution(Distribution):
    """The wheel belongs to this platform even though setuptools knows of no extension module."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildPy, "build_ext": BuildExt}, distclass=BinaryDistribution)
