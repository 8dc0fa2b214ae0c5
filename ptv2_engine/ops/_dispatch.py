"""Which implementation of an op runs: the first of native, cuda, triton, reference that takes the tensors, or the one asked for.

A backend is never fallen back from in silence when it was asked for by name, and when none takes the inputs the error
lists every backend's reasons. `ptv2 info` prints the same reasons.
"""

from __future__ import annotations

import contextvars
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptv2_engine.errors import BackendError

BACKENDS = ("native", "cuda", "triton", "reference")
CUDA_OPS = ("prefix_attention",)         # those with CUDA C++ kernels
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("ptv2_backend", default=None)
_planned: contextvars.ContextVar[str | None] = contextvars.ContextVar("ptv2_planned_device", default=None)

NATIVE_DTYPES = (torch.float32, torch.bfloat16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside with one backend: "reference", "native", "cuda" or "triton". Raises BackendError for other names.

    An op whose tensors the backend cannot take then raises BackendError; nothing falls back.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend {name!r} does not exist; choose one of {', '.join(BACKENDS)}.")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def planned_for(kind: str) -> Iterator[None]:
    """Choose backends as on a device of this type ("cpu", "cuda"), whatever tensors there are: for fake tensors, whose memory
    is counted on a machine without that device. Triton's launchers then run, and their kernels do not."""
    token = _planned.set(kind)
    try:
        with _no_triton_kernels() if kind == "cuda" else nullcontext():
            yield
    finally:
        _planned.reset(token)


@contextmanager
def _no_triton_kernels() -> Iterator[None]:
    from triton.runtime.jit import KernelInterface

    launch = KernelInterface.__getitem__
    KernelInterface.__getitem__ = lambda *_: lambda *_, **__: None
    try:
        yield
    finally:
        KernelInterface.__getitem__ = launch


def device_type(where: Tensor | torch.device) -> str:
    """The type of a tensor's device, or the planned one."""
    return _planned.get() or (where.device if isinstance(where, Tensor) else where).type


def readable(tensor: Tensor) -> bool:
    """Whether the values can be looked at for nothing: on the CPU, and real."""
    return tensor.device.type == "cpu" and _planned.get() is None


def cached_table(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A cache for small tables that depend on their arguments only. None is ever dropped: a CUDA graph may read it. While memory
    is planned nothing is kept, as fake tensors must not outlive the plan."""
    kept = functools.cache(function)

    @functools.wraps(function)
    def table(*args: Any) -> Tensor:
        return kept(*args) if _planned.get() is None else function(*args)

    return table


@functools.cache
def native_unavailable() -> str | None:
    """Why the compiled CPU kernels cannot run, or None."""
    from ptv2_engine import _native

    return _native.load()


@functools.cache
def triton_unavailable() -> str | None:
    """Why Triton kernels cannot run on any device, or None."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, which is how they are checked without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def native_reasons(device: torch.device, dtype: torch.dtype, **_: Any) -> list[str]:
    """Why the C++ kernels do not take tensors of this device and dtype; empty when they do."""
    reasons = []
    if device_type(device) != "cpu":
        reasons.append(f"tensors are on {device_type(device)}")
    elif unavailable := native_unavailable():
        reasons.append(unavailable)
    if dtype not in NATIVE_DTYPES:
        reasons.append(f"dtype {_name(dtype)} (has float32, bfloat16)")
    return reasons


def cuda_reasons(device: torch.device, dtype: torch.dtype, op: str, **_: Any) -> list[str]:
    """Why the CUDA C++ kernels do not take tensors of this device and dtype; empty when they do."""
    from ptv2_engine import _cuda

    if op not in CUDA_OPS:
        return [f"no CUDA C++ kernel of {op}"]
    if _planned.get() is not None or device_type(device) != "cuda":
        return ["memory is planned with Triton's kernels" if _planned.get() else f"tensors are on {device_type(device)}"]
    reasons = []
    if _forced.get() != "cuda" and not _cuda.switched_on():
        reasons.append("switched off: never run on a GPU (PTV2_CUDA=1 tries it)")
    elif unavailable := _cuda.unavailable(device.index):
        reasons.append(unavailable)
    if dtype not in _cuda.DTYPES:
        reasons.append(f"dtype {_name(dtype)} (has bfloat16, float16)")
    return reasons


def triton_reasons(device: torch.device, dtype: torch.dtype, **_: Any) -> list[str]:
    """Why the Triton kernels do not take tensors of this device and dtype; empty when they do."""
    reasons = []
    if unavailable := triton_unavailable():
        reasons.append(unavailable)
    elif device_type(device) != "cuda" and not interpreting():
        reasons.append(f"tensors are on {device_type(device)}")
    if dtype not in TRITON_DTYPES:
        reasons.append(f"dtype {_name(dtype)} (has float16, bfloat16, float32)")
    elif interpreting() and device_type(device) == "cpu" and dtype == torch.bfloat16:
        reasons.append("dtype bfloat16 (Triton's interpreter computes it wrongly)")
    return reasons


_REASONS: dict[str, Callable[..., list[str]]] = {"native": native_reasons, "cuda": cuda_reasons, "triton": triton_reasons}


@dataclass(frozen=True)
class Choice:
    """The backend that runs and why the ones before it do not."""

    backend: str
    reasons: dict[str, list[str]]


def choose(op: str, device: torch.device, dtype: torch.dtype,
           extra: dict[str, list[str]] | None = None) -> Choice:
    """Pick the backend of `op` for tensors of this device and dtype.

    `extra` holds the op's own reasons per backend (an unsupported head dim, say). Raises BackendError when a backend
    was asked for by use_backend and does not take the tensors.
    """
    extra = extra or {}
    forced = _forced.get()
    reasons = {}
    for backend in BACKENDS[:-1] if forced is None else (forced,):
        if backend == "reference":
            break
        reasons[backend] = _REASONS[backend](device, dtype, op=op) + extra.get(backend, [])
        # An interpreted Triton kernel is a way to test, never a way to run: it must be asked for.
        asked = forced == backend or device_type(device) == "cuda" or backend != "triton"
        if not reasons[backend] and asked:
            return Choice(backend, reasons)
        if forced == backend:
            raise BackendError(f"{op}: backend {backend!r} was asked for but does not take these tensors: "
                               f"{'; '.join(reasons[backend])}. Leave use_backend out to let the op choose, or use "
                               f'use_backend("reference").')
    return Choice("reference", reasons)


def launcher(backend: str, device: torch.device, name: str) -> Callable[..., Any]:
    """The callable behind `ptv2::name`: the registered op; CUDA C++'s launcher, or Triton's under the interpreter (or a plan)."""
    if backend == "cuda":
        from ptv2_engine import _cuda

        return getattr(_cuda, name)
    if backend == "triton" and device.type == "cpu":
        return _triton_launcher(name)
    if backend == "triton":
        register_triton()
    return _overload(name)


@functools.cache
def _overload(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.ptv2, name).default


_TRITON_MODULES = {"embedding": "embedding", "add_norm_fwd": "add_norm", "add_norm_bwd": "add_norm", "renorm": "add_norm",
                   "gelu_": "linear_gelu", "gelu_bwd": "linear_gelu", "prefix_attention_fwd": "prefix_attention",
                   "prefix_attention_bwd": "prefix_attention", "disentangled_attention_fwd": "disentangled_attention",
                   "disentangled_attention_bwd": "disentangled_attention", "rotary_": "rotary", "geglu_fwd": "geglu",
                   "geglu_bwd": "geglu", "dropout": "dropout", "dequantise": "dequantise"}


@functools.cache
def _triton_launcher(name: str) -> Callable[..., Any]:
    import importlib

    return getattr(importlib.import_module(f"ptv2_engine.kernels.{_TRITON_MODULES[name]}"), name)


@functools.cache
def register_triton() -> None:
    """Register the Triton launchers for CUDA tensors, once, on first use: importing triton takes a second."""
    for name in _TRITON_MODULES:
        torch.library.impl(f"ptv2::{name}", "CUDA", _triton_launcher(name))


def describe(tensor: Tensor) -> str:
    """(2048, 16, 64) float32 cpu"""
    return f"{tuple(tensor.shape)} {_name(tensor.dtype)} {tensor.device.type}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
