"""DeBERTa v1 (arXiv 2006.03654): BERT's layer with disentangled attention, and relative instead of absolute positions.

What the published code does and this keeps: scale sqrt(3 D) for c2p|p2c, no relative score on prefix columns, no v_bias on
prefix values. Where the relative tables are frozen they are projected once, when the weights are loaded; the published code
projects them in every layer of every step, as this does where the backbone trains, and in training drops elements of them first
(pos_dropout), which this does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptv2_engine.encoder import bert
from ptv2_engine.encoder.config import EncoderConfig, RelativeConfig, read_common, refuse_switch
from ptv2_engine.encoder.layer import SITES, EncoderLayer, Step, frozen, frozen_linear_of
from ptv2_engine.encoder.sources import Source, one
from ptv2_engine.encoder.stack import Encoder
from ptv2_engine.errors import ConfigError
from ptv2_engine.ops import FrozenLinear, disentangled_attention
from ptv2_engine.ops.disentangled_attention import slots_of
from ptv2_engine.packing import PackedBatch

MODEL_TYPES = ("deberta",)
PREFIXES = ("deberta.",)
HEADS = ("cls.", "lm_predictions.", "mask_predictions.", "classifier.", "qa_outputs.", "pooler.")
BUFFERS = bert.BUFFERS
POOLER: dict[str, Source] = {}
UNUSED = ("embeddings.position_embeddings.weight",)      # in some files although position_biased_input is false


class DebertaLayer(EncoderLayer):
    """Post-LN layer whose attention adds the relative scores of its own, once projected tables."""

    def __init__(self, config: EncoderConfig, index: int) -> None:
        super().__init__(config, index)
        assert config.relative is not None
        self.terms, self.projections = config.relative.terms, config.relative.projections
        self.scale = (config.head_dim * (1 + len(self.terms)))**-0.5
        H = config.hidden_size
        if self.projections == "own":
            self.qkv.absent = slice(H, 2 * H)       # v1's keys have no bias
        self.pos_key: FrozenLinear | None = None
        self.pos_query: FrozenLinear | None = None
        if self.projections != "shared":
            if "c2p" in self.terms:
                self.pos_key = frozen_linear_of(H, H, bias=self.projections == "biased")
            if "p2c" in self.terms:
                self.pos_query = frozen_linear_of(H, H)
        self.rel_k: nn.Parameter | None = None
        self.rel_q: nn.Parameter | None = None

    def tables(self, table_RH: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """rel_k and rel_q [R, N, D], the relative embeddings projected in fp32 or wider."""
        def heads(own: FrozenLinear | None, part: int) -> Tensor:
            linear = self.qkv if own is None else own
            weight: Tensor = linear.dense(self.attn_norm_weight.dtype)
            bias: Tensor | None = linear.bias
            if own is None:                         # shared with the tokens' queries (part 0) and keys (part 1)
                weight, bias = weight.chunk(3)[part], None if bias is None else bias.chunk(3)[part]
            wide = torch.promote_types(weight.dtype, torch.float32)
            rows_RH = F.linear(table_RH.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
            return rows_RH.to(weight.dtype).view(-1, self.num_heads, self.head_dim)

        return heads(self.pos_key, 1) if "c2p" in self.terms else None, heads(self.pos_query, 0) if "p2c" in self.terms else None

    def project_positions(self, table_RH: Tensor) -> None:
        """Keep the projected tables, and drop the projections."""
        self.rel_k, self.rel_q = (None if t is None else nn.Parameter(t, requires_grad=False) for t in self.tables(table_RH))
        self.pos_key = self.pos_query = None

    def attend(self, x_TH: Tensor, step: Step, prefix_k_KPND: Tensor | None, prefix_v_KPND: Tensor | None) -> Tensor:
        assert step.slots is not None
        rel_k, rel_q = (self.rel_k, self.rel_q) if step.relative_RH is None else self.tables(step.relative_RH)
        return disentangled_attention(self.project(x_TH, step), prefix_k_KPND, prefix_v_KPND, rel_k, rel_q, step.slots,
                                      step.cu_seqlens, step.max_seqlen, scale=self.scale, **step.attention(SITES * self.index))


class DebertaEncoder(Encoder):
    """Encoder with relative positions; a frozen table is kept only until the layers have projected it."""

    layer_class = DebertaLayer

    def __init__(self, config: EncoderConfig, with_pooler: bool) -> None:
        super().__init__(config, with_pooler)
        assert config.relative is not None
        H, relative = config.hidden_size, config.relative
        self.relative_table: nn.Parameter | None = frozen(2 * relative.span, H) if relative.terms else None
        self.relative_norm_weight = frozen(H) if relative.norm else None
        self.relative_norm_bias = frozen(H) if relative.norm else None

    def relative_embeddings(self) -> Tensor | None:
        """The table [R, H], normed, in fp32 or wider; None where there is none or the layers have projected it."""
        if self.relative_table is None:
            return None
        wide = torch.promote_types(self.relative_table.dtype, torch.float32)
        table_RH = self.relative_table.to(wide)
        if self.relative_norm_weight is not None and self.relative_norm_bias is not None:
            table_RH = F.layer_norm(table_RH, table_RH.shape[1:], self.relative_norm_weight.to(wide),
                                    self.relative_norm_bias.to(wide), self.config.layer_norm_eps)
        return table_RH

    def train_backbone(self, which: str | None) -> None:
        relative = self.config.relative
        if which is not None and relative is not None and relative.terms and self.relative_table is None:
            raise ConfigError("this encoder's relative tables were projected for good when it was loaded, and cannot follow "
                              f"weights that train; load it with trained_backbone={which!r}.")
        super().train_backbone(which)

    @torch.no_grad()
    def finish_loading(self) -> None:
        table_RH = self.relative_embeddings()
        if table_RH is None or self.trained_backbone is not None:
            return
        for layer in self.layers:
            assert isinstance(layer, DebertaLayer)
            layer.project_positions(table_RH)
        self.relative_table = self.relative_norm_weight = self.relative_norm_bias = None

    def prepare(self, step: Step, batch: PackedBatch, num_rows: int, token_rows_T: Tensor | None) -> Step:
        relative = self.config.relative
        assert relative is not None
        length = 1 << max(step.max_seqlen - 1, 0).bit_length()       # a few tables serve all batches
        return step._replace(slots=slots_of(length, relative.span, relative.buckets, relative.max_distance, self.device),
                             relative_RH=self.relative_embeddings())


ENCODER = DebertaEncoder


def terms_of(config: Mapping[str, Any], family: str) -> tuple[str, ...]:
    """pos_att_type as a tuple, empty without relative attention."""
    given = config.get("pos_att_type") or []
    found = tuple(x.strip() for x in (given.lower().split("|") if isinstance(given, str) else given))
    if set(found) - {"c2p", "p2c"}:
        refuse_switch(family, "pos_att_type", given, "c2p and p2c")
    if found and not config.get("relative_attention", False):
        refuse_switch(family, "relative_attention", False, f"the relative attention that pos_att_type {given!r} asks for")
    return found


def read_deberta(config: Mapping[str, Any], family: str, relative: RelativeConfig) -> EncoderConfig:
    """What v1, v2 and v3 share of config.json."""
    for name, wanted, what in (("talking_head", (False,), "attention without talking heads"),
                               ("embedding_size", (None, config.get("hidden_size")), "embeddings of the hidden size"),
                               ("attention_head_size", (None, config.get("hidden_size", 0) // max(
                                   config.get("num_attention_heads") or 1, 1)), "heads that split the hidden size")):
        if config.get(name, wanted[0]) not in wanted:
            refuse_switch(family, name, config[name], what)
    plain = {name: value for name, value in config.items() if name != "embedding_size"}
    return read_common(plain | {"layer_norm_eps": config.get("layer_norm_eps", 1e-7)}, family, position_offset=0,
                       counts_pads=True, no_types=True, pooler_activation=config.get("pooler_hidden_act", "gelu"),
                       pooler_dropout=config.get("pooler_dropout", 0.0),
                       absolute_positions=config.get("position_biased_input", True), relative=relative)


def span_of(config: Mapping[str, Any]) -> int:
    """max_relative_positions, or where it is below 1 the number of positions."""
    given = config.get("max_relative_positions", -1)
    return given if given >= 1 else config.get("max_position_embeddings", 512)


def read_config(config: Mapping[str, Any]) -> EncoderConfig:
    terms = terms_of(config, "deberta")
    relative = RelativeConfig(terms=terms, span=span_of(config), buckets=0, max_distance=0, projections="own", norm=False)
    return read_deberta(config, "deberta", relative)


def common_names(config: EncoderConfig) -> dict[str, Source]:
    """Everything but the attention's projections: BERT's names, without the tables that this model lacks."""
    table = bert.embedding_names()
    if not config.absolute_positions:
        del table["embeddings.position"]
    if not config.type_vocab_size:
        del table["embeddings.token_type"]
    assert config.relative is not None
    if config.relative.terms:
        table["relative_table"] = one("encoder.rel_embeddings.weight")
    for i in range(config.num_layers):
        table |= bert.block_names(i, f"encoder.layer.{i}")
    return table


def names(config: EncoderConfig) -> dict[str, Source]:
    N, D = config.num_heads, config.head_dim

    def weight(tensors: list[Tensor]) -> Tensor:
        """in_proj holds q, k, v of each head in turn, [N, 3, D, H]; ours is [3, N, D, H]."""
        return tensors[0].view(N, 3, D, -1).transpose(0, 1).reshape(3 * N * D, -1)

    def bias(tensors: list[Tensor]) -> Tensor:
        return torch.cat((tensors[0], torch.zeros_like(tensors[0]), tensors[1]))

    assert config.relative is not None
    table = common_names(config)
    for i in range(config.num_layers):
        theirs = f"encoder.layer.{i}.attention.self"
        table[f"layers.{i}.qkv.weight"] = Source((f"{theirs}.in_proj.weight",), weight)
        table[f"layers.{i}.qkv.bias"] = Source((f"{theirs}.q_bias", f"{theirs}.v_bias"), bias)
        if "c2p" in config.relative.terms:
            table[f"layers.{i}.pos_key.weight"] = one(f"{theirs}.pos_proj.weight")
        if "p2c" in config.relative.terms:
            table |= {f"layers.{i}.pos_query.{w}": one(f"{theirs}.pos_q_proj.{w}") for w in ("weight", "bias")}
    return table
