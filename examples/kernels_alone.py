"""The attention op without the rest: ragged sequences, one shared trainable prefix. python examples/kernels_alone.py"""

from __future__ import annotations

import torch

from ptv2_engine.ops import prefix_attention


def main() -> torch.Tensor:
    """Returns the prefix's gradient, summed over the three sequences inside the kernel."""
    lengths, heads, dim, prompt = [7, 1, 12], 4, 32, 5
    q, k, v = torch.randn(3, sum(lengths), heads, dim).unbind(0)
    prefix_k, prefix_v = torch.randn(2, 1, prompt, heads, dim).unbind(0)
    prefix_k.requires_grad_()
    prefix_v.requires_grad_()
    cu_seqlens = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    out = prefix_attention(q, k, v, prefix_k, prefix_v, cu_seqlens, max(lengths))
    out.square().sum().backward()
    assert prefix_k.grad is not None
    return prefix_k.grad


if __name__ == "__main__":
    print(main().shape)
