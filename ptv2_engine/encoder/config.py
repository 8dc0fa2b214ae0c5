"""EncoderConfig: the sizes of a backbone and the few switches families differ in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ptv2_engine.errors import ConfigError, SequenceTooLong

_ACTIVATIONS = {"gelu": "none", "gelu_python": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
          "type_vocab_size")


@dataclass(frozen=True)
class RelativeConfig:
    """DeBERTa's relative positions: which scores there are, and how a distance becomes a table row (see slots_of)."""

    terms: tuple[str, ...]             # of "c2p", "p2c"
    span: int                          # the tables have 2 * span rows
    buckets: int                       # 0: no log buckets
    max_distance: int
    projections: str                   # "own" (v1), "biased" (v2, not shared), "shared" with q and k (v2, v3)
    norm: bool                         # LayerNorm over the table
    conv_kernel: int = 0               # v2: a convolution beside layer 0; 0: none
    conv_activation: str = "tanh"


@dataclass(frozen=True)
class RotaryConfig:
    """ModernBERT's rotary positions and sliding windows, a layer each."""

    thetas: tuple[float, ...]
    windows: tuple[int | None, ...]    # tokens see |i - j| <= window; None: all
    attention_bias: bool = False
    ffn_bias: bool = False
    norm_bias: bool = False


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes and switches, read from a checkpoint's config.json by its family."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    max_positions: int
    type_vocab_size: int
    embedding_size: int
    layer_norm_eps: float
    activation: str                    # "none" (erf) or "tanh": what linear_gelu calls approximate
    hidden_dropout: float
    attention_dropout: float
    pad_token_id: int
    position_offset: int               # row of the position table that the first token takes
    counts_pads: bool                  # positions are columns (BERT), or count the tokens that are not padding (RoBERTa)
    initializer_range: float
    pooler_activation: str = "tanh"
    pooler_dropout: float | None = None            # in front of a trained pooler; None: the head's own
    absolute_positions: bool = True                # False: any length; max_positions is what the model was trained on
    shifts_positions: bool = True                  # a deep prompt shifts the tokens' positions, as published for BERT
    relative: RelativeConfig | None = None         # DeBERTa
    rotary: RotaryConfig | None = None             # ModernBERT

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def uncounted_id(self) -> int | None:
        """What packing needs to number the positions."""
        return None if self.counts_pads else self.pad_token_id

    def max_length(self, prompt_length: int = 0, shift_positions: bool = True) -> int:
        """The longest sequence that fits the position table beside a prompt."""
        return self.max_positions - self.position_offset - (prompt_length if shift_positions else 0)

    def check_length(self, length: int, prompt_length: int, shift_positions: bool) -> None:
        """Raises SequenceTooLong when prompt and sequence do not fit the position table together."""
        limit = self.max_length(prompt_length, shift_positions)
        if length <= limit or not self.absolute_positions:
            return
        shifted = f"prompt_length {prompt_length} + " if shift_positions and prompt_length else ""
        total = length + (prompt_length if shift_positions else 0)
        raise SequenceTooLong(
            f"{shifted}sequence {length} = {total} positions, but this {self.family} model has {self.max_length(0)}. Truncate to "
            f"{max(limit, 0)} tokens (--max_seq_length {max(limit, 0)})"
            + (", use a shorter prompt, or set shift_positions=False." if shifted else "."))


def refuse_switch(family: str, name: str, value: Any, supported: str) -> None:
    """Raise ConfigError for a switch of config.json that would change the computation and that this stack does not have."""
    raise ConfigError(f"{family} checkpoint has {name} = {value!r}, but this stack computes {supported}; "
                      "use a checkpoint of that kind.")


def activation_of(config: Mapping[str, Any], family: str, key: str = "hidden_act", default: str = "gelu") -> str:
    """What linear_gelu calls approximate. Raises ConfigError for activations that are no GELU."""
    act = config.get(key, default)
    if act not in _ACTIVATIONS:
        refuse_switch(family, key, act, f"one of {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[act]


def read_common(config: Mapping[str, Any], family: str, *, position_offset: int, counts_pads: bool, no_types: bool = False,
                **switches: Any) -> EncoderConfig:
    """The part of config.json that all BERT-like families spell the same way.

    Raises ConfigError for switches that would change the computation and that this stack does not have.
    """
    def refuse(name: str, value: Any, supported: str) -> None:
        refuse_switch(family, name, value, supported)

    activation = activation_of(config, family)
    if config.get("position_embedding_type", "absolute") not in (None, "absolute"):
        refuse("position_embedding_type", config["position_embedding_type"], "absolute position embeddings")
    for name in ("is_decoder", "add_cross_attention", "is_encoder_decoder"):
        if config.get(name):
            refuse(name, config[name], "bidirectional encoders")
    for name in _SIZES:
        least = 0 if name == "type_vocab_size" and no_types else 1
        if not isinstance(config.get(name), int) or config[name] < least:
            refuse(name, config.get(name), f"sizes of {least} or more")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if hidden % heads:
        refuse("num_attention_heads", heads, f"head counts that divide hidden_size {hidden}")
    return EncoderConfig(
        family=family, vocab_size=config["vocab_size"], hidden_size=hidden, num_layers=config["num_hidden_layers"],
        num_heads=heads, ffn_size=config["intermediate_size"], max_positions=config["max_position_embeddings"],
        type_vocab_size=config["type_vocab_size"], embedding_size=config.get("embedding_size") or hidden,
        layer_norm_eps=config.get("layer_norm_eps", 1e-12), activation=activation,
        hidden_dropout=config.get("hidden_dropout_prob", 0.1), attention_dropout=config.get("attention_probs_dropout_prob", 0.1),
        pad_token_id=config.get("pad_token_id") or 0, position_offset=position_offset, counts_pads=counts_pads,
        initializer_range=config.get("initializer_range", 0.02), **switches)
