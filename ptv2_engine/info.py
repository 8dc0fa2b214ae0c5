"""The text of `ptv2 info`: versions, devices, and for each op which backend runs on which device and why."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from ptv2_engine import __version__, build_info, ops

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "safetensors", "datasets", "peft")


def _versions() -> str:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} -")
    return ", ".join(found)


def _native_line() -> str:
    report = build_info.report()
    build = report["build"]
    if report["why_not"] is not None:
        return f"not in use: {report['why_not']}"
    return (f"{report['loaded']} in use; built: {', '.join(build['archs'])}, with torch {build.get('torch')}, "
            f"{build.get('compiler')}; this CPU: {report['cpu']}")


def _op_line(op: str, device: str, dtype: torch.dtype) -> str:
    choice = ops.backend_for(op, device, dtype)
    passed = "; ".join(f"{backend}: {', '.join(reasons)}" for backend, reasons in choice.reasons.items() if reasons)
    name = str(dtype).removeprefix("torch.")
    return f"  {op:<17} {device:<5} {name:<9} {choice.backend:<10}" + (f" ({passed})" if passed else "")


def describe() -> str:
    """The whole report."""
    devices = ["cpu"]
    lines = [f"ptv2_engine {__version__}, Python {platform.python_version()}", _versions(),
             f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        devices = ["cpu", "cuda"]
        p = torch.cuda.get_device_properties(i)
        lines.append(f"cuda:{i}: {p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}")
    if len(devices) == 1:
        lines.append("cuda: no device")
    lines += [f"native kernels: {_native_line()}",
              f"packed frozen weights: {'oneDNN' if ops.can_pack() else 'not available in this torch'}", "ops:"]
    lines += [_op_line(op, device, dtype) for device in devices for op in ops.OPS for dtype in (torch.float32, torch.bfloat16)]
    return "\n".join(lines)
