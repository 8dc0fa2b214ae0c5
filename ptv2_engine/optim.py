"""The optimizer over prompt and head: AdamW whose state exists for the trained parameters only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW


def parameter_groups(model: nn.Module, weight_decay: float = 0.0, head_lr: float | None = None) -> list[dict[str, Any]]:
    """Groups "prompt" and "head" of what requires grad; empty groups are left out. head_lr overrides the head's rate."""
    groups: dict[str, list[nn.Parameter]] = {"prompt": [], "head": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["head" if name.startswith("head.") else "prompt"].append(parameter)
    made = [{"name": name, "params": params, "weight_decay": weight_decay} for name, params in groups.items() if params]
    for group in made:
        if group["name"] == "head" and head_lr is not None:
            group["lr"] = head_lr
    return made


def adamw(model: nn.Module, lr: float, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
          weight_decay: float = 0.0, head_lr: float | None = None) -> AdamW:
    """torch's fused AdamW (one kernel for all parameters) over prompt and head; no weight decay by default, as published."""
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
