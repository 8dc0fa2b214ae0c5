"""Methods by their names, and prompts that start from words."""

from __future__ import annotations

import pytest
import torch

from ptv2_engine import PromptConfig, PromptedModel
from ptv2_engine.errors import ConfigError
from ptv2_engine.methods import METHODS, ordinary_tokens, prompt_init, resolve, tokens_of_text
from ptv2_engine.testing import padded_batch, tiny_model

VOCABULARY = {"[PAD]": 0, "[unused1]": 1, "[CLS]": 2, "[SEP]": 3, "is": 4, "it": 5, "true": 6, "##ly": 7}


class Words:
    """A tokenizer of whole words."""

    all_special_ids = (0, 2, 3)

    def get_vocab(self) -> dict[str, int]:
        return dict(VOCABULARY)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [VOCABULARY[word] for word in text.split()]
        return {"input_ids": [2, *ids, 3] if add_special_tokens else ids}


@pytest.mark.parametrize("name, expected", [
    ("p-tuning-v2", ("deep", None, None, False)), ("prompt-tuning", ("shallow", None, None, False)),
    ("p-tuning", ("shallow", "lstm", None, False)), ("head-only", ("none", None, None, False)),
    ("fine-tuning", ("none", None, "all", False)), ("bitfit", ("none", None, "bias", False)),
    ("lora", ("none", None, None, True)),
    ("deep", ("deep", None, None, False)), ("shallow", ("shallow", None, None, False)), ("none", ("none", None, None, False)),
])
def test_each_name_says_what_trains(name, expected):
    m = resolve(name)
    assert (m.prompt_method, m.reparameterization, m.backbone, m.outside) == expected and m.name == name


def test_the_names_are_all_tested_above():
    assert len(METHODS) == 10


@pytest.mark.parametrize("name, kind", [("p-tuning", "mlp"), ("p-tuning-v2", "mlp"), ("deep", "lstm"), ("shallow", "mlp")])
def test_a_reparameterization_replaces_the_methods_own(name, kind):
    assert resolve(name, kind).reparameterization == kind
    PromptConfig(4, method=resolve(name, kind).prompt_method, reparameterization=kind)


@pytest.mark.parametrize("name, kind, message", [
    ("ptuning", None, "method 'ptuning' does not exist; choose one of p-tuning-v2, .*lora"),
    ("deep", "gru", "reparameterization 'gru' does not exist"),
    ("prompt-tuning", "mlp", "is P-tuning; use method 'p-tuning'"),
    *((name, "mlp", f"method '{name}' trains no prompt") for name in ("fine-tuning", "bitfit", "lora", "head-only", "none")),
])
def test_what_does_not_exist_or_fit_is_refused(name, kind, message):
    with pytest.raises(ConfigError, match=message):
        resolve(name, kind)


def test_a_text_is_repeated_and_cut_as_pefts_text_init_does():
    assert tokens_of_text("it is true", Words(), 7) == [5, 4, 6, 5, 4, 6, 5]
    assert tokens_of_text("it is true", Words(), 2) == [5, 4]
    with pytest.raises(ConfigError, match="text ' ', which has no tokens"):
        tokens_of_text(" ", Words(), 4)


def test_pefts_text_init_gives_the_same_rows(monkeypatch):
    """PEFT asks the tokenizer for special tokens as well; without them the same rows come out."""
    import peft
    import transformers

    base, tokenizer = tiny_model("bert", "SequenceClassification"), Words()
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: _Plain())
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=7, prompt_tuning_init="TEXT",
                                     prompt_tuning_init_text="it is true", tokenizer_name_or_path="words")
    theirs = peft.get_peft_model(base, config).prompt_encoder["default"].embedding.weight
    made = prompt_init("text:it is true", tokenizer, 7)
    ours = PromptedModel.from_pretrained(tiny_model("bert"), prompt=PromptConfig(7, method="shallow", **made))
    assert torch.equal(ours.prompt.bank[0], theirs)


class _Plain(Words):
    def __call__(self, text: str, add_special_tokens: bool = False, **_: object) -> dict[str, list[int]]:
        return super().__call__(text, add_special_tokens)


def test_ordinary_tokens_are_no_special_and_no_unused_ones():
    torch.manual_seed(0)
    assert sorted(ordinary_tokens(Words(), 4)) == [4, 5, 6, 7]
    assert sorted(ordinary_tokens(Words(), 6))[0] >= 4 and len(ordinary_tokens(Words(), 6)) == 6
    torch.manual_seed(1)
    first = ordinary_tokens(Words(), 3)
    torch.manual_seed(1)
    assert prompt_init("tokens", Words(), 3) == {"init": "tokens", "init_tokens": first}


def test_other_inits_are_handed_on():
    assert prompt_init("normal", Words(), 3) == {"init": "normal"}
    assert prompt_init("runs/text:1/adapter", Words(), 3) == {"init": "runs/text:1/adapter"}


def test_a_deep_prompt_starts_from_the_keys_and_values_of_a_text():
    ours = PromptedModel.from_pretrained(tiny_model("bert"), prompt=PromptConfig(6, **prompt_init("text:it is", Words(), 6)))
    rows = ours.prompt.bank[0].view(6, 3, 2, 64)
    alone = ours.encoder.keys_values(torch.tensor([5, 4] * 3))
    torch.testing.assert_close(rows.permute(1, 2, 0, 3), alone)
    assert torch.isfinite(ours(**padded_batch([5, 3])).logits).all()
