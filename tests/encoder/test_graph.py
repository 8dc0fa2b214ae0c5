"""What freezing gives: bytes saved a token and layer, where the graph starts, dropout that repeats."""

from __future__ import annotations

import importlib

import pytest
import torch

from ptv2_engine.encoder import Encoder, Prefix
from ptv2_engine.encoder.glm_sizes import glm_config
from ptv2_engine.packing import from_packed
from ptv2_engine.testing import tiny_model
from tests.encoder.plain_glm import PlainGLM

L, H, N, D, T = 4, 64, 4, 16, 200


PRE_LN = ("modernbert", "glm")         # their final LayerNorm keeps one x_hat more
FAMILIES = ("bert", "deberta", "deberta-v2", "modernbert", "glm")


def make(dtype=torch.bfloat16, family="bert", **config):
    if family == "glm":
        model = PlainGLM(glm_config(L, H, N, 120, 128))
    else:
        width = 3 * H // 2 if family == "modernbert" else 4 * H          # ModernBERT's proportions; it has two up projections
        model = tiny_model(family, num_hidden_layers=L, intermediate_size=width, max_position_embeddings=128, **config)
    encoder = Encoder.from_pretrained(model, dtype=dtype)
    batch = from_packed(torch.randint(5, 120, (T,)), torch.tensor([100, 60, 40]))
    return encoder, batch


def prefix_for(layers, dtype=torch.bfloat16, P=5, grad=True, dropout_p=0.0):
    def part():
        return torch.randn(1, P, N, D).to(dtype).requires_grad_(grad)

    k, v = ([part() if i in layers else None for i in range(L)] for _ in "kv")
    return Prefix(k, v, P, None, dropout_p)


def saved_bytes(encoder, batch, prefix) -> int:
    """Bytes of distinct storages kept for backward, the encoder's weights and the prefix left out."""
    known = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    known |= {t.untyped_storage().data_ptr() for t in (*prefix.k, *prefix.v) if t is not None}
    storages = {}

    def pack_hook(t):
        s = t.untyped_storage()
        if s.data_ptr() not in known:
            storages[s.data_ptr()] = (s.nbytes(), t)       # t keeps the storage alive, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda t: t):
        out = encoder(batch, prefix)
    assert out.requires_grad
    return sum(size for size, _ in storages.values())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_activations_in_bf16_are_at_most_16_h_bytes_a_token_and_layer(family, training):
    encoder, batch = make(family=family)
    encoder.train(training)
    whole = saved_bytes(encoder, batch, prefix_for(range(L)))
    one_less = saved_bytes(encoder, batch, prefix_for(range(1, L)))
    per_layer = (whole - one_less) / T / H
    # a log-sum-exp a head and 1/std twice: 56 bytes a token in BERT-base
    assert 10 < per_layer <= 16 + (4 * N + 8) / H, per_layer
    assert whole <= L * T * (16 * H + 4 * N + 8) + (family in PRE_LN) * T * (2 * H + 4) + 4096


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_below_the_lowest_prompt_save_nothing(family):
    encoder, batch = make(family=family)
    top = saved_bytes(encoder, batch, prefix_for([L - 1]))
    assert top <= T * (16 * H + 4 * N + 8) + (family in PRE_LN) * T * (2 * H + 4) + 4096


@pytest.mark.parametrize("family", FAMILIES)
def test_no_prompt_no_graph(family):
    encoder, batch = make(family=family)
    out = encoder(batch, prefix_for(range(L), grad=False))
    assert not out.requires_grad and out.grad_fn is None


def test_the_lowest_prompted_layer_asks_for_the_prefix_gradient_only(monkeypatch):
    op = importlib.import_module("ptv2_engine.ops.prefix_attention")
    asked = []
    original = op._backward

    def spy(ctx, dout, need_tokens):
        asked.append(need_tokens)
        return original(ctx, dout, need_tokens)

    monkeypatch.setattr(op, "_backward", spy)
    encoder, batch = make(torch.float32)
    encoder(batch, prefix_for(range(1, L), torch.float32)).sum().backward()
    assert asked == [True] * (L - 2) + [False]


def test_frozen_weights_get_no_gradient():
    encoder, batch = make(torch.float32)
    encoder(batch, prefix_for(range(L), torch.float32)).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())


def test_dropout_repeats_for_a_seed_and_is_off_in_eval():
    encoder, batch = make(torch.float32)
    prefix = prefix_for(range(L), torch.float32, dropout_p=0.3)
    seed = torch.tensor([17])
    encoder.train()
    a, b, c = encoder(batch, prefix, seed=seed), encoder(batch, prefix, seed=seed), encoder(batch, prefix)
    assert torch.equal(a, b) and not torch.equal(a, c)
    encoder.eval()
    assert torch.equal(encoder(batch, prefix), encoder(batch, prefix._replace(dropout_p=0.0)))
    torch.manual_seed(4)
    encoder.train()
    d = encoder(batch, prefix)
    torch.manual_seed(4)
    assert torch.equal(d, encoder(batch, prefix))


def test_prefix_gradients_are_bitwise_equal_between_two_runs():
    encoder, batch = make(torch.float32)
    encoder.train()
    grads = []
    for _ in range(2):
        torch.manual_seed(0)
        prefix = prefix_for(range(L), torch.float32, dropout_p=0.1)
        encoder(batch, prefix, seed=torch.tensor([5])).square().sum().backward()
        grads.append([t.grad for t in (*prefix.k, *prefix.v)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
