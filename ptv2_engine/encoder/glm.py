"""GLM (arXiv 2103.10360), 110M to 10B: pre-LN, two learned position tables, and a mask that is causal from a point on.

Part A, the context, is bidirectional; part B, the answer, starts at `causal_from` and sees part A and itself up to each token.
A token has a position and a block position; all of part B takes the position of the [MASK] it fills. The prefix is keys
and values that both parts see, and it shifts no position. Without causal_from everything is part A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptv2_engine.encoder.config import EncoderConfig, refuse_switch
from ptv2_engine.encoder.embeddings import Embeddings
from ptv2_engine.encoder.layer import Step, frozen
from ptv2_engine.encoder.prenorm import PreNormEncoder
from ptv2_engine.encoder.sources import Source, one
from ptv2_engine.errors import ConfigError, InputError
from ptv2_engine.ops import key_ranges, readable
from ptv2_engine.packing import PackedBatch

MODEL_TYPES = ("glm",)
PREFIXES = ("glm.", "model.", "module.")
ANCHOR = "word_embeddings."
HEADS = ("pool_layer.", "multichoice_head.", "out_proj.", "classifier.", "prompt_spell.", "mlm_weight")
BUFFERS = ()
POOLER: dict[str, Source] = {}


class GlmEmbeddings(Embeddings):
    """word + position + block position. No norm; the dropout is that of the first layer's add_norm."""

    late_dropout = True

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.block = frozen(config.max_positions, config.hidden_size)
        del self.norm_weight, self.norm_bias

    def forward(self, batch: PackedBatch, shift_T: Tensor | int, dropout_p: float, seed: Tensor | None, site: int) -> Tensor:
        assert self.position is not None
        rows_T = batch.position_ids_T + shift_T
        self.check_rows("position id", rows_T)
        self.check_rows("block position id", batch.block_ids_T)
        positions_TH = F.embedding(rows_T, self.position)
        blocks_TH = self.block[0] if batch.block_ids_T is None else F.embedding(batch.block_ids_T, self.block)
        return F.embedding(batch.input_ids_T, self.word) + positions_TH + blocks_TH

    def prompt_rows(self, prompt_KPE: Tensor) -> Tensor:
        assert self.position is not None
        return prompt_KPE + self.position[:prompt_KPE.shape[1]] + self.block[0]

    def check_rows(self, name: str, rows_T: Tensor | None) -> None:
        """Raises InputError for rows outside the tables. Reads them: for CPU tensors; a GPU's are taken on trust."""
        if rows_T is None or not readable(rows_T) or not rows_T.numel():
            return
        low, high = int(rows_T.min()), int(rows_T.max())
        if low < 0 or high >= self.config.max_positions:
            raise InputError(f"{name} {low if low < 0 else high} is outside the table of {self.config.max_positions} rows; "
                             "truncate the sequence, or build position_ids with cloze_features.")


class GlmEncoder(PreNormEncoder):
    embeddings_class = GlmEmbeddings

    def prepare(self, step: Step, batch: PackedBatch, num_rows: int, token_rows_T: Tensor | None) -> Step:
        if batch.causal_from is None:
            return step
        added_B = step.cu_seqlens.diff().long() - batch.lengths()            # prompt rows stand in front of part A
        first_key_T = batch.first_key_T
        if first_key_T is not None and token_rows_T is not None:
            moved = first_key_T + added_B[batch.sequence_of_token()]
            first_key_T = torch.zeros(num_rows, dtype=moved.dtype, device=moved.device).index_copy(0, token_rows_T, moved)
        return step._replace(ranges=key_ranges(step.cu_seqlens, num_rows, causal_from=batch.causal_from + added_B,
                                               first_key_T=first_key_T))


ENCODER = GlmEncoder


def read_config(config: Mapping[str, Any]) -> EncoderConfig:
    if "num_layers" not in config:
        raise ConfigError("this config.json has model_type 'glm' without num_layers: it is a GLM-4 decoder of transformers, not "
                          "GLM (2103.10360); use a checkpoint such as THUDM/glm-large-english or glm-10b.")
    for name, fine, what in (("relative_encoding", (False, None), "two learned position tables"),
                             ("block_position_encoding", (True, None), "block positions")):
        if config.get(name) not in fine:
            refuse_switch("glm", name, config[name], what)
    H, N = config["hidden_size"], config["num_attention_heads"]
    if H % N:
        refuse_switch("glm", "num_attention_heads", N, f"head counts that divide hidden_size {H}")
    return EncoderConfig(
        family="glm", vocab_size=config["vocab_size"], hidden_size=H, num_layers=config["num_layers"], num_heads=N,
        ffn_size=4 * H, max_positions=config.get("max_sequence_length", 1024) + 1, type_vocab_size=0, embedding_size=H,
        layer_norm_eps=config.get("layernorm_epsilon", 1e-5), activation="tanh",
        hidden_dropout=config.get("output_dropout_prob", 0.1),
        attention_dropout=config.get("attention_dropout_prob", 0.1), pad_token_id=config.get("pad_token_id") or 0,
        position_offset=0, counts_pads=True, initializer_range=config.get("initializer_range", 0.02),
        shifts_positions=False)


def names(config: EncoderConfig) -> dict[str, Source]:
    table = {"embeddings.word": one("word_embeddings.weight"),
             "embeddings.position": one("transformer.position_embeddings.weight"),
             "embeddings.block": one("transformer.block_position_embeddings.weight")}
    for w in ("weight", "bias"):
        table[f"final_norm_{w}"] = one(f"transformer.final_layernorm.{w}")
    for i in range(config.num_layers):
        theirs = f"transformer.layers.{i}"
        for w in ("weight", "bias"):
            table |= {
                f"layers.{i}.attn_norm_{w}": one(f"{theirs}.input_layernorm.{w}"),
                f"layers.{i}.qkv.{w}": one(f"{theirs}.attention.query_key_value.{w}"),
                f"layers.{i}.attn_out.{w}": one(f"{theirs}.attention.dense.{w}"),
                f"layers.{i}.ffn_norm_{w}": one(f"{theirs}.post_attention_layernorm.{w}"),
                f"layers.{i}.ffn_up.{w}": one(f"{theirs}.mlp.dense_h_to_4h.{w}"),
                f"layers.{i}.ffn_down.{w}": one(f"{theirs}.mlp.dense_4h_to_h.{w}"),
            }
    return table
