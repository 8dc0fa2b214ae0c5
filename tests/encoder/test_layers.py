"""Which layers are prompted, which dropout masks they draw, and that weights may be replaced after construction."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from ptv2_engine import ops
from ptv2_engine.encoder import Encoder, Prefix
from ptv2_engine.packing import pack
from ptv2_engine.testing import assert_error_within, padded_batch, tiny_model, with_prefix

L, N, D, P = 3, 4, 16, 5
LENGTHS = [9, 1, 6]


def make(family: str = "bert", **config):
    model = tiny_model(family, **config)
    encoder = Encoder.from_pretrained(model).eval()
    padded = padded_batch(LENGTHS, pad_id=model.config.pad_token_id, types=model.config.type_vocab_size > 1)
    packed = pack(padded["input_ids"], padded["attention_mask"], padded.get("token_type_ids"),
                  uncounted_id=encoder.config.uncounted_id)
    return model, encoder, padded, packed


def prefix_of(rows_LKPND: torch.Tensor, layers=range(L), dropout_p: float = 0.0) -> Prefix:
    """rows [L, 2, P, N, D] -> a bank of one prompt with keys and values for `layers` only."""
    k, v = ([rows_LKPND[i, j][None] if i in layers else None for i in range(L)] for j in (0, 1))
    return Prefix(k, v, rows_LKPND.shape[2], None, dropout_p)


def transformers_layer_by_layer(model, padded, rows, layers):
    """The stock layers called one at a time, so that each may have a prefix or none (transformers cannot leave one out)."""
    B, S = padded["input_ids"].shape
    positions = torch.arange(P, P + S)[None].expand(B, -1)
    if model.config.model_type != "bert":
        pad = model.config.pad_token_id
        counted = (padded["input_ids"] != pad).long()
        positions = torch.where(counted > 0, pad + P + counted.cumsum(1), pad)
    x = model.embeddings(input_ids=padded["input_ids"], position_ids=positions, token_type_ids=padded.get("token_type_ids"))
    hidden = (1.0 - padded["attention_mask"].float())[:, None, None, :] * -1e9
    for i, layer in enumerate(model.encoder.layer):
        cache, mask = None, hidden
        if i in layers:
            own = DynamicCache()
            own.update(*(rows[i, j].transpose(0, 1)[None].expand(B, -1, -1, -1) for j in (0, 1)), i)
            cache = EncoderDecoderCache(own, DynamicCache())
            mask = torch.cat((hidden.new_zeros(B, 1, 1, P), hidden), -1)
        out = layer(x, mask.expand(-1, -1, S, -1), past_key_values=cache)
        x = out[0] if isinstance(out, tuple) else out
    return x[padded["attention_mask"].bool()]


@pytest.mark.parametrize("layers", [(0,), (2,), (1, 2), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_subset_of_prompted_layers_equals_transformers(family, layers):
    model, encoder, padded, packed = make(family)
    rows = torch.randn(L, 2, P, N, D)
    ours_rows, their_rows = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    ours = encoder(packed, prefix_of(ours_rows, layers))
    theirs = transformers_layer_by_layer(model, padded, their_rows, layers)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    weights = torch.randn_like(theirs)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    for i in range(L):
        a, b = ours_rows.grad[i], their_rows.grad[i]
        assert (a - b).abs().max() <= 1e-5 * b.abs().max(), f"layer {i}"
        assert bool(b.abs().max() > 0) == (i in layers)


def test_layers_below_the_lowest_prompt_have_no_graph():
    _, encoder, _, packed = make()
    graphs = []
    for layer in encoder.layers:
        layer.register_forward_hook(lambda module, args, out: graphs.append((args[0].x_TH.requires_grad, out.x_TH.requires_grad)))
    saved = []
    rows = torch.randn(L, 2, P, N, D, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(len(graphs)) or t, lambda t: t):
        encoder(packed, prefix_of(rows, (2,)))
    assert graphs == [(False, False), (False, False), (False, True)]
    assert saved and set(saved) == {2}        # nothing is kept before two layers have finished


@pytest.mark.parametrize("settings", [{"hidden_act": "gelu_new"}, {"hidden_act": "gelu_pytorch_tanh"}, {"layer_norm_eps": 1e-3},
                                      {"type_vocab_size": 1}, {"num_attention_heads": 2}])
def test_switches_of_the_config_equal_transformers(settings):
    model, encoder, padded, packed = make(**settings)
    if model.config.type_vocab_size == 1:
        assert packed.token_type_ids_T is None
    theirs = model(**padded).last_hidden_state[padded["attention_mask"].bool()]
    assert (encoder(packed) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_electra_without_a_projection_equals_transformers():
    model, encoder, padded, packed = make("electra", embedding_size=64)
    assert encoder.embeddings.project is None
    theirs = model(**padded).last_hidden_state[padded["attention_mask"].bool()]
    assert (encoder(packed) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_training_dropout_is_the_same_in_both_backends():
    """One seed gives the same masks everywhere, in forward and backward: sites, streams and rows agree."""
    _, encoder, _, packed = make()
    encoder.train()
    runs = {}
    for backend in ("reference", "native"):
        rows = torch.randn(L, 2, P, N, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with ops.use_backend(backend):
            out = encoder(packed, prefix_of(rows, dropout_p=0.2), seed=torch.tensor([11]))
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        runs[backend] = out.detach(), rows.grad
    for a, b in zip(*runs.values(), strict=True):
        assert (a - b).abs().max() <= 2e-5 * a.abs().max()
    assert (runs["native"][0] - encoder.eval()(packed, prefix_of(rows, dropout_p=0.2))).abs().max() > 0.1


def test_no_two_dropouts_share_a_call_site(monkeypatch):
    """Equal sites would draw equal masks: add_norm and embedding share one Philox stream, attention has its own."""
    sites = {"hidden": [], "attention": []}
    for module, name, kind in (("layer", "add_norm_kept", "hidden"), ("layer", "prefix_attention_qkv", "attention"),
                               ("embeddings", "embedding", "hidden")):
        owner = importlib.import_module(f"ptv2_engine.encoder.{module}")
        original = getattr(owner, name)

        def spy(*args, original=original, kind=kind, **kwargs):
            sites[kind].append(kwargs["site"])
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)
    _, encoder, _, packed = make()
    encoder.train()(packed)
    assert len(sites["hidden"]) == 2 * L + 1 and len(sites["attention"]) == L
    every = sites["hidden"] + sites["attention"]
    assert len(set(every)) == len(every)


def test_dropout_probabilities_come_from_the_config():
    _, encoder, _, packed = make(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    assert torch.equal(encoder.train()(packed), encoder.eval()(packed))
    _, encoder, _, packed = make(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    assert not torch.equal(encoder.train()(packed), encoder.eval()(packed))


def test_weights_replaced_after_the_first_step_are_used():
    """Nothing is captured at construction: load_state_dict, a cast and a deep copy all give what a fresh load gives."""
    _, encoder, _, packed = make()
    rows = torch.randn(L, 2, P, N, D)
    before = encoder(packed, prefix_of(rows))
    other = Encoder.from_pretrained(tiny_model(seed=7)).eval()
    expected = other(packed, prefix_of(rows))
    encoder.load_state_dict(copy.deepcopy(other).state_dict())
    assert torch.equal(encoder(packed, prefix_of(rows)), expected) and not torch.equal(before, expected)
    cast = encoder.to(torch.bfloat16)(packed, prefix_of(rows.bfloat16()))
    fresh = Encoder.from_pretrained(tiny_model(seed=7), dtype=torch.bfloat16).eval()
    assert torch.equal(cast, fresh(packed, prefix_of(rows.bfloat16())))


def test_fp64_on_the_reference_is_exact():
    """The truth that low precision is measured against is itself right to 1e-12."""
    model, _, padded, packed = make()
    encoder = Encoder.from_pretrained(model.double(), dtype=torch.float64).eval()
    rows = torch.randn(P, 2 * L * N * D, dtype=torch.float64)
    theirs = with_prefix(model, rows, padded).last_hidden_state[padded["attention_mask"].bool()]
    with ops.use_backend("reference"):
        ours = encoder(packed, prefix_of(rows.view(P, L, 2, N, D).permute(1, 2, 0, 3, 4)))
    assert_error_within("hidden states", ours, theirs, times=100)
