"""The text of `ptv2 info`: versions, devices, for each op which backend runs on which device and why; or one model's sizes."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from ptv2_engine import __version__, _cuda, build_info, ops
from ptv2_engine.encoder.checkpoints import model_config
from ptv2_engine.encoder.weights import empty_encoder
from ptv2_engine.prompt import PromptBank, PromptConfig

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


def _cuda_line() -> str:
    build = build_info.recorded().get("cuda", {})
    if not build.get("archs"):
        return f"not in use: {_cuda.unavailable()}"
    state = "switched on by PTV2_CUDA=1" if _cuda.switched_on() else "switched off (PTV2_CUDA=1 tries them)"
    return f"{state}; built for {', '.join(build['archs'])} with {build['nvcc']}; here: {_cuda.unavailable() or 'usable'}"


def _op_line(op: str, device: str, dtype: torch.dtype) -> str:
    choice = ops.backend_for(op, device, dtype)
    passed = "; ".join(f"{backend}: {', '.join(reasons)}" for backend, reasons in choice.reasons.items() if reasons)
    name = str(dtype).removeprefix("torch.")
    return f"  {op:<23} {device:<5} {name:<9} {choice.backend:<10}" + (f" ({passed})" if passed else "")


def describe_model(source: str, prompt: PromptConfig) -> str:
    """Family, sizes and trained parameters of a model, from its config.json alone. Raises ConfigError, WeightError."""
    config = model_config(source)
    encoder = empty_encoder(config)
    sizes, backbone = encoder.config, sum(p.numel() for p in encoder.parameters())
    with torch.device("meta"):
        trained = 0 if prompt.method == "none" else sum(p.numel() for p in PromptBank(prompt, sizes).parameters())
    takes = prompt.method == "shallow" or prompt.method == "deep" and sizes.shifts_positions
    limit = (f"{sizes.max_length(prompt.prompt_length, takes)} tokens beside the prompt" if sizes.absolute_positions
             else f"any length (trained on {sizes.max_positions})")
    layers = prompt.layers(sizes.num_layers)
    where = {"deep": f"keys and values in {len(layers)} of {sizes.num_layers} layers", "shallow": "input embeddings",
             "none": "no prompt"}[prompt.method]
    network = f", {prompt.reparameterization} {prompt.reparameterization_hidden}" if prompt.reparameterization else ""
    return "\n".join([
        f"{source}: family {sizes.family}",
        f"  layers {sizes.num_layers}, hidden {sizes.hidden_size}, heads {sizes.num_heads} of {sizes.head_dim}, "
        f"ffn {sizes.ffn_size}, vocabulary {sizes.vocab_size}",
        f"  sequence  {limit}",
        f"  backbone  {backbone:,} frozen parameters: {backbone * 2 / 2**30:.2f} GiB in bf16, {backbone * 4 / 2**30:.2f} in fp32",
        f"  prompt    length {prompt.prompt_length}, {where}{network}: {trained:,} trained parameters "
        f"({100 * trained / backbone:.3f} %), {trained * 16 / 2**20:.1f} MiB with gradient and AdamW state",
    ])


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
    lines += [f"native kernels: {_native_line()}", f"CUDA kernels: {_cuda_line()}",
              f"packed frozen weights: {'oneDNN' if ops.can_pack() else 'not available in this torch'}", "ops:"]
    lines += [_op_line(op, device, dtype) for device in devices for op in ops.OPS for dtype in (torch.float32, torch.bfloat16)]
    return "\n".join(lines)
