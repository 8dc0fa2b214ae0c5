"""Pre-LN layers (GLM, ModernBERT): the residual stream is never normed itself, each branch norms what it reads.

    y = LayerNorm(s)      s <- s + dropout(attention(y))      y = LayerNorm(s)      s <- s + dropout(ffn(y))

Adding a branch to the stream and norming the sum for the next branch is one kernel, add_norm_sum, so a layer hands on its
last branch unadded, and the next layer's first norm (or the final one) adds it.

Saved for backward in bf16: as layer.py says with GELU; with ModernBERT's GEGLU 16H exact (both halves of its product, 6H with
F = 1.5H), 2H lean (the product too is computed again) and 2H minimal. Where memory is minimal a layer hands on the stream
with its last branch added, rounded to the compute dtype, so that one tensor is kept; the next norm reads that, not the fp32 sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ptv2_engine.encoder.config import EncoderConfig
from ptv2_engine.encoder.layer import SITES, EncoderLayer, Normed, Prefix, Step, frozen
from ptv2_engine.encoder.recompute import recomputed
from ptv2_engine.encoder.stack import Encoder, of_layer
from ptv2_engine.ops import add_norm


class Residual(NamedTuple):
    """The stream [T, H], and a branch that is still to be added to it. stream None: the branch is the embeddings, or where memory
    is minimal the stream itself."""

    branch_TH: Tensor
    stream_TH: Tensor | None


class PreNormLayer(EncoderLayer):
    """Residual -> Residual."""

    def enter(self, state: Residual, step: Step) -> tuple[Normed, Tensor]:
        """(y, s): the attention's normed input and the stream."""
        branch_TH, stream_TH = state
        stream_TH = torch.zeros_like(branch_TH) if stream_TH is None else stream_TH
        return self.normed("attn_norm", branch_TH, stream_TH, step, SITES * self.index + 3, with_sum=True)

    def ffn(self, y: Normed, step: Step) -> Tensor:
        return self.ffn_down(self.gelu(y.x_TH, step))

    def body(self, y: Normed, stream_TH: Tensor, step: Step, prefix_k_KPND: Tensor | None, prefix_v_KPND: Tensor | None,
             rows_R: Tensor | None) -> Residual:
        """Everything behind the first norm."""
        o_TND = self.attention(y, step, prefix_k_KPND, prefix_v_KPND)
        if rows_R is not None:
            o_TND, stream_TH = o_TND.index_select(0, rows_R), stream_TH.index_select(0, rows_R)
        y, stream_TH = self.normed("ffn_norm", self.attn_out(o_TND.flatten(1)), stream_TH, step, SITES * self.index + 1,
                                   with_sum=True)
        return Residual(self.ffn(y, step), stream_TH)

    def whole(self, x_TH: Tensor, step: Step, prefix_k_KPND: Tensor | None, prefix_v_KPND: Tensor | None,
              rows_R: Tensor | None) -> Tensor:
        """Stream -> stream, one tensor each: the embeddings or the sum behind the layer below, and the sum behind this one, drawn
        as the next layer's norm would draw it. (The norm of that kernel is not used; its weights are this layer's.)"""
        if self.index == 0:
            y, stream_TH = self.enter(Residual(x_TH, None), step)
        else:
            y = Normed(F.layer_norm(x_TH, x_TH.shape[1:], self.attn_norm_weight, self.attn_norm_bias, self.eps))
            stream_TH = x_TH
        branch_TH, added_TH = self.body(y, stream_TH, step, prefix_k_KPND, prefix_v_KPND, rows_R)
        assert added_TH is not None
        return self.normed("ffn_norm", branch_TH, added_TH, step, SITES * (self.index + 1) + 3, with_sum=True)[1]

    def forward(self, state: Residual, step: Step, prefix_k_KPND: Tensor | None,  # type: ignore[override]
                prefix_v_KPND: Tensor | None, rows_R: Tensor | None = None) -> Residual:
        """rows_R: the rows that are needed of the output; attention still sees all T tokens."""
        if step.memory == "minimal":
            exact = step._replace(memory="exact")
            return Residual(recomputed(lambda x_TH, k, v: self.whole(x_TH, exact, k, v, rows_R), state.branch_TH, prefix_k_KPND,
                                       prefix_v_KPND, trains=step.trains), None)
        return self.body(*self.enter(state, step), step, prefix_k_KPND, prefix_v_KPND, rows_R)


class PreNormEncoder(Encoder):
    """Pre-LN layers and the final LayerNorm behind them."""

    layer_class = PreNormLayer

    def __init__(self, config: EncoderConfig, with_pooler: bool) -> None:
        super().__init__(config, with_pooler)
        self.final_norm_weight, self.final_norm_bias = frozen(config.hidden_size), frozen(config.hidden_size)

    def final_norm(self, state: Residual, step: Step) -> Tensor:
        weight_H, bias_H, eps = self.final_norm_weight, self.final_norm_bias, self.config.layer_norm_eps
        if state.stream_TH is None:
            return F.layer_norm(state.branch_TH, weight_H.shape, weight_H, bias_H, eps)
        return add_norm(state.branch_TH, state.stream_TH, weight_H, bias_H, eps, dropout_p=step.hidden_dropout, seed=step.seed,
                        site=SITES * len(self.layers) + 3)

    def run_layers(self, x_TH: Tensor, step: Step, prefix: Prefix | None, rows_R: Tensor | None) -> Tensor:
        state, last = Residual(x_TH, None), len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            state = layer(state, step, *of_layer(prefix, i), rows_R if i == last else None)
        return self.final_norm(state, step)
