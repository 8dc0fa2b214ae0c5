"""The strongest thing a user can assemble: a packed post-LN encoder on FlexAttention, the prefix one copy that every query sees.

Plain PyTorch around torch.compile: one row of all tokens, a block mask "prefix, or the same sequence", frozen weights, dropout.
It takes a PromptedModel's weights (BERT, RoBERTa), so that both compute the same function; tests hold it to ours. It does less in
training: no dropout of attention and prefix, which FlexAttention lacks, and the embeddings are computed once.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptv2_engine import PromptedModel


class FlexEncoder(nn.Module):
    """call() -> the loss of the batch it was made for; only prefix and head have parameters."""

    def __init__(self, model: PromptedModel, packed: dict[str, Any], compiled: bool = True) -> None:
        super().__init__()
        from torch.nn.attention.flex_attention import create_block_mask

        encoder, config = model.encoder, model.encoder.config
        self.L, self.N, self.D, self.P = config.num_layers, config.num_heads, config.head_dim, model.prompt_config.prompt_length
        self.eps, self.hidden, self.frozen = config.layer_norm_eps, encoder.hidden_dropout, [layer for layer in encoder.layers]
        self.bank = nn.Parameter(model.prompt.bank[0].detach().clone())
        self.head = copy.deepcopy(model.head)
        batch = model.packed_batch(**{k: packed[k] for k in ("input_ids", "seq_lengths", "max_seqlen")})
        with torch.no_grad():                      # the embeddings, too, are the same
            self.x = encoder.embeddings(batch, self.P if config.shifts_positions else 0, 0.0, None, 0)[None]
        self.seed = torch.zeros(1, dtype=torch.long, device=model.device)
        self.first, self.labels, self.pooler = batch.cu_seqlens[:-1].long(), packed["labels"], encoder.pooler
        owner, P = batch.sequence_of_token(), self.P
        sees = lambda _b, _h, q, k: (k < P) | (owner[(k - P).clamp(min=0)] == owner[q])
        T = batch.num_tokens
        self.mask = create_block_mask(sees, None, None, T, T + P, device=str(model.device))
        self.layer = torch.compile(self._layer, dynamic=False, fullgraph=True) if compiled else self._layer

    def _layer(self, x: Tensor, pk: Tensor, pv: Tensor, weights: list[Tensor]) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        wqkv, bqkv, wo, bo, g1, b1, w1, c1, w2, c2, g2, b2 = weights
        q, k, v = F.linear(x, wqkv, bqkv).view(1, -1, 3, self.N, self.D).permute(2, 0, 3, 1, 4)
        o = flex_attention(q, torch.cat((pk, k), 2), torch.cat((pv, v), 2), block_mask=self.mask)
        p, H = self.hidden if self.training else 0.0, x.shape[-1]
        x = F.layer_norm(x + F.dropout(F.linear(o.transpose(1, 2).flatten(2), wo, bo), p), (H,), g1, b1, self.eps)
        return F.layer_norm(x + F.dropout(F.linear(F.gelu(F.linear(x, w1, c1)), w2, c2), p), (H,), g2, b2, self.eps)

    def forward(self) -> Tensor:
        prefix = self.bank.view(self.P, self.L, 2, self.N, self.D).permute(1, 2, 3, 0, 4).to(self.x.dtype)       # [L, 2, N, P, D]
        x = F.dropout(self.x, self.hidden if self.training else 0.0)
        for i, layer in enumerate(self.frozen):
            weights = [t.detach() for t in (layer.qkv.weight, layer.qkv.bias, layer.attn_out.weight, layer.attn_out.bias,
                                            layer.attn_norm_weight, layer.attn_norm_bias, layer.ffn_up.weight, layer.ffn_up.bias,
                                            layer.ffn_down.weight, layer.ffn_down.bias, layer.ffn_norm_weight,
                                            layer.ffn_norm_bias)]
            x = self.layer(x, prefix[i, 0][None], prefix[i, 1][None], weights)
        pooled = x[0, self.first]
        if self.head.dense is None:                # the pretrained pooler, frozen; otherwise the head trains one
            pooled = torch.tanh(F.linear(pooled, self.pooler.weight.detach(), self.pooler.bias.detach()))
        return F.cross_entropy(self.head(pooled, self.seed), self.labels)
