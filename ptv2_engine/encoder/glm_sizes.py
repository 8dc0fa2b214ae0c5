"""The published GLM models (https://arxiv.org/abs/2103.10360) as config dictionaries, and how many parameters a config means.

Field names are those of GLMConfig in configuration_glm.py, which lies beside the transformers checkpoints. Sizes come from
config_tasks/model_blocklm_*.sh of https://github.com/THUDM/GLM; vocabularies are padded to a multiple of 128. Megatron
checkpoints of the same models may hold fewer positions (the 2B model was trained at 512), so read those from the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WORDPIECE, BPE, CHINESE = 30592, 50304, 50048       # rows of the word table: BERT uncased, GPT-2, Chinese SentencePiece


def glm_config(num_layers: int, hidden_size: int, num_attention_heads: int, vocab_size: int, max_sequence_length: int,
               **more: Any) -> dict[str, Any]:
    """A config dictionary with the values that all published models share, changed by `more`.

    max_sequence_length + 1 rows are in each of the two position tables, or max_sequence_length rows in the only one
    where block_position_encoding is False. layernorm_epsilon is a constant of modeling_glm.py and no field of its config.
    """
    return {
        "model_type": "glm",
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "vocab_size": vocab_size,
        "max_sequence_length": max_sequence_length,
        "embedding_dropout_prob": 0.1,
        "attention_dropout_prob": 0.1,
        "output_dropout_prob": 0.1,
        "layernorm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "attention_scale": 1.0,
        "block_position_encoding": True,
        "relative_encoding": False,
        "output_predict": True,
        "parallel_output": True,
        "pool_token": "cls",
        "spell_length": None,
        "spell_func": "lstm",
        "checkpoint_activations": False,
        "checkpoint_num_layers": 1,
    } | more


SIZES: dict[str, dict[str, Any]] = {
    "glm-base": glm_config(12, 768, 12, WORDPIECE, 512),
    "glm-large": glm_config(24, 1024, 16, WORDPIECE, 512),
    "glm-large-chinese": glm_config(24, 1024, 16, CHINESE, 1024),
    "glm-roberta-large": glm_config(24, 1024, 16, BPE, 512),
    "glm-410m": glm_config(30, 1024, 16, WORDPIECE, 512),
    "glm-515m": glm_config(30, 1152, 18, WORDPIECE, 512),
    "glm-2b": glm_config(36, 2048, 32, BPE, 1024),
    "glm-10b": glm_config(48, 4096, 64, BPE, 1024),
    "glm-10b-chinese": glm_config(48, 4096, 64, CHINESE, 1024),
}


def num_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of the backbone: tables, layers (FFN of 4 H, all biases) and the final LayerNorm; the head is tied."""
    hidden, length = config["hidden_size"], config["max_sequence_length"]
    positions = 2 * (length + 1) if config.get("block_position_encoding", True) else length
    layer = 12 * hidden * hidden + 13 * hidden      # qkv 3, out 1, FFN 4 + 4; biases 3 + 1 + 4 + 1, two LayerNorms 4
    return (config["vocab_size"] + positions) * hidden + config["num_layers"] * layer + 2 * hidden
