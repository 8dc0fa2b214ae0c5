"""The prompt: its configuration, its trainable bank, and the prefix it becomes once a step.

P-Tuning v2 (arXiv 2110.07602) gives every prompted layer P keys and values; prompt tuning (2104.08691) and P-tuning
(2103.10385) insert P embeddings at the input only. A bank holds K prompts of up to P rows; a batch says which sequence
uses which. The layout of a row is the published one: [K_0 | V_0 | K_1 | V_1 | ...] over the prompted layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptv2_engine.encoder import Encoder, EncoderConfig, Prefix
from ptv2_engine.errors import ConfigError

METHODS = ("deep", "shallow", "none")
REPARAMETERIZATIONS = (None, "mlp", "lstm")


@dataclass
class PromptConfig:
    """What is trained beside the head.

    prompt_length: P, rows of each prompt.
    prompt_layers: which layers have one: "all", an int k (the top k), a range or list of layer indices from 0, or a string
        such as "17-24" that counts layers from 1 as the paper does.
    reparameterization: None, "mlp" (Linear, tanh, Linear, as P-Tuning v2) or "lstm" (two-layer BiLSTM and MLP, as P-tuning
        v1) between a small embedding and the prompt; reparameterization_hidden is its width.
    prompt_dropout: on the prefix's elements in training, drawn for each sequence, as published. Rows of a shallow prompt get the
        backbone's hidden dropout like any input embedding instead.
    init: "normal" (std init_std), "zero", "tokens" (keys and values, or input embeddings, of init_tokens, or of random entries of
        the whole vocabulary, as PEFT draws them), or the path of a saved adapter. methods.prompt_init makes init_tokens of a text
        or of ordinary words, which needs a tokenizer.
    method: "deep" (P-Tuning v2), "shallow" (prompt tuning; with a reparameterization, P-tuning v1), "none" (head only).
        Pooling stays on the first token ([CLS]), also behind a shallow prompt.
    num_prompts: K; prompt_lengths: rows in use of each, default all P.
    """

    prompt_length: int = 20
    prompt_layers: str | int | Iterable[int] = "all"
    reparameterization: str | None = None
    reparameterization_hidden: int = 512
    prompt_dropout: float = 0.1
    init: str = "normal"
    init_std: float = 0.02
    init_tokens: list[int] | None = None
    method: str = "deep"
    num_prompts: int = 1
    prompt_lengths: list[int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt_layers, (str, int)):
            self.prompt_layers = list(self.prompt_layers)
        checks = [
            (self.method in METHODS, f"method {self.method!r} does not exist; choose one of {', '.join(METHODS)}"),
            (self.reparameterization in REPARAMETERIZATIONS,
             f"reparameterization {self.reparameterization!r} does not exist; choose None, 'mlp' or 'lstm'"),
            (self.method == "none" or self.prompt_length >= 1,
             f"prompt_length {self.prompt_length} is below 1; use method='none' to train the head only"),
            (0.0 <= self.prompt_dropout < 1.0, f"prompt_dropout {self.prompt_dropout} is outside [0, 1); 0 switches it off"),
            (self.num_prompts >= 1, f"num_prompts {self.num_prompts} is below 1; a bank holds at least one prompt"),
            (self.reparameterization_hidden >= 2 or self.reparameterization is None,
             f"reparameterization_hidden {self.reparameterization_hidden} is below 2; the paper uses 512"),
            (self.prompt_lengths is None or (len(self.prompt_lengths) == self.num_prompts
                                             and all(1 <= n <= self.prompt_length for n in self.prompt_lengths)),
             f"prompt_lengths {self.prompt_lengths} must hold num_prompts = {self.num_prompts} values from 1 to prompt_length = "
             f"{self.prompt_length}"),
        ]
        for fine, sentence in checks:
            if not fine:
                raise ConfigError(f"{sentence}.")

    def layers(self, num_layers: int) -> list[int]:
        """Indices of the prompted layers, ascending. Raises ConfigError for indices the encoder does not have."""
        if self.method != "deep":
            return []
        wanted = self.prompt_layers
        if wanted == "all":
            return list(range(num_layers))
        if isinstance(wanted, str):
            wanted = _parse_layers(wanted)
        if isinstance(wanted, int):
            if not 1 <= wanted <= num_layers:
                raise ConfigError(f"prompt_layers {wanted} asks for the top {wanted} layers, but the encoder has {num_layers}; "
                                  f"use 1 to {num_layers}, or 'all'.")
            return list(range(num_layers - wanted, num_layers))
        chosen = sorted(set(wanted))
        if not chosen or chosen[0] < 0 or chosen[-1] >= num_layers:
            raise ConfigError(f"prompt_layers {wanted} names layers the encoder does not have; indices run from 0 to "
                              f"{num_layers - 1} (as a string, '1-{num_layers}').")
        return chosen

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _parse_layers(text: str) -> list[int] | int:
    """ "17-24" or "1,3,5-8" counted from 1 -> indices from 0; "6" is the top six."""
    try:
        if text.isdigit():
            return int(text)
        spans = [[int(n) for n in part.split("-")] for part in text.split(",")]
        return [i - 1 for span in spans for i in range(span[0], span[-1] + 1)]
    except ValueError:
        raise ConfigError(f"prompt_layers {text!r} is not understood; use 'all', a number k for the top k, or layers counted "
                          "from 1 such as '17-24' or '1,3,5-8'.") from None


class PromptBank(nn.Module):
    """K trainable prompts.

    Without reparameterization the only parameter is `bank`, fp32 [K, P, W] with W = 2 * prompted layers * H (deep) or E
    (shallow). With one, `embedding` [K, P, R] and the network behind it train instead, and the bank is computed from them
    once a step (not once a sequence).
    """

    prompt_lengths: Tensor | None

    def __init__(self, config: PromptConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = config.layers(encoder.num_layers)
        self.num_layers, self.num_heads, self.head_dim = encoder.num_layers, encoder.num_heads, encoder.head_dim
        deep = config.method == "deep"
        self.width = 2 * len(self.layers) * encoder.hidden_size if deep else encoder.embedding_size
        lengths = None if config.prompt_lengths is None else torch.tensor(config.prompt_lengths)
        self.register_buffer("prompt_lengths", lengths, persistent=False)
        shape = (config.num_prompts, config.prompt_length)
        if config.reparameterization is None:
            self.bank = nn.Parameter(torch.empty(*shape, self.width))
        else:
            rank = encoder.hidden_size if deep else encoder.embedding_size
            self.embedding = nn.Parameter(torch.empty(*shape, rank))
            build = _mlp if config.reparameterization == "mlp" else _LSTMEncoder
            self.network = build(rank, config.reparameterization_hidden, self.width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, init_std) prompt (zero for init="zero"), N(0, 0.02) linear layers with zero bias, as published."""
        main = self.bank if self.config.reparameterization is None else self.embedding
        with torch.no_grad():
            if self.config.init == "zero" and self.config.reparameterization is None:
                main.zero_()
            else:
                main.normal_(0.0, self.config.init_std)
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    module.weight.normal_(0.0, 0.02)
                    module.bias.zero_()
            if self.config.init == "zero" and self.config.reparameterization is not None:
                last = [m for m in self.modules() if isinstance(m, nn.Linear)][-1]
                last.weight.zero_()

    @torch.no_grad()
    def init_from_tokens(self, encoder: Encoder) -> None:
        """Start from real tokens: their keys and values in every prompted layer (deep) or their word embeddings (shallow).

        The tokens are config.init_tokens, cycled to P, or random vocabulary entries, others for each prompt.
        Raises ConfigError with a reparameterization, whose output has no inverse.
        """
        if self.config.reparameterization is not None:
            raise ConfigError(f"init='tokens' cannot be put behind reparameterization={self.config.reparameterization!r}; "
                              "use init='normal', or reparameterization=None.")
        K, P = self.bank.shape[:2]
        rows = encoder.config.vocab_size
        if self.config.init_tokens:
            wrong = [i for i in self.config.init_tokens if not 0 <= i < rows]
            if wrong:
                raise ConfigError(f"init_tokens holds id {wrong[0]}, but the vocabulary has {rows} entries; use ids of the "
                                  "backbone's tokenizer.")
            cycled = torch.tensor(self.config.init_tokens)[torch.arange(P) % len(self.config.init_tokens)]
            ids_KP = cycled.expand(K, P)
        else:
            ids_KP = torch.randint(rows, (K, P))
        ids_KP = ids_KP.to(encoder.device)
        if self.config.method == "shallow":
            self.bank.copy_(encoder.embeddings.word[ids_KP])
            return
        for k in range(K):
            keys_values_L2PH = encoder.keys_values(ids_KP[k])
            self.bank[k].copy_(keys_values_L2PH[self.layers].permute(2, 0, 1, 3).reshape(P, -1))

    def rows(self) -> Tensor:
        """The prompts [K, P, W] in fp32, through the reparameterization where there is one."""
        if self.config.reparameterization is None:
            return self.bank
        return self.network(self.embedding)

    def materialise(self, dtype: torch.dtype) -> Prefix:
        """The prefix for one step: one copy in `dtype`, laid out [layers, 2, K, P, N, D]; backward is one stack."""
        rows_KPW = self.rows()
        K, P, _ = rows_KPW.shape
        shaped = rows_KPW.view(K, P, len(self.layers), 2, self.num_heads, self.head_dim).permute(2, 3, 0, 1, 4, 5)
        keys: list[Tensor | None] = [None] * self.num_layers
        values: list[Tensor | None] = [None] * self.num_layers
        parts = shaped.to(dtype, memory_format=torch.contiguous_format).contiguous().flatten(0, 1).unbind(0)
        for i, layer in enumerate(self.layers):
            keys[layer], values[layer] = parts[2 * i], parts[2 * i + 1]
        return Prefix(keys, values, P, self.prompt_lengths, self.config.prompt_dropout)


def _mlp(rank: int, hidden: int, width: int) -> nn.Module:
    """The published prefix projection: Linear, tanh, Linear."""
    return nn.Sequential(nn.Linear(rank, hidden), nn.Tanh(), nn.Linear(hidden, width))


class _LSTMEncoder(nn.Module):
    """P-tuning v1's encoder (arXiv 2103.10385, equation 3): a two-layer BiLSTM over the rows, then a ReLU MLP."""

    def __init__(self, rank: int, hidden: int, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(rank, hidden // 2, num_layers=2, bidirectional=True, batch_first=True)
        both = 2 * (hidden // 2)
        self.head = nn.Sequential(nn.Linear(both, both), nn.ReLU(), nn.Linear(both, width))

    def forward(self, embedding_KPR: Tensor) -> Tensor:
        return self.head(self.lstm(embedding_KPR)[0])
