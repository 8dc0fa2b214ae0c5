"""Memory policies keep less and change no result: minimal not at all, lean by what its formats cost."""

from __future__ import annotations

import pytest
import torch

from ptv2_engine import PromptConfig, PromptedModel
from ptv2_engine.errors import ConfigError
from ptv2_engine.memory import Setup, plan
from ptv2_engine.testing import padded_batch, tiny_config, tiny_model

FAMILIES = ("bert", "roberta", "electra", "deberta", "deberta-v2", "modernbert", "glm")
GLM = {"model_type": "glm", "num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 120,
       "max_sequence_length": 79, "initializer_range": 0.2}


def model_of(family: str, **prompt) -> PromptedModel:
    if family != "glm":
        torch.manual_seed(0)
        return PromptedModel.from_pretrained(tiny_model(family), num_labels=3, prompt=PromptConfig(5, **prompt))
    from ptv2_engine.encoder.weights import random_encoder

    torch.manual_seed(0)
    return PromptedModel(*random_encoder(GLM), PromptConfig(5, **prompt), num_labels=3)


def gradients(model: PromptedModel, policy: str, train: bool) -> dict[str, torch.Tensor]:
    batch = padded_batch([7, 20, 1, 12], pad_id=1 if model.encoder.config.family == "roberta" else 0)
    model.train(train).zero_grad()
    model.encoder.set_memory(policy)
    torch.manual_seed(3)                    # the dropouts of the head and of a shallow prompt's rows draw from torch's generator
    out = model(**batch, labels=torch.tensor([0, 1, 2, 1]), seed=torch.tensor([5]))
    out.loss.backward()
    return {"loss": out.loss.detach()} | {name: p.grad.clone() for name, p in model.trained_parameters().items()}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_policies_agree(family, train):
    """minimal equals exact to fp32 rounding, dropout drawn again from its counters; lean has the same loss, and a gradient
    that points where the exact one does."""
    model = model_of(family)
    exact = gradients(model, "exact", train)
    for policy, limit in (("minimal", 2e-5), ("lean", 0.1)):
        found = gradients(model, policy, train)
        torch.testing.assert_close(found["loss"], exact["loss"], rtol=1e-5, atol=1e-6)
        for name, grad in exact.items():
            assert (found[name] - grad).norm() <= limit * grad.norm() + 1e-7, (policy, name)
    assert exact["prompt.bank"].norm() > 0


@pytest.mark.parametrize("prompt", [{"prompt_layers": [1]}, {"method": "shallow"}, {"reparameterization": "mlp"},
                                    {"num_prompts": 2}], ids=str)
@pytest.mark.parametrize("family", ["bert", "glm"])
def test_policies_agree_on_every_kind_of_prompt(family, prompt):
    model = model_of(family, **prompt)
    exact, minimal, lean = (gradients(model, policy, True) for policy in ("exact", "minimal", "lean"))
    for name, grad in exact.items():
        assert (minimal[name] - grad).norm() <= 2e-5 * grad.norm() + 1e-7, name
        assert (lean[name] - grad).norm() <= 0.1 * grad.norm() + 1e-7, name


@pytest.mark.parametrize("policy,limit", [("exact", 14.2), ("lean", 5.3), ("minimal", 2.1)])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bytes_a_token_and_layer(device, policy, limit, family):
    """What autograd really keeps of a layer in bf16, in units of H: the figures of encoder/layer.py. A few floats a row come on
    top (1/std, the log-sum-exp, scales), and DeBERTa on Triton keeps its attention's output when exact."""
    more = {"modernbert": {"intermediate_size": 384}}.get(family, {"intermediate_size": 1024})
    config = dict(GLM, hidden_size=256, num_attention_heads=4) if family == "glm" else tiny_config(
        family, hidden_size=256, num_attention_heads=4, **more).to_dict()
    found = plan(Setup(config, batch_size=16, seq_len=64, prompt=PromptConfig(4), memory=policy, device=device))
    if policy == "exact":
        limit += 2 * (family == "modernbert") + 2 * (family.startswith("deberta") and device == "cuda")
    if family == "modernbert" and policy == "lean":
        limit = 2.4
    assert limit - 0.4 < found.saved_per_token_and_layer <= limit


def test_an_unknown_policy_is_refused():
    with pytest.raises(ConfigError, match="memory 'less' does not exist"):
        model_of("bert").encoder.set_memory("less")
