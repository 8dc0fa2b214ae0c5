"""ModernBERT (arXiv 2412.13663): pre-LN, rotary positions, GEGLU, and sliding windows in two of three layers.

A prefix has no position: its keys are learned as they are, every token sees them, in sliding layers too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ptv2_engine.encoder.config import EncoderConfig, RotaryConfig, activation_of, refuse_switch
from ptv2_engine.encoder.layer import SITES, Normed, Ranges, Step, frozen_linear_of
from ptv2_engine.encoder.prenorm import PreNormEncoder, PreNormLayer, Residual
from ptv2_engine.encoder.recompute import recomputed
from ptv2_engine.encoder.sources import ZEROS, Source, one
from ptv2_engine.ops import cos_sin_table, key_ranges, linear_geglu, prefix_attention_qkv, rotary
from ptv2_engine.packing import PackedBatch

MODEL_TYPES = ("modernbert",)
PREFIXES = ("model.",)
HEADS = ("head.", "decoder.", "classifier.", "rotary_emb.")
BUFFERS = ()
POOLER: dict[str, Source] = {}


class ModernBertLayer(PreNormLayer):
    def __init__(self, config: EncoderConfig, index: int) -> None:
        super().__init__(config, index)
        assert config.rotary is not None
        H, F, has = config.hidden_size, config.ffn_size, config.rotary
        self.theta, self.window = has.thetas[index], has.windows[index]
        self.qkv = frozen_linear_of(3 * H, H, bias=has.attention_bias)
        self.attn_out = frozen_linear_of(H, H, bias=has.attention_bias)
        self.ffn_up, self.ffn_down = frozen_linear_of(2 * F, H, bias=has.ffn_bias), frozen_linear_of(H, F, bias=has.ffn_bias)
        if index == 0:
            del self.attn_norm_weight, self.attn_norm_bias      # the embeddings' own norm stands for it

    def enter(self, state: Residual, step: Step) -> tuple[Normed, Tensor]:
        return (Normed(state.branch_TH), state.branch_TH) if self.index == 0 else super().enter(state, step)

    def ffn(self, y: Normed, step: Step) -> Tensor:
        if step.memory != "lean":
            return self.ffn_down(linear_geglu(y.x_TH, self.ffn_up))
        return self.ffn_down(recomputed(lambda x_TH: linear_geglu(x_TH, self.ffn_up), y.x_TH, source=y.source))

    def project(self, x_TH: Tensor, step: Step) -> Tensor:
        assert step.rotary is not None and step.positions_T is not None
        qkv_T3ND = rotary(self.qkv(x_TH), self.num_heads, step.rotary[self.theta], step.positions_T)
        if step.record is not None:
            step.record.append(qkv_T3ND)
        return qkv_T3ND

    def attend(self, x_TH: Tensor, step: Step, prefix_k_KPND: Tensor | None, prefix_v_KPND: Tensor | None) -> Tensor:
        assert step.windows is not None
        context_B, key_range_T2 = step.windows.get(self.window, (None, None))
        return prefix_attention_qkv(self.project(x_TH, step), prefix_k_KPND, prefix_v_KPND, step.cu_seqlens, step.max_seqlen,
                                    context_B=context_B, key_range_T2=key_range_T2, **step.attention(SITES * self.index))


class ModernBertEncoder(PreNormEncoder):
    layer_class = ModernBertLayer

    def lacks(self, name: str) -> bool:
        return name.endswith("norm_bias") and self.config.rotary is not None and not self.config.rotary.norm_bias

    def prepare(self, step: Step, batch: PackedBatch, num_rows: int, token_rows_T: Tensor | None) -> Step:
        has = self.config.rotary
        assert has is not None
        rows = torch.arange(num_rows, device=self.device)
        owner = torch.searchsorted(step.cu_seqlens[1:].long(), rows, right=True)
        first_row_T = step.cu_seqlens.long()[owner]
        # Counted from each sequence's first token: beside a prefix, whose keys are not turned, padding on the left would show
        positions_T = rows - first_row_T if token_rows_T is not None else (
            batch.position_ids_T - batch.position_ids_T[first_row_T])
        longest = max(batch.num_positions, step.max_seqlen)
        length = 1 << max(longest - 1, 0).bit_length()               # a few tables serve all batches
        # A window that holds the longest sequence is no window: the kernels then skip the mask.
        windows: dict[int | None, Ranges] = {w: key_ranges(step.cu_seqlens, num_rows, window=w) for w in set(has.windows)
                   if w is not None and w < step.max_seqlen - 1}
        return step._replace(positions_T=positions_T, windows=windows, rotary={
            theta: cos_sin_table(length, self.config.head_dim, theta, self.device) for theta in set(has.thetas)})


ENCODER = ModernBertEncoder


def read_config(config: Mapping[str, Any]) -> EncoderConfig:
    def refuse(name: str, value: Any, supported: str) -> None:
        refuse_switch("modernbert", name, value, supported)

    for name in ("mlp_dropout", "attention_dropout", "embedding_dropout"):
        if config.get(name):
            refuse(name, config[name], "checkpoints trained without dropout, as the published ones")
    if activation_of(config, "modernbert", "hidden_activation") != "none":
        refuse("hidden_activation", config["hidden_activation"], "gelu with erf")
    L, H, N = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]
    if H % N or (H // N) % 2:
        refuse("num_attention_heads", N, f"heads of an even size that divide hidden_size {H}")
    every = config.get("global_attn_every_n_layers", 3)
    kinds = config.get("layer_types") or ["sliding_attention" if i % every else "full_attention" for i in range(L)]
    thetas = {kind: _theta(config, kind, old, default) for kind, old, default in (
        ("full_attention", "global_rope_theta", 160000.0), ("sliding_attention", "local_rope_theta", 10000.0))}
    window = config.get("local_attention", 128) // 2
    return EncoderConfig(
        family="modernbert", vocab_size=config["vocab_size"], hidden_size=H, num_layers=L, num_heads=N,
        ffn_size=config["intermediate_size"], max_positions=config.get("max_position_embeddings", 8192), type_vocab_size=0,
        embedding_size=H, layer_norm_eps=config.get("norm_eps", 1e-5), activation="none", hidden_dropout=0.0,
        attention_dropout=0.0, pad_token_id=config.get("pad_token_id") or 0, position_offset=0, counts_pads=True,
        initializer_range=config.get("initializer_range", 0.02), pooler_activation="gelu", absolute_positions=False,
        shifts_positions=False, rotary=RotaryConfig(
            thetas=tuple(thetas[kind] for kind in kinds),
            windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
            attention_bias=bool(config.get("attention_bias")), ffn_bias=bool(config.get("mlp_bias")),
            norm_bias=bool(config.get("norm_bias"))))


def _theta(config: Mapping[str, Any], kind: str, old_name: str, default: float) -> float:
    """The rotary base of a kind of layer, in today's spelling of config.json or in the first one."""
    parameters = (config.get("rope_parameters") or {}).get(kind) or {}
    if parameters.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        refuse_switch("modernbert", "rope_type", parameters.get("rope_type", config.get("rope_scaling")),
                      "unscaled rotary positions")
    return float(parameters.get("rope_theta", config.get(old_name) or default))


def names(config: EncoderConfig) -> dict[str, Source]:
    has = config.rotary
    assert has is not None

    def norm(ours: str, theirs: str) -> dict[str, Source]:
        return {f"{ours}_weight": one(f"{theirs}.weight"), f"{ours}_bias": one(f"{theirs}.bias") if has.norm_bias else ZEROS}

    table = {"embeddings.word": one("embeddings.tok_embeddings.weight")}
    table |= norm("embeddings.norm", "embeddings.norm") | norm("final_norm", "final_norm")
    for i in range(config.num_layers):
        theirs = f"layers.{i}"
        if i > 0:
            table |= norm(f"layers.{i}.attn_norm", f"{theirs}.attn_norm")
        table |= norm(f"layers.{i}.ffn_norm", f"{theirs}.mlp_norm")
        for ours, name, bias in (("qkv", "attn.Wqkv", has.attention_bias), ("attn_out", "attn.Wo", has.attention_bias),
                                 ("ffn_up", "mlp.Wi", has.ffn_bias), ("ffn_down", "mlp.Wo", has.ffn_bias)):
            table |= {f"layers.{i}.{ours}.{w}": one(f"{theirs}.{name}.{w}") for w in ("weight", "bias")[:1 + bias]}
    return table
