"""Triton kernels compiled as they would be launched, on any machine: registers, spills, shared memory, the matrix instruction.

A launch is recorded instead of made, so tiles, argument types and divisibility are those of a real call, and Triton compiles it
for the architecture asked for. Not under TRITON_INTERPRET=1, where there is nothing to compile.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# bytes of shared memory that a block may take
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
MATRIX = ("tcgen05.mma", "wgmma", "mma.sync")


class Launch(NamedTuple):
    """One launch of a kernel: what it is called with, its compile-time and launch options among the keywords."""

    function: JITFunction
    arguments: tuple
    keywords: dict[str, Any]
    grid: Any

    @property
    def name(self) -> str:
        return self.function.__name__

    def again(self) -> None:
        self.function[self.grid](*self.arguments, **self.keywords)


def recorded(call: Callable[[], Any], run: bool = False) -> list[Launch]:
    """The launches of a call, in their order. run: they are made too; without, nothing runs."""
    launches: list[Launch] = []
    original = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launches.append(Launch(self, args, kwargs, grid))
        return original(self, *args, grid=grid, warmup=warmup, **kwargs) if run else None

    JITFunction.run = record
    try:
        call()
    finally:
        JITFunction.run = original
    return launches


def compile_launch(launch: Launch, sm: int) -> dict[str, Any]:
    """Registers, stack, local and shared memory and the matrix instruction of one launch on one architecture."""
    fn, target = launch.function, GPUTarget("cuda", sm, 32)
    backend = CUDABackend(target)
    binder = create_function_from_signature(fn.signature, fn.params, backend)
    kwargs = launch.keywords | {"debug": False}
    bound, specialization, options = binder(*launch.arguments, **kwargs)
    options, signature, constants, attributes = fn._pack_args(backend, kwargs, bound, specialization, options)
    compiled = triton.compile(ASTSource(fn, signature, constants, attributes), target=target, options=options.__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        dump = subprocess.run([str(CUOBJDUMP), "--dump-resource-usage", cubin.name], capture_output=True, text=True,
                              check=True).stdout
    fields = dump.rsplit("Function", 1)[1].split()
    usage = dict(field.split(":") for field in fields if field.count(":") == 1 and field[-1].isdigit())
    matrix = next((name for name in MATRIX if name in compiled.asm["ptx"]), "")
    tiles = [str(bound[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_P") if name in bound]
    return {"kernel": launch.name, "tiles": "x".join(tiles), "warps": compiled.metadata.num_warps, "sm": sm,
            "registers": int(usage["REG"]), "stack": int(usage["STACK"]), "local": int(usage["LOCAL"]),
            "shared": compiled.metadata.shared, "matrix": matrix}
