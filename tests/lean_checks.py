"""What memory policy lean keeps: x_hat in int8 and the derivative of GELU in 6 bits. `functions` holds one backend's kernels
under the ops' names (torch.ops.ptv2, or the Triton modules); the truth is fp64 PyTorch, the budget what the format itself
costs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from ptv2_engine.ops import _philox
from ptv2_engine.testing import assert_error_within, poisoned_memory

BLOCK = 64
HALF_CODE = 1 / 49 / 2      # the furthest a derivative is from its 6-bit code


def triton_functions() -> SimpleNamespace:
    from ptv2_engine.kernels import add_norm, linear_gelu

    return SimpleNamespace(add_norm_fwd=add_norm.add_norm_fwd, add_norm_bwd=add_norm.add_norm_bwd, renorm=add_norm.renorm,
                           gelu_=linear_gelu.gelu_, gelu_bwd=linear_gelu.gelu_bwd)


def randn(*shape: int, seed: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def check_int8_norm(functions: Any, T: int, H: int, dtype: torch.dtype = torch.float32, p: float = 0.0, with_sum: bool = False,
                    device: str = "cpu") -> None:
    x, residual, dy, dsum = (randn(T, H, seed=s, dtype=dtype, device=device) for s in range(4))
    residual[:, ::7] *= 20                                  # outliers: a scale for the row would drown the rest
    weight, bias = (randn(H, seed=4 + s, dtype=dtype, device=device) for s in range(2))
    seed, site, eps = torch.tensor([11], device=device), 7, 1e-5
    with poisoned_memory():
        y, codes, rstd, scales, total = functions.add_norm_fwd(x, residual, weight, bias, eps, p, seed, site, "int8", with_sum)
        full = functions.add_norm_fwd(x, residual, weight, bias, eps, p, seed, site, "full", with_sum)
        dresidual, dx = functions.add_norm_bwd(dy, dsum if with_sum else None, codes, scales, rstd, weight, p, seed, site)
        again = functions.renorm(codes, scales, weight, bias, dtype)
        exact_again = functions.renorm(full[1], None, weight, bias, dtype)
    assert codes.dtype == torch.int8 and scales.shape == (T, -(-H // BLOCK)) and scales.dtype == torch.float32
    assert torch.equal(y, full[0]) and torch.equal(rstd, full[2]) and torch.equal(total, full[4]), "what is kept changes nothing"

    keep = _philox.keep_scale(torch.arange(T, device=device), H, 0, p=p, seed=seed, site=site, stream=_philox.HIDDEN)
    s = (x.double() * (keep if p > 0 else 1.0) + residual.double()).requires_grad_()
    hat = torch.nn.functional.layer_norm(s, (H,), eps=eps)
    padded = torch.nn.functional.pad(hat.detach().abs(), (0, -H % BLOCK)).view(T, -(-H // BLOCK), BLOCK)
    assert_error_within("scales", scales, padded.amax(2) / 127, None, 8.0)
    steps = scales.double().repeat_interleave(BLOCK, 1)[:, :H]
    decoded = codes.double() * steps
    assert ((decoded - hat).abs() <= steps * (0.5 + 1e-3) + 1e-7).all(), "a code is further than half a step from x_hat"
    # y again: half a step of x_hat, times the weight, and one rounding
    rounding = torch.finfo(dtype).eps * (1 + y.double().abs())
    assert ((again.double() - y.double()).abs() <= steps * weight.double().abs() * 0.501 + 2 * rounding).all()
    eps_hat = torch.finfo(dtype).eps * hat.detach().abs()
    assert ((exact_again.double() - y.double()).abs() <= eps_hat * weight.double().abs() + 2 * rounding + 1e-6).all()

    # the gradient is that of LayerNorm with x_hat replaced by its code
    g = dy.double() * weight.double()
    std = 1 / (s.detach().var(1, unbiased=False) + eps).sqrt()
    want = std[:, None] * (g - g.mean(1, keepdim=True) - decoded * (g * decoded).mean(1, keepdim=True))
    want = want + (dsum.double() if with_sum else 0)
    assert_error_within("dresidual", dresidual, want, want.to(dtype), 4.0)
    if p > 0:
        assert_error_within("dx", dx, want * keep, (want * keep).to(dtype), 4.0)
        assert torch.equal(dx != 0, (keep > 0) & (dresidual != 0))


def check_packed_gelu(functions: Any, T: int, F: int, dtype: torch.dtype = torch.float32, approximate: str = "none",
                      device: str = "cpu") -> None:
    z, dh = (randn(T, F, seed=s, dtype=dtype, device=device) * (3 - 2 * s) for s in range(2))
    h, reference = z.clone(), z.clone()
    with poisoned_memory():
        packed = functions.gelu_(h, approximate, True, 6)
        functions.gelu_(reference, approximate, False, 8)
        dz = functions.gelu_bwd(dh, packed, 6)
    assert packed.shape == (T, 3, F // 4) and packed.dtype == torch.uint8
    assert torch.equal(h, reference), "what is kept changes nothing"
    leaf = z.double().requires_grad_()
    slope, = torch.autograd.grad(torch.nn.functional.gelu(leaf, approximate=approximate).sum(), leaf)
    high = packed >> 6                                                      # two bits of the last quarter's code in each byte
    codes = torch.cat(((packed & 63).flatten(1), high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4), 1).double()
    decoded = codes / 49 - 1 / 7
    assert ((decoded - slope).abs() <= HALF_CODE + 1e-4).all()
    assert_error_within("dz", dz, dh.double() * decoded, (dh.double() * decoded).to(dtype), 4.0)
