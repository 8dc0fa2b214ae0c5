"""Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in plain PyTorch.

Every backend draws its dropout bits from this generator with these counters, so a mask depends on the seed, the call
site and the element's position alone: nothing but the seed is saved for backward and all backends agree bit for bit.

key = (low, high) 32 bits of the seed. counter c3 = site * 8 + stream. An element is kept when its 32-bit word is at
least round(p * 2**32); kept values are scaled by 1 / (1 - p).

    stream        element                       c0      word   c1   c2
    HIDDEN        (t, h)                        h // 4  h % 4  t    0
    PREFIX_PROB   (b, n, i, prefix column j)    j // 4  j % 4  i    b * N + n
    TOKEN_PROB    (b, n, i, token column j)     j // 4  j % 4  i    b * N + n
    PREFIX_K / V  (b, p, n, d)                  d // 4  d % 4  p    b * N + n
"""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN, PREFIX_PROB, TOKEN_PROB, PREFIX_K, PREFIX_V = range(5)
NUM_STREAMS = 8

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_ROUNDS = 7


def threshold(p: float) -> int:
    """The smallest 32-bit word that is kept at drop probability p."""
    return min(int(p * 2**32 + 0.5), _MASK)


def _mul_hi_lo(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of multiplier * x for x in [0, 2**32) held in int64 (split so that nothing overflows)."""
    low = multiplier * (x & 0xFFFF)
    high = multiplier * (x >> 16) + (low >> 16)
    return (high >> 16) & _MASK, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_words(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor | int, seed: int | Tensor) -> Tensor:
    """The four words of each counter: int64 [..., 4] in [0, 2**32), for broadcastable int64 counters."""
    seed = int(seed) & 0xFFFFFFFFFFFFFFFF
    k0, k1 = seed & _MASK, seed >> 32
    c0, c1, c2, c3_all = torch.broadcast_tensors(c0, c1, c2, torch.as_tensor(c3, device=c0.device))
    for _ in range(_ROUNDS):
        hi0, lo0 = _mul_hi_lo(_M0, c0)
        hi1, lo1 = _mul_hi_lo(_M1, c2)
        c0, c1, c2, c3_all = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3_all ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return torch.stack((c0, c1, c2, c3_all), dim=-1)


def keep_scale(rows: Tensor, num_columns: int, c2: Tensor | int, *, p: float, seed: int | Tensor | None, site: int,
               stream: int) -> Tensor:
    """0 or 1/(1-p) for elements (rows[r], column): fp64 [..., R, num_columns]; c2 is broadcast against rows' leading dims."""
    assert seed is not None, "a mask needs a seed"
    device = rows.device
    groups = torch.arange((num_columns + 3) // 4, device=device)
    c2 = torch.as_tensor(c2, device=device)
    words = philox_words(groups, rows[..., None], c2[..., None, None] if c2.dim() else c2, site * NUM_STREAMS + stream, seed)
    words = words.flatten(-2)[..., :num_columns]
    return (words >= threshold(p)).double() / (1.0 - p)


def seed_tensor(seed: int | Tensor | None, device: torch.device, needed: bool) -> Tensor | None:
    """The seed as the int64 tensor [1] that kernels read; None stays None when no dropout needs it, else is drawn.

    Drawing uses torch's default CPU generator: no device synchronisation, and torch.manual_seed decides it.
    """
    if not needed:
        return None
    if seed is None:
        seed = int(torch.randint(2**62, (1,)))
    if isinstance(seed, int):
        return torch.tensor([seed]).to(device, non_blocking=True)
    return seed
