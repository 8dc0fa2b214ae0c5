"""DeBERTa v2 and v3 (arXiv 2006.03654, 2111.09543): v1 with log buckets, a normed table, shared projections, a convolution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptv2_engine.encoder import deberta
from ptv2_engine.encoder.config import EncoderConfig, RelativeConfig, refuse_switch
from ptv2_engine.encoder.layer import SITES, Normed, Prefix, Step, frozen
from ptv2_engine.encoder.sources import Source, concatenated, one
from ptv2_engine.encoder.stack import of_layer
from ptv2_engine.ops import _philox, add_norm
from ptv2_engine.ops.frozen_linear import plain_linear

MODEL_TYPES = ("deberta-v2",)
PREFIXES, HEADS, POOLER, BUFFERS = deberta.PREFIXES, deberta.HEADS, deberta.POOLER, deberta.BUFFERS
UNUSED = deberta.UNUSED
_CONV_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "gelu": F.gelu, "relu": F.relu}


class Convolution(nn.Module):
    """y = LayerNorm(layer0(x) + act(dropout(conv1d(x)))): a convolution over each sequence of the embeddings, beside layer 0."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        assert config.relative is not None
        H, self.eps = config.hidden_size, config.layer_norm_eps
        self.size, self.activation = config.relative.conv_kernel, _CONV_ACTIVATIONS[config.relative.conv_activation]
        self.weight, self.bias = frozen(H, self.size * H), frozen(H)        # [H, tap, H]: one product over gathered taps
        self.norm_weight, self.norm_bias = frozen(H), frozen(H)

    def neighbours(self, x_TH: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[T, taps * H]: the rows around each row, zero beyond the ends of its sequence."""
        T = x_TH.shape[0]
        rows = torch.arange(T, device=x_TH.device)
        owner = torch.searchsorted(cu_seqlens[1:].long(), rows, right=True)
        taps = []
        for offset in range(-((self.size - 1) // 2), self.size // 2 + 1):
            there = (rows + offset).clamp(0, T - 1)
            inside = (there == rows + offset) & (owner[there] == owner)
            taps.append(x_TH[there] * inside[:, None])
        return torch.cat(taps, 1)

    def forward(self, x_TH: Tensor, layer0_RH: Tensor, step: Step, site: int, rows_R: Tensor | None) -> Tensor:
        out = plain_linear(self.neighbours(x_TH, step.cu_seqlens), self.weight, self.bias)
        if step.hidden_dropout > 0 and step.seed is not None:
            rows = torch.arange(x_TH.shape[0], device=x_TH.device)
            keep = _philox.keep_scale(rows, x_TH.shape[1], 0, p=step.hidden_dropout, seed=step.seed, site=site,
                                      stream=_philox.HIDDEN)
            out = out * keep.to(out.dtype)
        out = self.activation(out)
        out = out if rows_R is None else out.index_select(0, rows_R)
        return add_norm(out, layer0_RH, self.norm_weight, self.norm_bias, self.eps)


class DebertaV2Encoder(deberta.DebertaEncoder):
    def __init__(self, config: EncoderConfig, with_pooler: bool) -> None:
        super().__init__(config, with_pooler)
        assert config.relative is not None
        self.conv = Convolution(config) if config.relative.conv_kernel else None

    def run_layers(self, x_TH: Tensor, step: Step, prefix: Prefix | None, rows_R: Tensor | None) -> Tensor:
        x, last = Normed(x_TH), len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            rows = rows_R if i == last else None
            x = layer(x, step, *of_layer(prefix, i), rows)
            if i == 0 and self.conv is not None:
                x = Normed(self.conv(x_TH, x.x_TH, step, SITES * (last + 1) + 1, rows))
        return x.x_TH


ENCODER = DebertaV2Encoder


def read_config(config: Mapping[str, Any]) -> EncoderConfig:
    terms = deberta.terms_of(config, "deberta-v2")
    buckets = max(config.get("position_buckets", -1), 0)
    norm = [x.strip() for x in (config.get("norm_rel_ebd") or "none").lower().split("|")]
    kernel = config.get("conv_kernel_size", 0) or 0
    for name, value, fine, what in (
            ("norm_rel_ebd", norm, set(norm) <= {"none", "layer_norm"}, "none or layer_norm"),
            ("conv_groups", config.get("conv_groups", 1), not kernel or config.get("conv_groups", 1) == 1, "one group"),
            ("conv_kernel_size", kernel, kernel % 2 or not kernel, "odd kernels"),
            ("conv_act", config.get("conv_act", "tanh"), not kernel or config.get("conv_act", "tanh") in _CONV_ACTIVATIONS,
             "tanh, gelu or relu")):
        if not fine:
            refuse_switch("deberta-v2", name, value, what)
    relative = RelativeConfig(
        terms=terms, span=buckets or deberta.span_of(config), buckets=buckets, max_distance=deberta.span_of(config),
        projections="shared" if config.get("share_att_key", False) else "biased", norm=bool(terms) and "layer_norm" in norm,
        conv_kernel=kernel, conv_activation=config.get("conv_act", "tanh"))
    return deberta.read_deberta(config, "deberta-v2", relative)


def names(config: EncoderConfig) -> dict[str, Source]:
    assert config.relative is not None
    table = deberta.common_names(config)
    if config.relative.norm:
        table |= {f"relative_norm_{w}": one(f"encoder.LayerNorm.{w}") for w in ("weight", "bias")}
    if config.relative.conv_kernel:
        table |= {"conv.weight": Source(("encoder.conv.conv.weight",), lambda t: t[0].transpose(1, 2).flatten(1)),
                  "conv.bias": one("encoder.conv.conv.bias")}
        table |= {f"conv.norm_{w}": one(f"encoder.conv.LayerNorm.{w}") for w in ("weight", "bias")}
    for i in range(config.num_layers):
        theirs = f"encoder.layer.{i}.attention.self"
        for w in ("weight", "bias"):
            table[f"layers.{i}.qkv.{w}"] = concatenated(*(f"{theirs}.{x}_proj.{w}" for x in ("query", "key", "value")))
            if config.relative.projections == "biased":
                own = (("c2p", "pos_key", "pos_key_proj"), ("p2c", "pos_query", "pos_query_proj"))
                table |= {f"layers.{i}.{ours}.{w}": one(f"{theirs}.{name}.{w}") for term, ours, name in own
                          if term in config.relative.terms}
    return table
