"""dropout: y = x * keep / (1 - p), with the mask of Philox site `site`: for what is dropped out apart from other ops.

The mask depends on the seed and an element's row and column, not on how many rows there are: rows that fill a batch up change
nobody's. Nothing is saved but the seed; backward is the same op on the gradient. Bytes: x read, y written, once each way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptv2_engine.ops import _philox
from ptv2_engine.ops._dispatch import choose, launcher

torch.library.define("ptv2::dropout", "(Tensor x_TH, float p, Tensor seed, int site) -> Tensor y_TH")


@torch.library.register_fake("ptv2::dropout")
def _fake(x_TH: Tensor, p: float, seed: Tensor, site: int) -> Tensor:
    return x_TH.new_empty(x_TH.shape)


def reference(x_TH: Tensor, p: float, seed: Tensor, site: int) -> Tensor:
    """The same in plain PyTorch, differentiable, any dtype and device."""
    rows = torch.arange(x_TH.shape[0], device=x_TH.device)
    keep = _philox.keep_scale(rows, x_TH.shape[1], 0, p=p, seed=seed, site=site, stream=_philox.HIDDEN)
    return x_TH * keep.to(x_TH.dtype)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, p: float, seed: Tensor, site: int, backend: str) -> Tensor:
        ctx.plain = (p, seed, site, backend)
        return launcher(backend, x_TH.device, "dropout")(x_TH.contiguous(), p, seed, site)

    @staticmethod
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        p, seed, site, backend = ctx.plain
        return launcher(backend, dy_TH.device, "dropout")(dy_TH.contiguous(), p, seed, site), None, None, None, None


def dropout(x_TH: Tensor, p: float, seed: int | Tensor | None = None, site: int = 0) -> Tensor:
    """x [T, H] with a share p of its elements set to 0 and the others divided by 1 - p; x itself where p is 0.

    seed: int, int64 tensor [1] or None (drawn from torch's generator); site: the Philox call site.
    """
    seed = _philox.seed_tensor(seed, x_TH.device, p > 0)
    if seed is None:
        return x_TH
    choice = choose("dropout", x_TH.device, x_TH.dtype)
    if choice.backend == "reference":
        return reference(x_TH, p, seed, site)
    return _Dropout.apply(x_TH, p, seed, site, choice.backend)
