"""One post-LN encoder layer: five ops, the equations of BERT.

    q, k, v = x Wqkv + b                                             frozen_linear
    o = softmax(q [Pk ; k]^T / sqrt(D)) [Pv ; v]                     prefix_attention
    x = LayerNorm(dropout(o Wo + b) + x)                             frozen_linear, add_norm
    x = LayerNorm(dropout(gelu(x W1 + b) W2 + b) + x)                linear_gelu, frozen_linear, add_norm

Saved for backward in bf16, in bytes a token (MEMORY):
    exact    14 H   q, k, v 6H, x_hat twice 4H, the derivative of GELU in 8 bits 4H (F = 4H)
    lean    5.1 H   x_hat twice in 8 bits 2.1H, the derivative in 6 bits 3H; q, k, v and the attention computed again from x_hat
    minimal   2 H   the layer's input; the layer computed again
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptv2_engine.encoder.config import EncoderConfig
from ptv2_engine.encoder.recompute import NormSource, recomputed
from ptv2_engine.ops import FrozenLinear, add_norm_kept, linear_gelu, prefix_attention_qkv

SITES = 4      # Philox call sites a layer: 0 attention, 1 add_norm after attention, 2 add_norm after the FFN;
               # behind the last one's: 0 embedding, 1 convolution, 2 input prompt, 3 last norm
MEMORY = ("exact", "lean", "minimal")       # what layers keep for backward, from most to least
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
    memory: str = "exact"                               # of MEMORY
    trains: bool = False               # the layers' own weights get gradients
    relative_RH: Tensor | None = None  # DeBERTa: the relative embeddings, where layers have not projected them for good

    def attention(self, site: int) -> dict[str, Any]:
        """The arguments that every attention op takes."""
        return {"prompt_ids": self.prompt_ids, "prompt_lengths": self.prompt_lengths, "dropout_p": self.attention_dropout,
                "prefix_dropout_p": self.prefix_dropout, "seed": self.seed, "site": site}


class Normed(NamedTuple):
    """A layer's normed input x_TH, and what it can be made from again."""

    x_TH: Tensor
    source: NormSource | None = None

    def handed_on(self) -> Normed:
        """For another layer, whose backward may run when this one's weights are sharded again (FSDP): with copies of them."""
        if self.source is None:
            return self
        return Normed(self.x_TH, NormSource(self.source.kept, self.source.weight_H.clone(), self.source.bias_H.clone()))


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

    def attention(self, x: Normed, step: Step, prefix_k_KPND: Tensor | None, prefix_v_KPND: Tensor | None) -> Tensor:
        """attend; in backward once more from x where memory is lean."""
        if step.memory != "lean":
            return self.attend(x.x_TH, step, prefix_k_KPND, prefix_v_KPND)
        return recomputed(lambda x_TH, k, v: self.attend(x_TH, step, k, v), x.x_TH, prefix_k_KPND, prefix_v_KPND, source=x.source)

    def normed(self, norm: str, branch_TH: Tensor, residual_TH: Tensor, step: Step, site: int,
               with_sum: bool = False) -> tuple[Normed, Tensor]:
        """LayerNorm(dropout(branch) + residual) by the parameters norm_weight and norm_bias, and the sum where asked for."""
        weight_H, bias_H = getattr(self, f"{norm}_weight"), getattr(self, f"{norm}_bias")
        y_TH, sum_TH, kept = add_norm_kept(branch_TH, residual_TH, weight_H, bias_H, self.eps, dropout_p=step.hidden_dropout,
                                           seed=step.seed, site=site, with_sum=with_sum,
                                           keep="int8" if step.memory == "lean" else "full")
        source = NormSource(kept, weight_H, bias_H) if kept is not None and step.memory == "lean" else None
        return Normed(y_TH, source), y_TH if sum_TH is None else sum_TH

    def gelu(self, x_TH: Tensor, step: Step) -> Tensor:
        """gelu(x W1 + b), its derivative kept in 8 bits (in full in fp32) or, where memory is lean, in 6."""
        return linear_gelu(x_TH, self.ffn_up, approximate=self.activation, bits=6 if step.memory == "lean" else 8)

    def forward(self, x: Normed, step: Step, prefix_k_KPND: Tensor | None, prefix_v_KPND: Tensor | None,
                rows_R: Tensor | None = None) -> Normed:
        """rows_R: the rows that are needed of the output, [R, H] then; attention still sees all T tokens."""
        if step.memory == "minimal":
            exact = step._replace(memory="exact")
            return Normed(recomputed(lambda x_TH, k, v: self(Normed(x_TH), exact, k, v, rows_R).x_TH, x.x_TH, prefix_k_KPND,
                                     prefix_v_KPND, trains=step.trains))
        site, x_TH = SITES * self.index, x.x_TH
        o_TND = self.attention(x, step, prefix_k_KPND, prefix_v_KPND)
        if rows_R is not None:
            o_TND, x_TH = o_TND.index_select(0, rows_R), x_TH.index_select(0, rows_R)
        x_TH = self.normed("attn_norm", self.attn_out(o_TND.flatten(1)), x_TH, step, site + 1)[0].x_TH
        return self.normed("ffn_norm", self.ffn_down(self.gelu(x_TH, step)), x_TH, step, site + 2)[0].handed_on()
