"""One post-LN encoder layer: five ops, the equations of BERT.

    q, k, v = x Wqkv + b                                             frozen_linear
    o = softmax(q [Pk ; k]^T / sqrt(D)) [Pv ; v]                     prefix_attention
    x = LayerNorm(dropout(o Wo + b) + x)                             frozen_linear, add_norm
    x = LayerNorm(dropout(gelu(x W1 + b) W2 + b) + x)                linear_gelu, frozen_linear, add_norm

Saved for backward in bf16: q, k, v 6H, x_hat twice 4H, the GELU code 4H bytes a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptv2_engine.encoder.config import EncoderConfig
from ptv2_engine.ops import FrozenLinear, add_norm, linear_gelu, prefix_attention_qkv

SITES = 4      # Philox call sites a layer: 0 attention, 1 add_norm after attention, 2 add_norm after the FFN
Ranges = tuple[Tensor, Tensor]      # context_B, key_range_T2 of prefix_attention


class Prefix(NamedTuple):
    """The materialised prompt: one copy of keys and values a layer, shared by the batch. It lives for one step."""

    k: list[Tensor | None]             # a layer: [K, P, N, D], or None where the layer has no prompt
    v: list[Tensor | None]
    length: int                        # P
    prompt_lengths: Tensor | None      # int64 [K]: rows in use, None: all P
    dropout_p: float                   # drawn anew for each sequence; 0 outside training


class Step(NamedTuple):
    """What all layers of one forward pass share."""

    cu_seqlens: Tensor
    max_seqlen: int
    prompt_ids: Tensor | None
    prompt_lengths: Tensor | None
    prefix_dropout: float
    hidden_dropout: float
    attention_dropout: float
    seed: Tensor | None
    ranges: Ranges | None = None       # GLM: which tokens a query sees
    slots: Tensor | None = None        # DeBERTa: distance -> row of the relative tables
    windows: Mapping[int | None, Ranges] | None = None       # ModernBERT: window -> ranges
    rotary: Mapping[float, Tensor] | None = None        # ModernBERT: theta -> cos and sin
    positions_T: Tensor | None = None                   # ModernBERT: the rotary position of each row
    record: list[Tensor] | None = None                  # collects each layer's qkv [T, 3, N, D]

    def attention(self, site: int) -> dict[str, Any]:
        """The arguments that every attention op takes."""
        return {"prompt_ids": self.prompt_ids, "prompt_lengths": self.prompt_lengths, "dropout_p": self.attention_dropout,
                "prefix_dropout_p": self.prefix_dropout, "seed": self.seed, "site": site}


def frozen(*shape: int, like: torch.device | str = "meta") -> nn.Parameter:
    """An unfilled frozen parameter; loading assigns it."""
    return nn.Parameter(torch.empty(shape, device=like), requires_grad=False)


def frozen_linear_of(out_features: int, in_features: int, bias: bool = True) -> FrozenLinear:
    weight = torch.empty(out_features, in_features, device="meta")
    return FrozenLinear(weight, torch.empty(out_features, device="meta") if bias else None)


class EncoderLayer(nn.Module):
    """x_TH -> x_TH, with the layer's prefix [K, P, N, D] as an argument: the layer never holds it."""

    def __init__(self, config: EncoderConfig, index: int) -> None:
        super().__init__()
        H, F = config.hidden_size, config.ffn_size
        self.index, self.num_heads, self.head_dim = index, config.num_heads, config.head_dim
        self.eps, self.activation = config.layer_norm_eps, config.activation
        self.qkv = frozen_linear_of(3 * H, H)
        self.attn_out = frozen_linear_of(H, H)
        self.attn_norm_weight, self.attn_norm_bias = frozen(H), frozen(H)
        self.ffn_up = frozen_linear_of(F, H)
        self.ffn_down = frozen_linear_of(H, F)
        self.ffn_norm_weight, self.ffn_norm_bias = frozen(H), frozen(H)

    def project(self, x_TH: Tensor, step: Step) -> Tensor:
        """q, k, v [T, 3, N, D] of the tokens."""
        qkv_T3ND = self.qkv(x_TH).view(x_TH.shape[0], 3, self.num_heads, self.head_dim)
        if step.record is not None:
            step.record.append(qkv_T3ND)
        return qkv_T3ND

    def attend(self, x_TH: Tensor, step: Step, prefix_k_KPND: Tensor | None, prefix_v_KPND: Tensor | None) -> Tensor:
        """The attention's output o_TND, before its projection."""
        context_B, key_range_T2 = step.ranges or (None, None)
        return prefix_attention_qkv(self.project(x_TH, step), prefix_k_KPND, prefix_v_KPND, step.cu_seqlens, step.max_seqlen,
                                    context_B=context_B, key_range_T2=key_range_T2, **step.attention(SITES * self.index))

    def forward(self, x_TH: Tensor, step: Step, prefix_k_KPND: Tensor | None, prefix_v_KPND: Tensor | None,
                rows_R: Tensor | None = None) -> Tensor:
        """rows_R: the rows that are needed of the output, [R, H] then; attention still sees all T tokens."""
        site = SITES * self.index
        o_TND = self.attend(x_TH, step, prefix_k_KPND, prefix_v_KPND)
        if rows_R is not None:
            o_TND, x_TH = o_TND.index_select(0, rows_R), x_TH.index_select(0, rows_R)
        x_TH = add_norm(self.attn_out(o_TND.flatten(1)), x_TH, self.attn_norm_weight, self.attn_norm_bias, self.eps,
                        dropout_p=step.hidden_dropout, seed=step.seed, site=site + 1)
        h_TF = linear_gelu(x_TH, self.ffn_up, approximate=self.activation)
        return add_norm(self.ffn_down(h_TF), x_TH, self.ffn_norm_weight, self.ffn_norm_bias, self.eps,
                        dropout_p=step.hidden_dropout, seed=step.seed, site=site + 2)
