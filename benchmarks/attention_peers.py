"""What a user could assemble instead of prefix_attention, on the same numbers: each builder returns a peer's input set.

A peer takes leaves that require grad, in the layout it wants (made before timing), and the same prefix and output gradient. What
it must do in every layer is inside its call: concatenating or gathering the prefix to the keys and values. What a batch needs
once (masks, offsets) is not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import InputSet
from ptv2_engine import ops
from ptv2_engine.testing import cu_seqlens_of

PASSES = {"forward": 4, "backward": 7, "both": 11}             # H-wide rows that must move a token


@dataclass
class Attention:
    """A packed batch: lengths of B sequences, N heads of D, P prefix rows."""

    lengths: list[int]
    P: int
    N: int
    D: int
    dtype: torch.dtype
    device: str

    def __post_init__(self) -> None:
        self.B, self.S, self.T = len(self.lengths), max(self.lengths), sum(self.lengths)
        self.cu = cu_seqlens_of(self.lengths, self.device)
        self.lengths_B = torch.tensor(self.lengths, device=self.device)
        self.present_BS = torch.arange(self.S, device=self.device)[None] < self.lengths_B[:, None]

    @property
    def bytes_of_set(self) -> int:
        return 4 * self.T * self.N * self.D * self.dtype.itemsize

    def draw(self, seed: int) -> tuple[Tensor, list[Tensor], Tensor]:
        """qkv [T, 3, N, D], prefix key and value [P, N, D], dout [T, N, D]."""
        generator = torch.Generator(self.device).manual_seed(seed)         # the host's would take seconds for a case on a GPU
        draw = lambda *shape: torch.randn(*shape, self.N, self.D, device=self.device, generator=generator).to(self.dtype)
        return draw(self.T, 3), [draw(self.P), draw(self.P)], draw(self.T)

    def padded(self, x_TND: Tensor) -> Tensor:
        """[B, N, S, D]"""
        out = x_TND.new_zeros(self.B, self.S, self.N, self.D)
        out[self.present_BS] = x_TND
        return out.transpose(1, 2).contiguous()

    def packed(self, results: list[Tensor]) -> list[Tensor]:
        """Of a padded contestant: output and gradients of q, k, v [B, N, S, D] and of the prefix [N, P, D], as ours has them."""
        return [*(x.transpose(1, 2)[self.present_BS] for x in results[:4]), *(x.transpose(0, 1) for x in results[4:])]


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def ours_in_cuda(case: Attention, seed: int) -> InputSet:
    """The CUDA C++ kernels, which nothing picks by itself yet. Raises BackendError with the reason where they do not run."""

    def attend(*args: Any) -> Tensor:
        with ops.use_backend("cuda"):
            return ops.prefix_attention_qkv(*args)

    return ours(case, seed, attend)


def ours(case: Attention, seed: int, attend: Callable[..., Tensor] = ops.prefix_attention_qkv) -> InputSet:
    """attend(qkv, prefix key, prefix value, cu_seqlens, longest)"""
    qkv, prefix, dout = case.draw(seed)
    leaves = leaves_of(qkv, *(p[None] for p in prefix)) if case.P else leaves_of(qkv)

    def call() -> Tensor:
        pk, pv = leaves[1:] if case.P else (None, None)
        return attend(leaves[0], pk, pv, case.cu, case.S)

    return InputSet(call, leaves, dout,
                    lambda r: [r[0], *(x for g in r[1:2] for x in g.unbind(1)), *(g[0] for g in r[2:])])


def sdpa_padded(case: Attention, seed: int, compiled: bool = False) -> InputSet:
    """PyTorch's SDPA (its own choice of kernel) on padded queries and keys that the prefix was concatenated to."""
    qkv, prefix, dout = case.draw(seed)
    q, k, v, *prefixes = leaves_of(*(case.padded(x) for x in qkv.unbind(1)), *(p.transpose(0, 1).contiguous() for p in prefix))
    mask = None
    if min(case.lengths) < case.S:
        mask = F.pad(case.present_BS, (case.P, 0), value=True)[:, None, None]

    def call() -> Tensor:
        keys, values = (torch.cat((p.expand(case.B, -1, -1, -1), x), 2) if case.P else x
                        for p, x in zip(prefixes if case.P else (None, None), (k, v), strict=True))
        return F.scaled_dot_product_attention(q, keys, values, mask)

    if compiled:
        call = torch.compile(call, dynamic=False, fullgraph=True)
    return InputSet(call, [q, k, v, *(prefixes if case.P else [])], case.padded(dout), case.packed)


def _gathered(case: Attention, seed: int, attend: Callable[..., Tensor]) -> InputSet:
    """Packed queries; keys and values gathered as [prefix ; tokens] of each sequence. attend(q, k, v, cu_q, cu_k, S, P + S)."""
    qkv, prefix, dout = case.draw(seed)
    q, k, v, *prefixes = leaves_of(*(x.contiguous() for x in qkv.unbind(1)), *prefix)
    longer = [n + case.P for n in case.lengths]
    cu_k = cu_seqlens_of(longer, case.device)
    pieces, start = [], case.P
    for n in case.lengths:                          # rows of cat((prefix, tokens))
        pieces.append(torch.cat((torch.arange(case.P), torch.arange(start, start + n))))
        start += n
    index = torch.cat(pieces).to(case.device)

    def call() -> Tensor:
        keys, values = (torch.cat((p, x)).index_select(0, index) if case.P else x
                        for p, x in zip(prefixes if case.P else (None, None), (k, v), strict=True))
        return attend(q, keys, values, case.cu, cu_k, case.S, case.S + case.P)

    return InputSet(call, [q, k, v, *(prefixes if case.P else [])], dout)


def varlen_gathered(case: Attention, seed: int) -> InputSet:
    """torch.nn.attention.varlen (FlashAttention 2, packed)."""
    from torch.nn.attention.varlen import varlen_attn

    return _gathered(case, seed, lambda q, k, v, cu_q, cu_k, s_q, s_k: varlen_attn(q, k, v, cu_q, cu_k, s_q, s_k))


def flash_attn_gathered(case: Attention, seed: int) -> InputSet:
    """flash-attn's varlen kernel, where its wheel is installed."""
    varlen = importlib.import_module("flash_attn").flash_attn_varlen_func
    return _gathered(case, seed, lambda q, k, v, cu_q, cu_k, s_q, s_k: varlen(q, k, v, cu_q, cu_k, s_q, s_k))


def flex_packed(case: Attention, seed: int, compiled: bool = True, autotune: bool = False) -> InputSet:
    """FlexAttention over one packed row: every query sees the prefix and its own document. The strongest one: the prefix is not
    expanded, and its gradient comes out of the kernel."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    qkv, prefix, dout = case.draw(seed)
    heads_first = [x.transpose(0, 1)[None].contiguous() for x in (*qkv.unbind(1), *prefix)]
    q, k, v, *prefixes = leaves_of(*heads_first)
    document = torch.repeat_interleave(torch.arange(case.B, device=case.device), case.lengths_B)
    P = case.P

    def sees(_b: Any, _h: Any, query: Tensor, key: Tensor) -> Tensor:
        return (key < P) | (document[(key - P).clamp(min=0)] == document[query])

    mask = create_block_mask(sees, None, None, case.T, case.T + P, device=case.device)
    attend = _compiled_flex(autotune) if compiled else flex_attention

    def call() -> Tensor:
        keys, values = (torch.cat((p, x), 2) if P else x
                        for p, x in zip(prefixes if P else (None, None), (k, v), strict=True))
        return attend(q, keys, values, block_mask=mask)

    return InputSet(call, [q, k, v, *(prefixes if P else [])], dout.transpose(0, 1)[None].contiguous(),
                    lambda r: [x[0].transpose(0, 1) for x in r])


def forget_compiled() -> None:
    """What torch.compile made so far: the next case compiles its own variants."""
    _flex.clear()
    torch._dynamo.reset()


_flex: dict[bool, Any] = {}


def _compiled_flex(autotune: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    if autotune not in _flex:
        mode = {"mode": "max-autotune-no-cudagraphs"} if autotune else {}
        # fullgraph: past its limit of variants dynamo would go on uncompiled, which is no peer
        _flex[autotune] = torch.compile(flex_attention, dynamic=False, fullgraph=True, **mode)
    return _flex[autotune]
