"""The methods of the P-Tuning v2 paper's tables, by name: what each one trains.

    p-tuning-v2     a prompt of keys and values in every layer                  arXiv 2110.07602
    prompt-tuning   a prompt of input embeddings                                arXiv 2104.08691
    p-tuning        the same, behind an LSTM or an MLP ("v1")                   arXiv 2103.10385
    head-only       the head
    fine-tuning     every weight
    bitfit          every bias                                                  arXiv 2106.10199
    lora            low-rank updates through PEFT (lora.py)                     arXiv 2106.09685

All train the head too. deep, shallow and none are PromptConfig's own words, with any reparameterization.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ptv2_engine.errors import ConfigError
from ptv2_engine.prompt import METHODS as PROMPT_METHODS
from ptv2_engine.prompt import REPARAMETERIZATIONS


@dataclass(frozen=True)
class Method:
    """prompt_method, reparameterization: PromptConfig's. backbone: PromptedModel's trained_backbone. outside: no PromptedModel at
    all, but another package's model. learning_rate: to start from."""

    name: str
    prompt_method: str
    reparameterization: str | None = None
    backbone: str | None = None
    outside: bool = False
    learning_rate: float = 5e-3


BY_NAME = {m.name: m for m in (
    Method("p-tuning-v2", "deep"), Method("prompt-tuning", "shallow"), Method("p-tuning", "shallow", "lstm", learning_rate=1e-3),
    Method("head-only", "none"), Method("fine-tuning", "none", backbone="all", learning_rate=2e-5),
    Method("bitfit", "none", backbone="bias", learning_rate=1e-3), Method("lora", "none", outside=True, learning_rate=3e-4),
    *(Method(name, name) for name in PROMPT_METHODS))}
METHODS = tuple(BY_NAME)


def resolve(method: str, reparameterization: str | None = None) -> Method:
    """The settings of a method; reparameterization None: the method's own. Raises ConfigError for what does not exist or fit."""
    if method not in BY_NAME:
        raise ConfigError(f"method {method!r} does not exist; choose one of {', '.join(METHODS)}.")
    found = BY_NAME[method]
    if reparameterization is None:
        return found
    if reparameterization not in REPARAMETERIZATIONS:
        raise ConfigError(f"reparameterization {reparameterization!r} does not exist; choose None, 'mlp' or 'lstm'.")
    if found.prompt_method == "none":
        raise ConfigError(f"method {method!r} trains no prompt that reparameterization {reparameterization!r} could stand in "
                          "front of; leave it out.")
    if method == "prompt-tuning":
        raise ConfigError(f"method 'prompt-tuning' with reparameterization {reparameterization!r} is P-tuning; use method "
                          "'p-tuning', or leave the reparameterization out.")
    return replace(found, reparameterization=reparameterization)


def prompt_init(init: str, tokenizer: Callable[..., Any], prompt_length: int) -> dict[str, Any]:
    """PromptConfig's init and init_tokens for what a user may write: "text:WORDS" starts from the tokens of a text, "tokens" from
    random ordinary tokens; anything else is handed on. Raises ConfigError."""
    kind, colon, text = init.partition(":")
    if kind == "text" and colon:
        return {"init": "tokens", "init_tokens": tokens_of_text(text, tokenizer, prompt_length)}
    if init == "tokens":
        return {"init": "tokens", "init_tokens": ordinary_tokens(tokenizer, prompt_length)}
    return {"init": init}


def tokens_of_text(text: str, tokenizer: Callable[..., Any], prompt_length: int) -> list[int]:
    """The ids of a text, repeated or cut to prompt_length as PEFT's TEXT init does, but without [CLS] and [SEP]. Raises
    ConfigError for a text without tokens."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise ConfigError(f"the prompt cannot start from the text {text!r}, which has no tokens; use init='text:' with a few "
                          "words, or init='normal'.")
    return (ids * -(-prompt_length // len(ids)))[:prompt_length]


def ordinary_tokens(tokenizer: Any, count: int) -> list[int]:
    """`count` random ids (torch's generator) of the vocabulary without special tokens and BERT's [unused1] and the like, whose
    embeddings were never trained. Each at most once where there are enough."""
    special = set(tokenizer.all_special_ids)
    ids = sorted({i for token, i in tokenizer.get_vocab().items() if i not in special and not token.startswith("[unused")})
    if not ids:
        raise ConfigError("the tokenizer's vocabulary holds special tokens only, so a prompt cannot start from its words; use "
                          "init='normal'.")
    order = torch.randperm(len(ids)).tolist()
    return [ids[order[i % len(ids)]] for i in range(count)]
