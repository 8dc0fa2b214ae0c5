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
        if length <= limit:
            return
        shifted = f"prompt_length {prompt_length} + " if shift_positions and prompt_length else ""
        total = length + (prompt_length if shift_positions else 0)
        raise SequenceTooLong(
            f"{shifted}sequence {length} = {total} positions, but this {self.family} model has {self.max_length(0)}. Truncate to "
            f"{max(limit, 0)} tokens (--max_seq_length {max(limit, 0)})"
            + (", use a shorter prompt, or set shift_positions=False." if shifted else "."))


def read_common(config: Mapping[str, Any], family: str, *, position_offset: int, counts_pads: bool,
                **switches: Any) -> EncoderConfig:
    """The part of config.json that all BERT-like families spell the same way.

    Raises ConfigError for switches that would change the computation and that this stack does not have.
    """
    def refuse(name: str, value: Any, supported: str) -> None:
        raise ConfigError(f"{family} checkpoint has {name} = {value!r}, but this stack computes {supported}; "
                          "use a checkpoint of that kind.")

    act = config.get("hidden_act", "gelu")
    if act not in _ACTIVATIONS:
        refuse("hidden_act", act, f"one of {', '.join(sorted(_ACTIVATIONS))}")
    if config.get("position_embedding_type", "absolute") not in (None, "absolute"):
        refuse("position_embedding_type", config["position_embedding_type"], "absolute position embeddings")
    for name in ("is_decoder", "add_cross_attention", "is_encoder_decoder"):
        if config.get(name):
            refuse(name, config[name], "bidirectional encoders")
    for name in _SIZES:
        if not isinstance(config.get(name), int) or config[name] < 1:
            refuse(name, config.get(name), "sizes of 1 or more")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if hidden % heads:
        refuse("num_attention_heads", heads, f"head counts that divide hidden_size {hidden}")
    return EncoderConfig(
        family=family, vocab_size=config["vocab_size"], hidden_size=hidden, num_layers=config["num_hidden_layers"],
        num_heads=heads, ffn_size=config["intermediate_size"], max_positions=config["max_position_embeddings"],
        type_vocab_size=config["type_vocab_size"], embedding_size=config.get("embedding_size") or hidden,
        layer_norm_eps=config.get("layer_norm_eps", 1e-12), activation=_ACTIVATIONS[act],
        hidden_dropout=config.get("hidden_dropout_prob", 0.1), attention_dropout=config.get("attention_probs_dropout_prob", 0.1),
        pad_token_id=config.get("pad_token_id") or 0, position_offset=position_offset, counts_pads=counts_pads,
        initializer_range=config.get("initializer_range", 0.02), **switches)
