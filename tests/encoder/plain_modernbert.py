"""ModernBERT with a prefix in plain, padded PyTorch. Takes a transformers model for its weights and config only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Each pair (x_i, x_{i + D/2}) as a complex number, turned by position * theta ** (-2 i / D)."""
    S, D = x.shape[-2:]
    angles = torch.arange(S).double()[:, None] * theta ** (-torch.arange(0, D, 2).double() / D)
    turn = torch.polar(torch.ones(()).double(), angles)
    y = torch.complex(x[..., : D // 2].double(), x[..., D // 2:].double()) * turn
    return torch.cat((y.real, y.imag), -1).to(x.dtype)


def run(model: Any, batch: dict[str, Tensor], prefix: Tensor | None = None) -> Tensor:
    """Hidden states [B, S, H]. prefix: [L, 2, P, N, D], without a position, seen by every token in every layer."""
    w, c = dict(model.named_parameters()), model.config
    N, mask = c.num_attention_heads, batch["attention_mask"].bool()
    S = mask.shape[1]
    far = (torch.arange(S)[:, None] - torch.arange(S)[None]).abs()

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w.get(f"{name}.bias"), c.norm_eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    x = norm(w["embeddings.tok_embeddings.weight"][batch["input_ids"]], "embeddings.norm")
    for i in range(c.num_hidden_layers):
        name, kind = f"layers.{i}", c.layer_types[i]
        y = x if i == 0 else norm(x, f"{name}.attn_norm")
        q, k, v = (part.unflatten(-1, (N, -1)).transpose(1, 2) for part in linear(y, f"{name}.attn.Wqkv").chunk(3, -1))
        theta = c.rope_parameters[kind]["rope_theta"]
        q, k = _rotate(q, theta), _rotate(k, theta)
        seen = mask[:, None, None, :] & (far <= c.local_attention // 2 if kind == "sliding_attention" else far >= 0)
        if prefix is not None:
            pk, pv = (p.transpose(0, 1).to(x.dtype).expand(x.shape[0], -1, -1, -1) for p in prefix[i])
            k, v = torch.cat((pk, k), 2), torch.cat((pv, v), 2)
            seen = F.pad(seen.expand(x.shape[0], -1, S, -1), (pk.shape[2], 0), value=True)
        scores = (q @ k.transpose(-1, -2) / q.shape[-1]**0.5).masked_fill(~seen, torch.finfo(x.dtype).min)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{name}.attn.Wo")
        a, gate = linear(norm(x, f"{name}.mlp_norm"), f"{name}.mlp.Wi").chunk(2, -1)
        x = x + linear(F.gelu(a) * gate, f"{name}.mlp.Wo")
    return norm(x, "final_norm")
