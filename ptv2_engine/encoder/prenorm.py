"""Pre-LN layers (GLM, ModernBERT): the residual stream is never normed itself, each branch norms what it reads.

    y = LayerNorm(s)      s <- s + dropout(attention(y))      y = LayerNorm(s)      s <- s + dropout(ffn(y))

Adding a branch to the stream and norming the sum for the next branch is one kernel, add_norm_sum, so a layer hands on its
last branch unadded, and the next layer's first norm (or the final one) adds it.
Saved for backward in bf16: q, k, v 6H, x_hat twice 4H, and the FFN's derivative: 14H bytes a token with GELU, 16H with
ModernBERT's GEGLU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ptv2_engine.encoder.config import EncoderConfig
from ptv2_engine.encoder.layer import SITES, EncoderLayer, Prefix, Step, frozen
from ptv2_engine.encoder.stack import Encoder, of_layer
from ptv2_engine.ops import add_norm, add_norm_sum, linear_gelu


class Residual(NamedTuple):
    """The stream [T, H], and a branch that is still to be added to it. stream None: the branch is the embeddings."""

    branch_TH: Tensor
    stream_TH: Tensor | None


class PreNormLayer(EncoderLayer):
    """Residual -> Residual. first_norm=False: the first layer reads the embeddings as they are (ModernBERT)."""

    def enter(self, state: Residual, step: Step) -> tuple[Tensor, Tensor]:
        """(y, s): the attention's normed input and the stream."""
        branch_TH, stream_TH = state
        stream_TH = torch.zeros_like(branch_TH) if stream_TH is None else stream_TH
        return add_norm_sum(branch_TH, stream_TH, self.attn_norm_weight, self.attn_norm_bias, self.eps,
                            dropout_p=step.hidden_dropout, seed=step.seed, site=SITES * self.index + 3)

    def ffn(self, y_TH: Tensor) -> Tensor:
        return self.ffn_down(linear_gelu(y_TH, self.ffn_up, approximate=self.activation))

    def forward(self, state: Residual, step: Step, prefix_k_KPND: Tensor | None,  # type: ignore[override]
                prefix_v_KPND: Tensor | None, rows_R: Tensor | None = None) -> Residual:
        """rows_R: the rows that are needed of the output; attention still sees all T tokens."""
        y_TH, stream_TH = self.enter(state, step)
        o_TND = self.attend(y_TH, step, prefix_k_KPND, prefix_v_KPND)
        if rows_R is not None:
            o_TND, stream_TH = o_TND.index_select(0, rows_R), stream_TH.index_select(0, rows_R)
        y_TH, stream_TH = add_norm_sum(self.attn_out(o_TND.flatten(1)), stream_TH, self.ffn_norm_weight, self.ffn_norm_bias,
                                       self.eps, dropout_p=step.hidden_dropout, seed=step.seed, site=SITES * self.index + 1)
        return Residual(self.ffn(y_TH), stream_TH)


class PreNormEncoder(Encoder):
    """Pre-LN layers and the final LayerNorm behind them."""

    layer_class = PreNormLayer

    def __init__(self, config: EncoderConfig, with_pooler: bool) -> None:
        super().__init__(config, with_pooler)
        self.final_norm_weight, self.final_norm_bias = frozen(config.hidden_size), frozen(config.hidden_size)

    def run_layers(self, x_TH: Tensor, step: Step, prefix: Prefix | None, rows_R: Tensor | None) -> Tensor:
        state, last = Residual(x_TH, None), len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            state = layer(state, step, *of_layer(prefix, i), rows_R if i == last else None)
        assert state.stream_TH is not None
        return add_norm(state.branch_TH, state.stream_TH, self.final_norm_weight, self.final_norm_bias,
                        self.config.layer_norm_eps, dropout_p=step.hidden_dropout, seed=step.seed, site=SITES * (last + 1) + 1)
