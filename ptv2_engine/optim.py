"""The optimizer over prompt and head, and a backbone that trains: AdamW whose state exists for the trained parameters only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

_SPARED = ", no decay"


def parameter_groups(model: nn.Module, weight_decay: float = 0.0, head_lr: float | None = None) -> list[dict[str, Any]]:
    """Groups "prompt", "head" and "backbone" of what requires grad; empty groups are left out. head_lr overrides the head's rate.

    Where the backbone trains, biases and LayerNorm weights have groups of their own ("head, no decay", ...) without weight decay,
    as in transformers' Trainer; a prompt's and a head's alone decay as published.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    spares = any(name.startswith("encoder.") for name in trained)
    groups: dict[str, list[nn.Parameter]] = {f"{part}{kind}": [] for part in ("prompt", "head", "backbone")
                                             for kind in ("", _SPARED)}
    for name, parameter in trained.items():
        part = {"head": "head", "encoder": "backbone"}.get(name.partition(".")[0], "prompt")
        if ".modules_to_save." in name:                     # PEFT's name for a head
            part = "head"
        groups[part + (_SPARED if spares and name.endswith(("bias", "norm_weight")) else "")].append(parameter)
    made = [{"name": name, "params": params, "weight_decay": 0.0 if name.endswith(_SPARED) else weight_decay}
            for name, params in groups.items() if params]
    for group in made:
        if str(group["name"]).startswith("head") and head_lr is not None:
            group["lr"] = head_lr
    return made


def adamw(model: nn.Module, lr: float, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
          weight_decay: float = 0.0, head_lr: float | None = None) -> AdamW:
    """torch's fused AdamW (one kernel for all parameters) over what trains; no weight decay by default, as published."""
    groups = parameter_groups(model, weight_decay, head_lr)
    return AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


def set_aside(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor | None]:
    """Take what has been accumulated out of .grad, without a copy, so that a step that fails can be forgotten."""
    gradients = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return gradients


def add_back(parameters: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor | None]) -> None:
    """Add what was set aside to the gradients of the step."""
    for p, before in zip(parameters, gradients, strict=True):
        if before is not None:
            p.grad = before if p.grad is None else before.add_(p.grad)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state."""
    return sum(t.numel() * t.element_size() for t in state_tensors(optimizer))


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """All tensors in the optimizer's state."""
    return (t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
