"""The CUDA C++ kernels (csrc/cuda): loads their library, and calls it with plain pointers and torch's current stream.

The library knows nothing of torch, so any torch that sees a GPU can call it. PTV2_CUDA=1 switches it on: it is off until its
kernels have run on a GPU and have been measured against Triton's.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from ptv2_engine import build_info
from ptv2_engine.errors import BackendError

LIBRARY = Path(__file__).resolve().parent / "_cuda_kernels.so"
CAPABILITIES = ((8, 0), (9, 0))                       # what the library holds code for
DTYPES = (torch.bfloat16, torch.float16)
# head dim -> strips of 16 keys that a backward of one sweep holds (SweepShape); longer rows take two kernels, and the prefix
# leaves at least one strip
MAX_STRIPS = {32: 16, 64: 16, 80: 8, 96: 8, 128: 8}
WIDE_HEAD_DIMS, WIDE_ROWS = (64, 128), 256             # forward on wgmma: head dims, and rows longer than this
PROGRAMS = 264                                        # blocks of a backward, about two for each of an H100's multiprocessors

_POINTERS = ("q", "k", "v", "prefix_k", "prefix_v", "cu_seqlens", "prompt_ids", "prompt_lengths", "seed", "out", "lse", "dout",
             "dqkv", "partial", "dprefix_k", "dprefix_v", "delta")
_STRIDES = ("q_row", "k_row", "v_row", "prefix_k_prompt", "prefix_k_row", "prefix_v_prompt", "prefix_v_row")
_INTS = ("T", "B", "N", "D", "P", "K", "longest", "groups")
_FLOATS = ("scale", "keep_scale", "prefix_scale")
_WORDS = ("threshold", "prefix_threshold", "site")


class Arguments(ctypes.Structure):
    """ptv2::cuda::Attention of csrc/cuda/abi.h, field by field."""

    _fields_ = [*((name, ctypes.c_void_p) for name in _POINTERS), *((name, ctypes.c_int64) for name in _STRIDES),
                *((name, ctypes.c_int32) for name in _INTS), *((name, ctypes.c_float) for name in _FLOATS),
                *((name, ctypes.c_uint32) for name in _WORDS), ("element", ctypes.c_int32), ("wide", ctypes.c_int32)]


def switched_on() -> bool:
    """Whether PTV2_CUDA=1 asks for these kernels wherever they take the shape."""
    return os.environ.get("PTV2_CUDA") == "1"


@functools.cache
def unavailable(device: int | None = None) -> str | None:
    """Why the library cannot be called on this machine's device of this number (None: the current one), or None."""
    if not LIBRARY.exists():
        reason = build_info.recorded().get("cuda", {}).get("reason")
        return f"not built ({reason or build_info.recorded().get('reason') or 'install the package again'})"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if (capability := torch.cuda.get_device_capability(device)) not in CAPABILITIES:
        found = ".".join(map(str, capability))
        return f"compute capability {found} (has {', '.join(f'{a}.{b}' for a, b in CAPABILITIES)})"
    driver, runtime = library().ptv2_cuda_driver_version(), library().ptv2_cuda_runtime_version()
    if driver < runtime // 1000 * 1000:
        return f"the driver is for CUDA {driver // 1000}, the kernels were built with CUDA {runtime // 1000}"
    return None


@functools.cache
def library(path: Path | None = None) -> ctypes.CDLL:
    """The library behind csrc/cuda/abi.h. Raises BackendError when it was built from another version of the sources."""
    path = path or LIBRARY
    loaded = ctypes.CDLL(str(path))
    loaded.ptv2_cuda_error.restype = ctypes.c_char_p
    if (size := loaded.ptv2_cuda_arguments_size()) != ctypes.sizeof(Arguments):
        raise BackendError(f"{path.name} takes arguments of {size} bytes, this version {ctypes.sizeof(Arguments)}: "
                           "install the package again.")
    return loaded


def shape_reasons(D: int, P: int, ranged: bool) -> list[str]:
    """Why the kernels do not take rows behind P prefix keys, or with key ranges; empty when they do."""
    if D not in MAX_STRIPS:
        return [f"head dim {D} (has {', '.join(map(str, MAX_STRIPS))})"]
    reasons = ["queries that do not see every token"] if ranged else []
    if (most := 16 * MAX_STRIPS[D] - 16) < P:
        reasons.append(f"{P} prefix keys (has up to {most} for head dim {D})")
    return reasons


def one_sweep(D: int, P: int, longest: int) -> bool:
    """Whether one sweep holds all keys of a row."""
    prefix = -(-P // 16)
    room = 14 if prefix == 0 and MAX_STRIPS[D] == 16 else MAX_STRIPS[D]     # two strips a warp: 15 of tokens fit sm_80's memory
    return prefix + -(-longest // 16) <= room


def takes_wide(D: int, longest: int, device: torch.device) -> bool:
    """Whether the forward runs on warpgroup products: sm_90a, rows long enough to be bound by products."""
    if D not in WIDE_HEAD_DIMS or longest <= WIDE_ROWS or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def _aligned(x: Tensor) -> Tensor:
    """x with N and D contiguous, its base and rows on multiples of 16 bytes: what cp.async copies."""
    outer = x.stride()[:-2]
    fits = x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] and not any(s * x.element_size() % 16 for s in outer)
    return x if fits and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _int32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int32).contiguous()


def _word(p: float) -> int:
    """The smallest Philox word that is kept at drop probability p (ptv2/philox.h)."""
    return min(int(p * 2**32 + 0.5), 2**32 - 1)


class _Call:
    """One call's arguments; keeps the tensors behind its pointers alive until the kernels are queued."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, pk: Tensor | None, pv: Tensor | None, cu_seqlens: Tensor, max_seqlen: int,
                 prompt_ids: Tensor | None, prompt_lengths: Tensor | None, scale: float, dropout_p: float,
                 prefix_dropout_p: float, seed: Tensor | None, site: int):
        self.arguments = Arguments()
        self.held: list[Tensor] = []
        self.device = q.device
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            raise BackendError(f"prefix_attention: the tensors are on {self.device}, which is not the current device; call it "
                               f"under torch.cuda.device({self.device.index}).")
        T, N, D = q.shape
        K, P = (1, 0) if pk is None else pk.shape[:2]
        q, k, v = map(_aligned, (q, k, v))
        self.point(q=q, k=k, v=v, seed=seed, cu_seqlens=_int32(cu_seqlens), prompt_ids=_int32(prompt_ids),
                   prompt_lengths=_int32(prompt_lengths if P else None))
        self.set(q_row=q.stride(0), k_row=k.stride(0), v_row=v.stride(0))
        if pk is not None and pv is not None:
            pk, pv = _aligned(pk), _aligned(pv)
            self.point(prefix_k=pk, prefix_v=pv)
            self.set(prefix_k_prompt=pk.stride(0), prefix_k_row=pk.stride(1))
            self.set(prefix_v_prompt=pv.stride(0), prefix_v_row=pv.stride(1))
        B = cu_seqlens.shape[0] - 1
        self.set(T=T, B=B, N=N, D=D, P=P, K=K, longest=max(max_seqlen, 1), groups=max(1, min(B + T // 64, PROGRAMS // N)))
        self.set(scale=scale, keep_scale=1 / (1 - dropout_p), prefix_scale=1 / (1 - prefix_dropout_p), threshold=_word(dropout_p),
                 prefix_threshold=_word(prefix_dropout_p), site=site, element=DTYPES.index(q.dtype),
                 wide=takes_wide(D, max_seqlen, q.device))

    def set(self, **values: float) -> None:
        for name, value in values.items():
            setattr(self.arguments, name, value)

    def point(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            if tensor is not None and tensor.numel():
                if tensor.device != self.device:
                    raise BackendError(f"prefix_attention: {name} is on {tensor.device} and q on {self.device}; move it there.")
                self.held.append(tensor)
                setattr(self.arguments, name, tensor.data_ptr())

    def run(self, name: str, path: Path | None) -> None:
        stream = torch._C._cuda_getCurrentRawStream(self.device.index) if self.device.type == "cuda" else None
        kernels = library(path)
        if code := getattr(kernels, f"ptv2_cuda_{name}")(ctypes.byref(self.arguments), ctypes.c_void_p(stream)):
            raise BackendError(f"{name}: the CUDA kernels report {kernels.ptv2_cuda_error(code).decode()!r} (error {code}); "
                               'use_backend("triton") runs without them.')


def prefix_attention_fwd(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prefix_k_KPND: Tensor | None, prefix_v_KPND: Tensor | None,
                         cu_seqlens: Tensor, max_seqlen: int, prompt_ids: Tensor | None, prompt_lengths: Tensor | None,
                         scale: float, dropout_p: float, prefix_dropout_p: float, seed: Tensor | None, site: int,
                         context_B: Tensor | None = None, key_range_T2: Tensor | None = None,
                         library_path: Path | None = None) -> tuple[Tensor, Tensor]:
    """out [T, N, D] and the natural log-sum-exp [N, T] in fp32, 0 in rows past the last sequence; as the Triton launcher, but for
    key ranges, which must be None."""
    T, N, D = q_TND.shape
    out_TND = q_TND.new_empty((T, N, D))
    lse_NT = q_TND.new_empty((N, T), dtype=torch.float32)
    if T > 0:
        call = _Call(q_TND, k_TND, v_TND, prefix_k_KPND, prefix_v_KPND, cu_seqlens, max_seqlen, prompt_ids, prompt_lengths, scale,
                     dropout_p, prefix_dropout_p, seed, site)
        call.point(out=out_TND, lse=lse_NT)
        call.set(groups=max(1, min(-(-T // 64), 3 * PROGRAMS // N)))        # of short rows: three blocks fit a multiprocessor
        call.run("prefix_attention_fwd", library_path)
    return out_TND, lse_NT


def prefix_attention_bwd(dout_TND: Tensor, q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, prefix_k_KPND: Tensor | None,
                         prefix_v_KPND: Tensor | None, out_TND: Tensor | None, lse_NT: Tensor, cu_seqlens: Tensor,
                         max_seqlen: int, prompt_ids: Tensor | None, prompt_lengths: Tensor | None, scale: float,
                         dropout_p: float, prefix_dropout_p: float, seed: Tensor | None, site: int, context_B: Tensor | None,
                         key_range_T2: Tensor | None, need_tokens: bool, need_prefix: bool,
                         library_path: Path | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """dqkv [T, 3, N, D] (empty [0] unless need_tokens); dprefix_k, dprefix_v fp32 [K, P, N, D] (empty [0] unless need_prefix).
    out_TND, where it was kept, spares long rows a pass over their keys."""
    T, N, D = q_TND.shape
    need_prefix = need_prefix and prefix_k_KPND is not None
    dqkv = q_TND.new_empty((T, 3, N, D) if need_tokens else 0)
    shape = prefix_k_KPND.shape if need_prefix and prefix_k_KPND is not None else (0,)
    dprefix_k, dprefix_v = (q_TND.new_empty(shape, dtype=torch.float32) for _ in range(2))
    if T == 0 or cu_seqlens.shape[0] == 1 or max_seqlen == 0:
        return dqkv.zero_(), dprefix_k.zero_(), dprefix_v.zero_()
    need_prefix = need_prefix and dprefix_k.numel() > 0
    if need_tokens or need_prefix:
        call = _Call(q_TND, k_TND, v_TND, prefix_k_KPND, prefix_v_KPND, cu_seqlens, max_seqlen, prompt_ids, prompt_lengths, scale,
                     dropout_p, prefix_dropout_p, seed, site)
        call.point(dout=_aligned(dout_TND.contiguous()), lse=lse_NT, dqkv=dqkv)
        if not one_sweep(D, call.arguments.P, max_seqlen):
            call.point(delta=torch.empty_like(lse_NT), out=out_TND)
        if need_prefix:
            call.point(partial=dprefix_k.new_empty((2, call.arguments.groups, *dprefix_k.shape)), dprefix_k=dprefix_k,
                       dprefix_v=dprefix_v)
        call.run("prefix_attention_bwd", library_path)
    return dqkv, dprefix_k, dprefix_v
