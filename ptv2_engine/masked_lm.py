"""The frozen masked-language-model head of a BERT, RoBERTa or DeBERTa checkpoint: what fills a blank with a word.

logits = LayerNorm(gelu(W h + b)) E^T + bias, with E the word embeddings. Only the rows of the blanks come here, and only the
verbalizers' rows of E where they are named.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptv2_engine.encoder import Encoder
from ptv2_engine.encoder.checkpoints import Checkpoint, open_checkpoint
from ptv2_engine.encoder.config import EncoderConfig, activation_of
from ptv2_engine.errors import ConfigError, InputError, WeightError

CLOZE_FAMILIES = ("glm",)            # whose language-model head is its tied word embeddings; others load one


class _Names(NamedTuple):
    """How a checkpoint spells the head's tensors."""

    dense: str
    norm: str
    bias: tuple[str, ...]          # the first that is there: tied tensors are written once, under either name
    decoder: str                   # E where it is not tied


_BERT = _Names("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm",
               ("cls.predictions.decoder.bias", "cls.predictions.bias"), "cls.predictions.decoder.weight")
_ROBERTA = _Names("lm_head.dense", "lm_head.layer_norm", ("lm_head.decoder.bias", "lm_head.bias"), "lm_head.decoder.weight")
_DEBERTA = _Names("lm_predictions.lm_head.dense", "lm_predictions.lm_head.LayerNorm", ("lm_predictions.lm_head.bias",),
                  "lm_predictions.lm_head.decoder.weight")
# DeBERTa's published files have the second kind, files that transformers wrote may have the first
HEADS: dict[str, tuple[_Names, ...]] = {
    "bert": (_BERT,), "roberta": (_ROBERTA,), "xlm-roberta": (_ROBERTA,), "camembert": (_ROBERTA,),
    "deberta": (_DEBERTA, _BERT), "deberta-v2": (_DEBERTA, _BERT)}


class MaskedLMHead(nn.Module):
    """No parameter of it is trained; the gradient reaches the hidden states.

    dense_EH: [E, H]. bias_V: [V]. decoder_VE: [V, E] where the checkpoint does not tie it to the word embeddings.
    approximate: "none" or "tanh", GELU's. They keep their dtype; the computation is in fp32.
    """

    def __init__(self, dense_EH: Tensor, dense_bias_E: Tensor, norm_weight_E: Tensor, norm_bias_E: Tensor, bias_V: Tensor,
                 decoder_VE: Tensor | None = None, *, eps: float = 1e-12, approximate: str = "none") -> None:
        super().__init__()
        self.dense, self.dense_bias = _frozen(dense_EH), _frozen(dense_bias_E)
        self.norm_weight, self.norm_bias, self.bias = _frozen(norm_weight_E), _frozen(norm_bias_E), _frozen(bias_V)
        self.decoder = None if decoder_VE is None else _frozen(decoder_VE)
        self.eps, self.approximate = eps, approximate

    def forward(self, h_BH: Tensor, word_VE: Tensor, ids: Tensor | None = None) -> Tensor:
        """fp32 logits [B, C] of the tokens `ids` [C], or [B, V] of all.

        h_BH: [B, H], the encoder's output at the blanks. word_VE: [V, E], its word embeddings. Raises InputError.
        """
        words = word_VE if self.decoder is None else self.decoder
        if words.shape != (self.bias.shape[0], self.dense.shape[0]):
            raise InputError(f"word_VE is {tuple(words.shape)}, but this head has {self.bias.shape[0]} words of size "
                             f"{self.dense.shape[0]}; pass the word embeddings of the same checkpoint.")
        x_BE = F.gelu(F.linear(h_BH.float(), self.dense.float(), self.dense_bias.float()), approximate=self.approximate)
        x_BE = F.layer_norm(x_BE, x_BE.shape[-1:], self.norm_weight.float(), self.norm_bias.float(), self.eps)
        if ids is None:
            return F.linear(x_BE, words.float(), self.bias.float())
        return F.linear(x_BE, words[ids].float(), self.bias[ids].float())


def masked_lm_for(encoder: Encoder, source: str | Path | nn.Module) -> MaskedLMHead | None:
    """What a cloze task on this encoder needs of its checkpoint beside it; None where the word embeddings are the head."""
    if encoder.config.family in CLOZE_FAMILIES:
        return None
    return load_masked_lm_head(source, dtype=encoder.dtype, device=encoder.device)


def empty_masked_lm(config: EncoderConfig, dtype: torch.dtype, device: torch.device) -> MaskedLMHead:
    """A head of an encoder's sizes, tied, without values: for planning memory."""
    E, H = config.embedding_size, config.hidden_size
    shapes: tuple[tuple[int, ...], ...] = ((E, H), (E,), (E,), (E,), (config.vocab_size,))
    return MaskedLMHead(*(torch.empty(shape, dtype=dtype, device=device) for shape in shapes))


def load_masked_lm_head(source: str | Path | nn.Module, *, dtype: torch.dtype | None = None,
                        device: str | torch.device = "cpu") -> MaskedLMHead:
    """The head of a hub id, a local folder, or a transformers model in memory.

    dtype: default the checkpoint's. Raises ConfigError where the family or the checkpoint has no such head (a plain encoder, an
    ELECTRA-style discriminator), WeightError for tensors that are missing or of another shape, CheckpointError.
    """
    checkpoint = open_checkpoint(source)
    family = checkpoint.config.get("model_type")
    if family not in HEADS:
        raise ConfigError(f"a {family} checkpoint brings no masked-language-model head that this stack loads (there are "
                          f"{', '.join(sorted(HEADS))}); use a GLM backbone, or a classifier head.")
    there = set(checkpoint.names())
    if any(name.startswith("mask_predictions.") for name in there):
        raise ConfigError(f"{checkpoint.location} learned to tell replaced tokens apart (DeBERTa v3), not to fill blanks; use "
                          "DeBERTa v1 or v2, or a classifier head.")
    names = next((n for n in HEADS[family] if f"{n.dense}.weight" in there), None)
    if names is None:
        raise ConfigError(f"{checkpoint.location} has no masked-language-model head (no {HEADS[family][0].dense}.weight); pass a "
                          "checkpoint that was saved with one, or use a classifier head.")
    return _read(checkpoint, names, there, dtype, torch.device(device))


def _read(checkpoint: Checkpoint, names: _Names, there: set[str], dtype: torch.dtype | None,
          device: torch.device) -> MaskedLMHead:
    config, family = checkpoint.config, str(checkpoint.config["model_type"])
    H, V = config["hidden_size"], config["vocab_size"]
    E = config.get("embedding_size") or H          # what the transformation comes out at

    def tensor(choices: Iterable[str], *shape: int) -> Tensor:
        choices = list(choices)
        name = next((n for n in choices if n in there), None)
        if name is None:
            raise WeightError(f"{checkpoint.location} lacks the weight {choices[0]}; pass a complete checkpoint of this family.")
        found = checkpoint.get(name).detach()
        if found.shape != shape:
            raise WeightError(f"{checkpoint.location}: weight {name} is {tuple(found.shape)}, but config.json implies {shape}; "
                              "the two files do not belong together.")
        return found.to(device=device, dtype=dtype)

    tied = config.get("tie_word_embeddings", True)
    return MaskedLMHead(
        tensor([f"{names.dense}.weight"], E, H), tensor([f"{names.dense}.bias"], E),
        tensor([f"{names.norm}.weight", f"{names.norm}.gamma"], E), tensor([f"{names.norm}.bias", f"{names.norm}.beta"], E),
        tensor(names.bias, V), None if tied else tensor([names.decoder], V, E), eps=config.get("layer_norm_eps", 1e-12),
        approximate="none" if names is _ROBERTA else activation_of(config, family))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
