"""frozen_linear: y = x W^T + b with a frozen W. Saves nothing: dX = dY W needs the weight only, dW is never formed.

On the CPU the matrix products are oneDNN's with W reordered once for the forward and once for dX (a frozen weight never
changes, so the reorder that oneDNN otherwise repeats per call is paid once). On a GPU they are cuBLAS's.
Weights are read from the module when backward runs, so a sharded module may free them between the two passes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptv2_engine.ops._dispatch import choose

PACKED_DTYPES = (torch.float32, torch.bfloat16)
# oneDNN chooses the packed layout for a number of rows; measured within 1 % of each other from 256 to 8192.
_TYPICAL_ROWS = 2048


def reference(x_TH: Tensor, weight_OH: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """F.linear: differentiable in everything."""
    return F.linear(x_TH, weight_OH, bias_O)


def can_pack() -> bool:
    """Whether this build of torch has oneDNN's prepacked linear."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class FrozenLinear(nn.Module):
    """A linear layer whose weight [O, I] and bias [O] never get a gradient.

    `forward(x [T, I]) -> [T, O]` is the op `frozen_linear`. Packed copies for oneDNN are made on first use on the CPU and
    made again when the weight's storage or version changes (load_state_dict, .to()).
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)
        self._packed: dict[str, tuple[tuple[int, int, torch.dtype], Tensor]] = {}

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, frozen"

    def forward(self, x_TI: Tensor) -> Tensor:
        return frozen_linear(x_TI, self)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": {}}      # opaque oneDNN tensors can be neither pickled nor deep-copied

    def packed_bytes(self) -> int:
        """Bytes held by the packed copies that exist now."""
        return len(self._packed) * self.weight.numel() * self.weight.element_size()

    def packed(self, direction: str) -> Tensor:
        """W reordered by oneDNN: "forward" for x W^T, "backward" for dY W."""
        weight = self.weight
        key = (weight.data_ptr(), weight._version, weight.dtype)
        held = self._packed.get(direction)
        if held is None or held[0] != key:
            plain = weight.detach() if direction == "forward" else weight.detach().t().contiguous()
            held = self._packed[direction] = (key, torch.ops.mkldnn._reorder_linear_weight(plain, _TYPICAL_ROWS))
        return held[1]

    def matmul(self, x_TI: Tensor, packed: bool) -> Tensor:
        """x W^T + b, no autograd."""
        if packed:
            return torch.ops.mkldnn._linear_pointwise(x_TI, self.packed("forward"), self.bias, "none", [], "")
        return F.linear(x_TI, self.weight, self.bias)

    def matmul_transposed(self, dy_TO: Tensor, packed: bool) -> Tensor:
        """dY W, no autograd."""
        if packed:
            return torch.ops.mkldnn._linear_pointwise(dy_TO, self.packed("backward"), None, "none", [], "")
        return dy_TO @ self.weight


def packs(x: Tensor) -> bool:
    """Whether the oneDNN path with packed weights is taken for x: CPU, a dtype it has, and at least one row."""
    return x.device.type == "cpu" and x.dtype in PACKED_DTYPES and x.shape[0] > 0 and can_pack()


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, linear: FrozenLinear, packed: bool) -> Tensor:
        ctx.linear, ctx.packed = linear, packed
        return linear.matmul(x_TI, packed)

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor, None, None]:
        return ctx.linear.matmul_transposed(dy_TO.contiguous(), ctx.packed), None, None


def as_frozen(linear: FrozenLinear | Tensor, bias_O: Tensor | None = None) -> FrozenLinear:
    """The FrozenLinear itself, or one made around a plain weight [O, I] (a benchmark's or a test's; packs every time)."""
    return (
        linear if isinstance(linear, FrozenLinear) else FrozenLinear(linear.detach(), None if bias_O is None else bias_O.detach())
    )


def frozen_linear(x_TI: Tensor, linear: FrozenLinear | Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b with W and b frozen.

    Arguments:
        x_TI: [T, I] contiguous. linear: a FrozenLinear, or a plain weight [O, I] with bias_O [O].
    Returns:
        y_TO [T, O]; only x gets a gradient (on the `reference` backend W and b do too if they require it).
    """
    choice = choose("frozen_linear", x_TI.device, x_TI.dtype)
    if choice.backend == "reference":
        if isinstance(linear, FrozenLinear):
            return reference(x_TI, linear.weight, linear.bias)
        return reference(x_TI, linear, bias_O)
    linear = as_frozen(linear, bias_O)
    packed = packs(x_TI)
    if torch.is_grad_enabled() and x_TI.requires_grad:
        return _FrozenLinear.apply(x_TI, linear, packed)
    return linear.matmul(x_TI.detach(), packed)
