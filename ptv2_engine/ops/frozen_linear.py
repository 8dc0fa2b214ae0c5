"""frozen_linear: y = x W^T + b with a frozen W. Saves nothing: dX = dY W needs the weight only, dW is never formed.

On the CPU the matrix products are oneDNN's with W reordered once for the forward and once for dX (a frozen weight never
changes, so the reorder that oneDNN otherwise repeats per call is paid once). A CPU without bf16 instructions that oneDNN uses
multiplies bf16 in fp32: torch's own bf16 loop takes 80 times as long there (docs/performance.md). On a GPU they are cuBLAS's.
Weights are read from the module when backward runs, so a sharded module may free them between the two passes.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ptv2_engine.ops._dispatch import choose, device_type
from ptv2_engine.ops.quantised import Quantised, dequantise

PACKED_DTYPES = (torch.float32, torch.bfloat16)
# oneDNN chooses the packed layout for a number of rows; measured within 1 % of each other from 256 to 8192.
_TYPICAL_ROWS = 2048
PLAIN = "plain"          # the kind of a held weight that is no code, but a matrix in some float dtype


def reference(x_TH: Tensor, weight_OH: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """F.linear: differentiable in everything."""
    return F.linear(x_TH, weight_OH, bias_O)


def can_pack() -> bool:
    """Whether this build of torch has oneDNN's prepacked linear."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def multiplies_bf16() -> bool:
    """Whether oneDNN multiplies bf16 on this CPU."""
    return can_pack() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class WeightSource(Protocol):
    """Where a linear layer finds a weight that it does not hold itself."""

    def fetch(self, linear: FrozenLinear) -> Quantised: ...


class FrozenLinear(nn.Module):
    """A linear layer whose weight [O, I] and bias [O] get a gradient on the `reference` backend only, where they require it.

    `forward(x [T, I]) -> [T, O]` is the op `frozen_linear`. The weight is one of three things: a parameter in the compute dtype;
    `held`, quantised codes that become a matrix in x's dtype only while they are multiplied with; or with a `stream`, which knows
    where it is. Packed copies of a parameter for oneDNN are made on first use on the CPU and made again when its storage or
    version changes (load_state_dict, .to()).
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.weight: nn.Parameter | None = nn.Parameter(weight_OI, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)
        self.absent: slice | None = None           # rows of the bias that an architecture lacks: zero, also where biases train
        self.held: Quantised | None = None
        self.stream: WeightSource | None = None
        self._packed: dict[str, tuple[tuple[int, int, torch.dtype], Tensor]] = {}

    def extra_repr(self) -> str:
        kind = "" if self.held is None else f", {self.held.kind}"
        streamed = "" if self.stream is None else ", streamed"
        return f"in_features={self.in_features}, out_features={self.out_features}, frozen{kind}{streamed}"

    def forward(self, x_TI: Tensor) -> Tensor:
        return frozen_linear(x_TI, self)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": {}}      # opaque oneDNN tensors can be neither pickled nor deep-copied

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenLinear:
        """.to(), .cuda(): codes follow to the device, and keep their dtype."""
        super()._apply(fn, recurse)
        if self.held is not None:
            device = fn(torch.empty(0, dtype=torch.uint8, device=self.held.codes.device)).device
            self.held = self.held._replace(codes=self.held.codes.to(device), scales=self.held.scales.to(device))
        return self

    def hold(self, held: Quantised) -> None:
        """Use codes in place of the parameter."""
        self.weight, self.held, self._packed = None, held, {}

    def give_up(self) -> None:
        """Drop the weight: a stream has a copy."""
        self.weight, self.held, self._packed = None, None, {}

    def stream_from(self, stream: WeightSource) -> None:
        """Ask a stream for the weight from now on."""
        self.give_up()
        self.stream = stream

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I] in the compute dtype: itself, or decoded for the moment."""
        held = self.held if self.stream is None else self.stream.fetch(self)
        if held is None:
            assert self.weight is not None
            return self.weight
        return held.codes.to(dtype) if held.kind == PLAIN else dequantise(held, dtype)

    def present(self) -> Tensor:
        """bool [O]: the rows of the bias that the architecture has."""
        mask = torch.ones(self.out_features, dtype=torch.bool, device=None if self.bias is None else self.bias.device)
        if self.absent is not None:
            mask[self.absent] = False
        return mask

    def copies(self) -> list[Tensor]:
        """What stands for the parameter or beside it: codes and their scales, packed copies."""
        return [*(made for _, made in self._packed.values()), *(() if self.held is None else (self.held.codes, self.held.scales))]

    def packed_bytes(self) -> int:
        """Bytes held by the packed copies that exist now."""
        return 0 if self.weight is None else len(self._packed) * self.weight.numel() * self.weight.element_size()

    def packs(self, x: Tensor) -> bool:
        """Whether x is multiplied with packed copies: on the CPU, in a dtype oneDNN has, where the weight is a parameter (copies
        of codes or of a streamed weight would cost the memory that those save) that does not train: torch's fused AdamW does not
        raise the version by which a stale copy is known."""
        return (device_type(x) == "cpu" and x.dtype in PACKED_DTYPES and x.shape[0] > 0 and self.weight is not None
                and not self.weight.requires_grad and can_pack() and (x.dtype == torch.float32 or multiplies_bf16()))

    def packed(self, direction: str) -> Tensor:
        """W reordered by oneDNN: "forward" for x W^T, "backward" for dY W."""
        weight = self.weight
        assert weight is not None
        fake = isinstance(weight.data, FakeTensor)      # when memory is planned: the copy's size, and no pointer
        key = (0 if fake else weight.data_ptr(), weight._version, weight.dtype)
        held = self._packed.get(direction)
        if held is None or held[0] != key:
            plain = weight.detach() if direction == "forward" else weight.detach().t().contiguous()
            made = torch.empty_like(plain) if fake else torch.ops.mkldnn._reorder_linear_weight(plain, _TYPICAL_ROWS)
            held = self._packed[direction] = (key, made)
        return held[1]

    def matmul(self, x_TI: Tensor, packed: bool) -> Tensor:
        """x W^T + b, no autograd."""
        if packed:
            return torch.ops.mkldnn._linear_pointwise(x_TI, self.packed("forward"), self.bias, "none", [], "")
        return plain_linear(x_TI, self.dense(x_TI.dtype), self.bias)

    def matmul_transposed(self, dy_TO: Tensor, packed: bool) -> Tensor:
        """dY W, no autograd."""
        if packed:
            return torch.ops.mkldnn._linear_pointwise(dy_TO, self.packed("backward"), None, "none", [], "")
        if widens(dy_TO):
            return (dy_TO.float() @ self.dense(dy_TO.dtype).float()).to(dy_TO.dtype)
        return dy_TO @ self.dense(dy_TO.dtype)


def widens(x: Tensor) -> bool:
    """Whether x is multiplied in fp32: bf16 on a CPU whose oneDNN has no bf16."""
    return x.dtype == torch.bfloat16 and device_type(x) == "cpu" and not multiplies_bf16()


def plain_linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """F.linear, in fp32 where x widens."""
    if not widens(x_TI):
        return F.linear(x_TI, weight_OI, bias_O)
    return F.linear(x_TI.float(), weight_OI.float(), None if bias_O is None else bias_O.float()).to(x_TI.dtype)


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


def _reference(x_TI: Tensor, linear: FrozenLinear | Tensor, bias_O: Tensor | None) -> Tensor:
    """reference, but a weight that is no parameter is asked for again in backward: autograd must not keep what is decoded for
    the moment, or what the next layer's weights will overwrite."""
    if not isinstance(linear, FrozenLinear):
        return reference(x_TI, linear, bias_O)
    if linear.weight is not None:
        bias: Tensor | None = linear.bias
        if bias is not None and linear.absent is not None and bias.requires_grad:
            bias = torch.where(linear.present(), bias, 0)
        return reference(x_TI, linear.weight, bias)
    return _FrozenLinear.apply(x_TI, linear, False)


def frozen_linear(x_TI: Tensor, linear: FrozenLinear | Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b with W and b frozen.

    Arguments:
        x_TI: [T, I] contiguous. linear: a FrozenLinear, or a plain weight [O, I] with bias_O [O].
    Returns:
        y_TO [T, O]; only x gets a gradient (on the `reference` backend W and b do too if they require it).
    """
    choice = choose("frozen_linear", x_TI.device, x_TI.dtype)
    if choice.backend == "reference":
        return _reference(x_TI, linear, bias_O)
    linear = as_frozen(linear, bias_O)
    packed = linear.packs(x_TI)
    if torch.is_grad_enabled() and x_TI.requires_grad:
        return _FrozenLinear.apply(x_TI, linear, packed)
    return linear.matmul(x_TI.detach(), packed)
