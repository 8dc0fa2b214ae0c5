"""GLM in plain, padded PyTorch, written from the architecture's description: the truth that the stack is compared with.

Its state dict has the published names, so the engine loads it like a checkpoint. The prefix is keys and values [L][2][P, N, D]
that every token sees. Scores are masked as published: times the mask, then minus 65504 where it is 0.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from ptv2_engine.encoder.glm_sizes import glm_config

TINY = glm_config(3, 64, 4, 120, 79)


class _Layer(nn.Module):
    def __init__(self, H: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(H, 1e-5), nn.LayerNorm(H, 1e-5)
        self.attention = nn.ModuleDict({"query_key_value": nn.Linear(H, 3 * H), "dense": nn.Linear(H, H)})
        self.mlp = nn.ModuleDict({"dense_h_to_4h": nn.Linear(H, 4 * H), "dense_4h_to_h": nn.Linear(4 * H, H)})


class PlainGLM(nn.Module):
    def __init__(self, config: dict | None = None, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.settings = config or TINY
        H, M = self.settings["hidden_size"], self.settings["max_sequence_length"] + 1
        self.word_embeddings = nn.Embedding(self.settings["vocab_size"], H)
        self.transformer = nn.ModuleDict({
            "position_embeddings": nn.Embedding(M, H), "block_position_embeddings": nn.Embedding(M, H),
            "layers": nn.ModuleList(_Layer(H) for _ in range(self.settings["num_layers"])),
            "final_layernorm": nn.LayerNorm(H, 1e-5)})
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.dim() > 1:
                    p.normal_(0, 0.2)
                elif "layernorm" in name and name.endswith("weight"):
                    p.uniform_(0.5, 1.5)
                else:
                    p.normal_(0, 0.1)

    @property
    def config(self) -> SimpleNamespace:
        return SimpleNamespace(to_dict=lambda: dict(self.settings), _name_or_path="a plain GLM")

    def forward(self, ids_S: torch.Tensor, positions_2S: torch.Tensor, seen_SS: torch.Tensor,
                prefix: torch.Tensor | None = None) -> torch.Tensor:
        """One sequence: hidden states [S, H]. seen: bool, query by key. prefix [L, 2, P, N, D]."""
        t, N = self.transformer, self.settings["num_attention_heads"]
        x = self.word_embeddings(ids_S) + t["position_embeddings"](positions_2S[0])
        x = x + t["block_position_embeddings"](positions_2S[1])
        for i, layer in enumerate(t["layers"]):
            q, k, v = (part.view(len(ids_S), N, -1).transpose(0, 1) for part in
                       layer.attention["query_key_value"](layer.input_layernorm(x)).chunk(3, -1))
            seen = seen_SS.to(x.dtype)
            if prefix is not None:
                pk, pv = (p.transpose(0, 1).to(x.dtype) for p in prefix[i])
                k, v = torch.cat((pk, k), 1), torch.cat((pv, v), 1)
                seen = F.pad(seen, (pk.shape[1], 0), value=1.0)
            scores = q @ (k.transpose(1, 2) / k.shape[2]**0.5)
            scores = scores * seen - 65504.0 * (1 - seen)
            o = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
            x = x + layer.attention["dense"](o)
            h = layer.mlp["dense_h_to_4h"](layer.post_attention_layernorm(x))
            h = 0.5 * h * (1 + torch.tanh(0.7978845608028654 * h * (1 + 0.044715 * h * h)))
            x = x + layer.mlp["dense_4h_to_h"](h)
        return t["final_layernorm"](x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.word_embeddings.weight)


def causal_from(sep: int, length: int) -> torch.Tensor:
    """bool [S, S]: allowed(i, j) = j <= i or j < sep."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    return (j <= i) | (j < sep)
