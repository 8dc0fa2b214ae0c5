"""PromptConfig, the bank, and the prefix it becomes."""

from __future__ import annotations

import pytest
import torch

from ptv2_engine import PromptBank, PromptConfig
from ptv2_engine.encoder import Encoder
from ptv2_engine.errors import ConfigError
from ptv2_engine.packing import from_packed
from ptv2_engine.testing import tiny_model


@pytest.fixture(scope="module")
def encoder():
    return Encoder.from_pretrained(tiny_model("bert")).eval()


@pytest.mark.parametrize("spec, layers", [
    ("all", [0, 1, 2, 3]), (2, [2, 3]), (range(1, 3), [1, 2]), ([3, 0], [0, 3]),
    ("2-3", [1, 2]), ("1,3-4", [0, 2, 3]), ("1", [3])])
def test_prompt_layers(spec, layers):
    assert PromptConfig(prompt_layers=spec).layers(4) == layers


@pytest.mark.parametrize("change, words", [
    ({"method": "lora"}, "method 'lora' does not exist; choose one of deep, shallow, none"),
    ({"reparameterization": "cnn"}, "reparameterization 'cnn' does not exist"),
    ({"prompt_length": 0}, "prompt_length 0 is below 1; use method='none'"),
    ({"prompt_dropout": 1.0}, r"prompt_dropout 1.0 is outside \[0, 1\)"),
    ({"num_prompts": 2, "prompt_lengths": [3]},
     r"prompt_lengths \[3\] must hold num_prompts = 2 values from 1 to prompt_length = 20"),
])
def test_bad_settings(change, words):
    with pytest.raises(ConfigError, match=words):
        PromptConfig(**change)


@pytest.mark.parametrize("spec, words", [
    (5, "asks for the top 5 layers, but the encoder has 4"), ([4], "indices run from 0 to 3"), ("0-2", "indices run from 0 to 3"),
    ("top", "is not understood")])
def test_layers_that_do_not_exist(spec, words):
    with pytest.raises(ConfigError, match=words):
        PromptConfig(prompt_layers=spec).layers(4)


def test_bank_layout_is_the_published_one(encoder):
    bank = PromptBank(PromptConfig(prompt_length=5, num_prompts=2, prompt_layers=[0, 2]), encoder.config)
    assert bank.bank.shape == (2, 5, 2 * 2 * 64) and bank.bank.dtype == torch.float32
    assert {n for n, _ in bank.named_parameters()} == {"bank"}
    assert abs(bank.bank.detach().std() - 0.02) < 0.002
    prefix = bank.materialise(torch.float32)
    assert prefix.k[1] is None and prefix.v[1] is None and prefix.length == 5
    row = bank.bank[1, 3].view(4, 4, 16)      # K_0 | V_0 | K_2 | V_2, heads of 16
    for i, part in enumerate((prefix.k[0], prefix.v[0], prefix.k[2], prefix.v[2])):
        assert part.shape == (2, 5, 4, 16) and torch.equal(part[1, 3], row[i])


def test_materialise_casts_once_and_its_gradient_comes_back(encoder):
    bank = PromptBank(PromptConfig(prompt_length=3), encoder.config)
    prefix = bank.materialise(torch.bfloat16)
    assert {t.dtype for t in prefix.k} == {torch.bfloat16}
    assert len({t.untyped_storage().data_ptr() for t in (*prefix.k, *prefix.v)}) == 1      # one copy for all layers
    sum((i + 1) * (k.sum() + 10 * v.sum()) for i, (k, v) in enumerate(zip(prefix.k, prefix.v, strict=True))).backward()
    expected = torch.tensor([[i + 1, 10 * (i + 1)] for i in range(3)]).float().view(1, 1, 6, 1).expand(1, 3, 6, 64)
    assert torch.equal(bank.bank.grad, expected.reshape(1, 3, -1))


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
@pytest.mark.parametrize("method", ["deep", "shallow"])
def test_reparameterization_is_evaluated_once_and_trains(encoder, kind, method):
    config = PromptConfig(prompt_length=4, reparameterization=kind, reparameterization_hidden=32, method=method, num_prompts=2)
    bank = PromptBank(config, encoder.config)
    calls = []
    bank.network.register_forward_hook(lambda *_: calls.append(1))
    rows = bank.rows()
    assert rows.shape == (2, 4, 384 if method == "deep" else 64) and calls == [1]
    rows.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in bank.parameters())


def test_mlp_equals_the_published_projection(encoder):
    bank = PromptBank(PromptConfig(prompt_length=4, reparameterization="mlp", reparameterization_hidden=32), encoder.config)
    published = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 384))
    published.load_state_dict(bank.network.state_dict())
    torch.testing.assert_close(bank.rows()[0], published(bank.embedding[0]))


def test_zero_and_token_initialisation(encoder):
    assert not PromptBank(PromptConfig(init="zero"), encoder.config).rows().any()
    assert not PromptBank(PromptConfig(init="zero", reparameterization="mlp"), encoder.config).rows().any()
    bank = PromptBank(PromptConfig(prompt_length=4, init="tokens", init_tokens=[7, 8]), encoder.config)
    bank.init_from_tokens(encoder)
    prefix = bank.materialise(torch.float32)
    x = encoder.embeddings(from_packed(torch.tensor([7, 8, 7, 8]), torch.tensor([4])), 0, 0.0, None, 0)
    _, k, v = encoder.layers[0].qkv(x).view(4, 3, 4, 16).unbind(1)
    torch.testing.assert_close(prefix.k[0][0], k)
    torch.testing.assert_close(prefix.v[0][0], v)
    outside = PromptBank(PromptConfig(init="tokens", init_tokens=[7, 120]), encoder.config)
    with pytest.raises(ConfigError, match="init_tokens holds id 120, but the vocabulary has 120 entries"):
        outside.init_from_tokens(encoder)
    with pytest.raises(ConfigError, match="cannot be put behind reparameterization='mlp'"):
        PromptBank(PromptConfig(init="tokens", reparameterization="mlp"), encoder.config).init_from_tokens(encoder)
