"""Frozen layers that live in host memory, or in their file, and visit the device for as long as they are multiplied with.

A weight never changes, so nothing is ever written back: a layer's matrices are one block of bytes that is copied into one of a
few slots on the device, ahead of the pass that needs it. Who asks is the linear layer itself, when it multiplies; that layer i
follows layer i - 1 (forward) or i + 1 (backward) says which block to bring next. So recomputation, any memory policy and a
backward that stops at the lowest prompt need no code of their own.

On a GPU copies run on a stream of their own. A block may be overwritten once the products that read it are done: an event is
recorded when the layer is left. With three slots the copy of layer i + 1 runs beside the products of layer i.
Layer-to-layer execution from host memory is L2L's (arXiv 2002.05645); with frozen weights it needs no way back.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ptv2_engine.errors import ConfigError
from ptv2_engine.ops import FrozenLinear, Quantised
from ptv2_engine.ops.frozen_linear import PLAIN

SLOTS = 3
MATRICES = ("qkv", "attn_out", "ffn_up", "ffn_down")
_ALIGN = 256             # bytes: any dtype's view, and what cuBLAS likes


@dataclass(frozen=True)
class Part:
    """Where one tensor of a weight lies in its layer's block."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def view(self, block: Tensor) -> Tensor:
        return block[self.start:self.start + self.nbytes].view(self.dtype).view(self.shape)


@dataclass
class Layout:
    """The parts of each linear layer of a block, codes first, and the block's bytes."""

    parts: dict[FrozenLinear, tuple[str, tuple[Part, ...]]] = field(default_factory=dict)
    nbytes: int = 0

    def add(self, linear: FrozenLinear, kind: str, tensors: Iterable[Tensor]) -> None:
        parts = []
        for t in tensors:
            parts.append(Part(self.nbytes, t.dtype, tuple(t.shape)))
            self.nbytes += -(-parts[-1].nbytes // _ALIGN) * _ALIGN
        self.parts[linear] = (kind, tuple(parts))


class Blocks(Protocol):
    """Where blocks come from."""

    layouts: list[Layout]

    def read_into(self, layer: int, block: Tensor) -> None:
        """Copy a layer's block to the host or the device; asynchronously where source and target allow it."""
        ...


class HostBlocks:
    """Blocks in host memory, pinned where a GPU reads them. Layers are added one by one, and give up their own weights."""

    def __init__(self, gpu: torch.device | None = None) -> None:
        self.layouts: list[Layout] = []
        self.blocks: list[Tensor] = []
        self.gpu = gpu

    def add(self, layer: nn.Module) -> None:
        layout = layout_of(layer)
        block = torch.empty(layout.nbytes, dtype=torch.uint8) if self.gpu is None else pinned(layout.nbytes, self.gpu)
        for linear, (_, parts) in layout.parts.items():
            for part, tensor in zip(parts, contents(linear)[1], strict=True):
                part.view(block).copy_(tensor)
            linear.give_up()
        self.layouts.append(layout)
        self.blocks.append(block)

    def read_into(self, layer: int, block: Tensor) -> None:
        block[:self.layouts[layer].nbytes].copy_(self.blocks[layer], non_blocking=True)


def pinned(nbytes: int, device: torch.device) -> Tensor:
    """A block of page-locked memory on pages of its own. (torch's allocator of such memory rounds up to a power of two: a third
    more at GLM-10B.) From that allocator where the driver refuses."""
    page = mmap.PAGESIZE
    size = -(-nbytes // page) * page
    buffer = torch.empty(size + page, dtype=torch.uint8)
    start = -buffer.data_ptr() % page
    block, runtime = buffer[start:start + size], torch.cuda.cudart()
    with torch.cuda.device(device):
        if int(runtime.cudaHostRegister(block.data_ptr(), size, 1)) == 0:          # 1: for all devices
            weakref.finalize(buffer.untyped_storage(), runtime.cudaHostUnregister, block.data_ptr())
            return block
        with contextlib.suppress(RuntimeError):         # the refusal stays behind as the runtime's last error: let this read it
            torch.zeros(1, device=device)
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


class FileBlocks:
    """Blocks that are put together from a memory-mapped checkpoint each time; `fill` writes one weight into a view."""

    def __init__(self, layouts: list[Layout], fill: Callable[[FrozenLinear, Tensor], None]) -> None:
        self.layouts, self.fill = layouts, fill

    def read_into(self, layer: int, block: Tensor) -> None:
        for linear, (_, parts) in self.layouts[layer].parts.items():
            self.fill(linear, parts[0].view(block))


@dataclass
class _Slot:
    block: Tensor
    layer: int = -1
    used: int = 0                            # when, counted in changes of layer
    loading: Future[None] | None = None      # the thread that reads a file
    ready: Any = None                        # CUDA events: the copy is done, the products are done
    free: Any = None


class WeightStream:
    """Brings layers' weights into slots on a device, one ahead.

    Arguments:
        blocks: where they come from; every layer has one. device: where they are needed. slots: blocks on the device, at least 2.
    """

    def __init__(self, blocks: HostBlocks | FileBlocks, device: torch.device, slots: int = SLOTS) -> None:
        layouts = blocks.layouts
        self.blocks, self.device = blocks, device
        self.owner = {linear: i for i, layout in enumerate(layouts) for linear in layout.parts}
        size, count = max(layout.nbytes for layout in layouts), min(max(slots, 2), len(layouts))
        self.slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(count)]
        self.current, self.step, self.clock = -1, 1, 0
        self.from_file = isinstance(blocks, FileBlocks)
        self.thread = ThreadPoolExecutor(1, "ptv2-weights") if self.from_file else None
        cuda = self.slots[0].block.is_cuda
        self.copies = torch.cuda.Stream(device) if cuda else None
        if self.copies is not None:         # the slots' memory may still be in use by what had it before, and outlives them here
            self.copies.wait_stream(torch.cuda.current_stream(device))
            for slot in self.slots:
                slot.block.record_stream(self.copies)
        self.staging = [(torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)
                        ] if cuda and self.from_file else []
        self.copied_bytes = 0

    def __deepcopy__(self, memo: Any) -> WeightStream:
        raise ConfigError("a model whose weights are streamed cannot be copied; load it a second time.")

    @property
    def plain_dtype(self) -> torch.dtype | None:
        """The dtype of weights that are no codes."""
        kinds = ((kind, parts[0].dtype) for layout in self.blocks.layouts for kind, parts in layout.parts.values())
        return next((dtype for kind, dtype in kinds if kind == PLAIN), None)

    @property
    def nbytes(self) -> int:
        """Device memory of the slots."""
        return sum(slot.block.numel() for slot in self.slots)

    def fetch(self, linear: FrozenLinear) -> Quantised:
        """The weight of one linear layer, on the device, until two other layers have been asked for."""
        layer = self.owner[linear]
        if layer != self.current:
            self._enter(layer)
        slot = self._find(layer)
        assert slot is not None
        kind, parts = self.blocks.layouts[layer].parts[linear]
        codes, scales = parts[0].view(slot.block), parts[1].view(slot.block) if len(parts) > 1 else slot.block[:0]
        return Quantised(kind, codes, scales, (linear.out_features, linear.in_features))

    def _find(self, layer: int) -> _Slot | None:
        return next((slot for slot in self.slots if slot.layer == layer), None)

    def _enter(self, layer: int) -> None:
        """Leave the current layer for this one: wait for its block, and bring the one behind it."""
        compute = torch.cuda.current_stream(self.device) if self.copies is not None else None
        if (left := self._find(self.current)) is not None and compute is not None:
            left.free = compute.record_event()
        if self.current >= 0:
            self.step = 1 if layer > self.current else -1
        self.clock += 1
        self.current = layer
        slot = self._find(layer) or self._load(layer)
        slot.used = self.clock
        if slot.loading is not None:
            loading, slot.loading = slot.loading, None
            if loading.exception() is not None:                 # reading ahead failed: once more, now that it is needed
                self._copy_or_forget(slot, layer)
        if slot.ready is not None and compute is not None:
            compute.wait_event(slot.ready)
        ahead = layer + self.step
        if 0 <= ahead < len(self.blocks.layouts) and self._find(ahead) is None:
            self._load(ahead)

    def _load(self, layer: int) -> _Slot:
        """Start copying a layer's block into the slot that was left longest ago."""
        slot = min((s for s in self.slots if s.layer != self.current), key=lambda s: s.used)
        slot.layer, slot.used = layer, self.clock
        self.copied_bytes += self.blocks.layouts[layer].nbytes
        if self.thread is not None:
            slot.loading = self.thread.submit(self._copy, slot, layer)
            return slot
        self._copy_or_forget(slot, layer)
        return slot

    def _copy_or_forget(self, slot: _Slot, layer: int) -> None:
        """Copy; where that fails nobody may take the slot for this layer's."""
        try:
            self._copy(slot, layer)
        except BaseException:
            slot.layer = self.current = -1
            raise

    def _copy(self, slot: _Slot, layer: int) -> None:
        if self.copies is None:
            self.blocks.read_into(layer, slot.block)
            return
        with torch.cuda.stream(self.copies):
            if slot.free is not None:
                self.copies.wait_event(slot.free)
            if self.staging:                    # file -> pinned -> device, where the copy from this pinned buffer is done
                self.staging.append(self.staging.pop(0))
                staged, copied = self.staging[0]
                copied.synchronize()
                self.blocks.read_into(layer, staged)
                slot.block.copy_(staged, non_blocking=True)
                copied.record(self.copies)
            else:
                self.blocks.read_into(layer, slot.block)
            slot.ready = self.copies.record_event()


def matrices(layer: nn.Module) -> Iterator[tuple[str, FrozenLinear]]:
    """The linear layers of an encoder layer whose weights are worth quantising and streaming."""
    return ((name, module) for name, module in layer.named_children() if name in MATRICES and isinstance(module, FrozenLinear))


def contents(linear: FrozenLinear) -> tuple[str, list[Tensor]]:
    """The kind of a weight and the tensors that hold it."""
    if linear.held is not None:
        return linear.held.kind, [linear.held.codes, linear.held.scales]
    assert linear.weight is not None
    return PLAIN, [linear.weight.detach()]


def layout_of(layer: nn.Module, dtype: torch.dtype | None = None) -> Layout:
    """The block of a layer as it is, or with its matrices plain in dtype."""
    layout = Layout()
    for _, linear in matrices(layer):
        kind, tensors = contents(linear)
        layout.add(linear, kind, tensors if dtype is None else [t.to(dtype) for t in tensors])
    return layout


def start_stream(blocks: HostBlocks | FileBlocks, device: torch.device, slots: int = SLOTS) -> WeightStream:
    """Stream all layers of these blocks from now on."""
    stream = WeightStream(blocks, device, slots)
    for linear in stream.owner:
        linear.stream_from(stream)
    return stream
