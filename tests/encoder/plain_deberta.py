"""DeBERTa v1 and v2 with a P-Tuning v2 prefix in plain, padded PyTorch, from the published semantics.

The prefix is expanded and concatenated, its relative scores are zero columns, masked entries become exactly 0 after the softmax
(a padded query row gives 0), the embeddings are multiplied by the mask. Relative scores are gathered pair by pair.
Takes a transformers model for its weights and config only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position


def _relative_rows(config: Any, S: int) -> Tensor:
    """[S, S]: the table row for query i, key j."""
    distance = torch.arange(S)[:, None] - torch.arange(S)[None]
    span = config.max_relative_positions if config.max_relative_positions >= 1 else config.max_position_embeddings
    buckets = getattr(config, "position_buckets", -1)
    if buckets > 0:
        distance, span = make_log_bucket_position(distance, buckets, span).long(), buckets
    return (distance + span).clamp(0, 2 * span - 1)


def run(model: Any, batch: dict[str, Tensor], prefix: Tensor | None = None) -> Tensor:
    """Hidden states [B, S, H] in the model's dtype. prefix: [L, 2, P, N, D]."""
    w, c = dict(model.named_parameters()), model.config
    v1, N = c.model_type == "deberta", c.num_attention_heads
    mask = batch["attention_mask"].to(model.dtype)
    B, S = mask.shape
    D = c.hidden_size // N

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], c.layer_norm_eps)

    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], N, -1).transpose(-2, -3)

    x = w["embeddings.word_embeddings.weight"][batch["input_ids"]]
    if c.position_biased_input:
        x = x + w["embeddings.position_embeddings.weight"][:S]
    if c.type_vocab_size:
        x = x + w["embeddings.token_type_embeddings.weight"][batch.get("token_type_ids", torch.zeros_like(batch["input_ids"]))]
    x = embedded = norm(x, "embeddings.LayerNorm") * mask[..., None]
    table = w.get("encoder.rel_embeddings.weight")
    if table is not None and "layer_norm" in (getattr(c, "norm_rel_ebd", None) or "none"):
        table = norm(table, "encoder.LayerNorm")
    rows, seen = _relative_rows(c, S), mask[:, None, None, :] * mask[:, None, :, None]
    for i in range(c.num_hidden_layers):
        name = f"encoder.layer.{i}.attention.self"
        if v1:
            q, k, v = heads(F.linear(x, w[f"{name}.in_proj.weight"])).chunk(3, -1)
            q, v = q + w[f"{name}.q_bias"].view(N, 1, D), v + w[f"{name}.v_bias"].view(N, 1, D)
            key, query = f"{name}.pos_proj", f"{name}.pos_q_proj"
        else:
            q, k, v = (heads(linear(x, f"{name}.{p}_proj")) for p in ("query", "key", "value"))
            share = getattr(c, "share_att_key", False)
            key, query = (f"{name}.{'' if share else 'pos_'}{p}_proj" for p in ("key", "query"))
        scores = q @ k.transpose(-1, -2)
        if "c2p" in c.pos_att_type:
            scores = scores + torch.einsum("bnid,nijd->bnij", q, heads(linear(table, key))[:, rows])
        if "p2c" in c.pos_att_type:
            scores = scores + torch.einsum("bnjd,nijd->bnij", k, heads(linear(table, query))[:, rows])
        allowed = seen
        if prefix is not None:
            pk, pv = (p.transpose(0, 1).to(x.dtype).expand(B, -1, -1, -1) for p in prefix[i])
            scores = torch.cat((q @ pk.transpose(-1, -2), scores), -1)
            v = torch.cat((pv, v), 2)
            allowed = torch.cat((mask[:, None, :, None].expand(-1, -1, -1, pk.shape[2]), seen), -1)
        scores = (scores / (D * (1 + len(c.pos_att_type)))**0.5).masked_fill(allowed == 0, torch.finfo(x.dtype).min)
        o = ((scores.softmax(-1) * (allowed != 0)) @ v).transpose(1, 2).flatten(2)
        layer = f"encoder.layer.{i}"
        x = norm(linear(o, f"{layer}.attention.output.dense") + x, f"{layer}.attention.output.LayerNorm")
        h = F.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(linear(h, f"{layer}.output.dense") + x, f"{layer}.output.LayerNorm")
        if i == 0 and "encoder.conv.conv.weight" in w:
            conv = F.conv1d(embedded.transpose(1, 2), w["encoder.conv.conv.weight"], w["encoder.conv.conv.bias"],
                            padding=w["encoder.conv.conv.weight"].shape[2] // 2).transpose(1, 2) * mask[..., None]
            act = {"gelu": F.gelu, "tanh": torch.tanh}[c.conv_act]
            x = norm(x + act(conv), "encoder.conv.LayerNorm") * mask[..., None]
    return x
