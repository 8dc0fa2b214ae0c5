"""DeBERTa, ModernBERT and GLM against transformers where it has them, and with a prefix against plain fp64 PyTorch."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from ptv2_engine import PromptConfig, PromptedModel, ops
from ptv2_engine.encoder import Encoder, Prefix
from ptv2_engine.errors import ConfigError
from ptv2_engine.packing import pack, with_parts
from ptv2_engine.testing import assert_error_within, padded_batch, tiny_model
from tests.encoder import plain_deberta, plain_modernbert
from tests.encoder.plain_glm import TINY, PlainGLM, causal_from

LENGTHS = [60, 1, 17, 33]
RELATIVE = {"relative_attention": True, "position_biased_input": False, "type_vocab_size": 0}
MODELS = {
    "v1": ("deberta", {}),
    "v1 with absolute positions and types": ("deberta", {"position_biased_input": True, "type_vocab_size": 2}),
    "v1 c2p": ("deberta", {"pos_att_type": "c2p"}),
    "v3": ("deberta-v2", {}),
    "v2 without buckets, own projections, convolution": ("deberta-v2", {
        "position_buckets": -1, "share_att_key": False, "norm_rel_ebd": "none", "conv_kernel_size": 3, "conv_act": "gelu"}),
    "v2 p2c": ("deberta-v2", {"pos_att_type": "p2c", "share_att_key": False}),
    "v2 without relative attention": ("deberta-v2", {"relative_attention": False, "pos_att_type": [], "norm_rel_ebd": "none"}),
    "modernbert": ("modernbert", {}),
    "modernbert with biases": ("modernbert", {"attention_bias": True, "mlp_bias": True, "norm_bias": True}),
}
BACKENDS = ("native", "reference")


def plain_of(family):
    return plain_modernbert.run if family == "modernbert" else plain_deberta.run


def make(name, dtype=torch.float32):
    family, overrides = MODELS[name]
    model = tiny_model(family, **overrides).to(dtype)
    return family, model, Encoder.from_pretrained(model).eval(), padded_batch(LENGTHS)


def prefix_of(rows_L2PND, dropout_p=0.0):
    keys, values = ([rows_L2PND[i, part][None] for i in range(len(rows_L2PND))] for part in range(2))
    return Prefix(keys, values, rows_L2PND.shape[2], None, dropout_p)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_without_a_prefix_the_hidden_states_equal_transformers(name, backend):
    _, model, encoder, batch = make(name)
    keep = batch["attention_mask"].bool()
    with ops.use_backend(backend), torch.no_grad():
        ours = encoder(pack(batch["input_ids"], batch["attention_mask"]))
        theirs = model(**batch).last_hidden_state[keep]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prompt_length", [1, 5, 20])
@pytest.mark.parametrize("name", MODELS)
def test_with_a_prefix_states_and_gradients_equal_a_plain_fp64_model(name, prompt_length, backend):
    family, model, encoder, batch = make(name)
    keep = batch["attention_mask"].bool()
    rows = torch.randn(3, 2, prompt_length, 4, 16)
    weights = torch.randn(int(keep.sum()), 64)
    ours_rows, their_rows = rows.clone().requires_grad_(), rows.double().requires_grad_()
    with ops.use_backend(backend):
        ours = encoder(pack(batch["input_ids"], batch["attention_mask"]), prefix_of(ours_rows), shift_positions=False)
        (ours * weights).sum().backward()
    stock_rows = rows.clone().requires_grad_()
    stock = plain_of(family)(model, batch, stock_rows)[keep]
    (stock * weights).sum().backward()
    exact = plain_of(family)(model.double(), batch, their_rows)[keep]
    (exact * weights.double()).sum().backward()
    assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()
    for layer in range(3):
        assert_error_within(f"layer {layer}", ours_rows.grad[layer], their_rows.grad[layer], stock_rows.grad[layer], roundings=8)


@pytest.mark.parametrize("name", ["v1", "v3", "modernbert"])
def test_bf16_is_no_further_from_the_truth_than_twice_stock_bf16(name):
    family, model, encoder, batch = make(name, torch.bfloat16)
    keep = batch["attention_mask"].bool()
    rows = torch.randn(3, 2, 5, 4, 16).bfloat16()
    found = {}
    for run in ("stock", "ours", "exact"):
        r = rows.detach().clone().to(torch.float64 if run == "exact" else torch.bfloat16).requires_grad_()
        if run == "ours":
            out = encoder(pack(batch["input_ids"], batch["attention_mask"]), prefix_of(r), shift_positions=False)
        else:
            out = plain_of(family)(model.double() if run == "exact" else model, batch, r)[keep]
        out.double().square().sum().backward()
        found[run] = (out, r.grad)
    for what, ours, exact, stock in zip(("states", "gradient"), found["ours"], found["exact"], found["stock"], strict=True):
        assert_error_within(f"{name} {what}", ours, exact, stock)


@pytest.mark.parametrize("name", ["v3", "modernbert"])
@pytest.mark.parametrize("length", [2, 79, 300])
def test_relative_positions_reach_past_the_length_the_config_names(name, length):
    _, model, encoder, _ = make(name)
    batch = padded_batch([length, 1])
    theirs = model(**batch).last_hidden_state[batch["attention_mask"].bool()]
    ours = encoder(pack(batch["input_ids"], batch["attention_mask"]))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", ["v1", "v3", "modernbert"])
def test_fully_padded_rows_change_nothing_for_the_others(name):
    family, model, encoder, batch = make(name)
    batch["attention_mask"][2] = 0
    rows = torch.randn(3, 2, 5, 4, 16)
    ours = encoder(pack(batch["input_ids"], batch["attention_mask"]), prefix_of(rows))
    exact = plain_of(family)(model.double(), batch, rows.double())
    assert ours.shape[0] == sum(LENGTHS) - 17
    assert (ours - exact[batch["attention_mask"].bool()]).abs().max() <= 1e-5 * exact.abs().max()
    if family != "modernbert":
        assert encoder(pack(batch["input_ids"], batch["attention_mask"]), prefix_of(rows), first_tokens_only=True)[2].eq(0).all()


@pytest.mark.parametrize("name", ["v1", "v3", "modernbert"])
def test_padding_on_the_left_changes_nothing(name):
    _, _, encoder, _ = make(name)
    ids, rows = torch.randint(5, 120, (1, 30)), torch.randn(3, 2, 5, 4, 16)
    mask = torch.ones_like(ids)
    mask[:, :7] = 0
    torch.testing.assert_close(encoder(pack(ids, mask), prefix_of(rows)), encoder(pack(ids[:, 7:]), prefix_of(rows)))


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_the_published_geometry_up_to_512_tokens(name):
    family, overrides = MODELS[name]
    sizes = {"max_relative_positions": -1, "max_position_embeddings": 512} | ({"position_buckets": 256} if name == "v3" else {})
    model = tiny_model(family, **overrides | sizes)
    encoder, batch = Encoder.from_pretrained(model).eval(), padded_batch([512, 1, 300])
    theirs = model(**batch).last_hidden_state[batch["attention_mask"].bool()]
    ours = encoder(pack(batch["input_ids"], batch["attention_mask"]))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("family", ["deberta", "deberta-v2", "modernbert", "glm"])
@pytest.mark.parametrize("method", ["deep", "shallow"])
def test_a_prompt_can_start_from_tokens(family, method):
    """A deep prompt made of a sequence's own keys and values: its tokens as a prefix are what that sequence would add."""
    backbone = PlainGLM() if family == "glm" else tiny_model(family)
    prompt = PromptConfig(prompt_length=4, init="tokens", init_tokens=[9, 8, 7], method=method)
    model = PromptedModel.from_pretrained(backbone, prompt=prompt, num_labels=2)
    encoder = model.encoder
    if method == "shallow":
        assert torch.equal(model.prompt.bank[0], encoder.embeddings.word[[9, 8, 7, 9]])
        return
    rows_P2ND = model.prompt.bank[0].view(4, 3, 2, 4, 16)[:, 0]                     # of the lowest layer
    x_TH = encoder.embeddings(pack(torch.tensor([[9, 8, 7, 9]])), 0, 0.0, None, 0)
    layer = encoder.layers[0]
    if family == "glm":
        x_TH = torch.nn.functional.layer_norm(x_TH, (64,), layer.attn_norm_weight, layer.attn_norm_bias, 1e-5)
    expected = layer.qkv(x_TH).view(4, 3, 4, 16)
    torch.testing.assert_close(rows_P2ND[:, 1], expected[:, 2], rtol=1e-5, atol=1e-5)
    if family != "modernbert":                                                      # whose keys are turned by their position
        torch.testing.assert_close(rows_P2ND[:, 0], expected[:, 1], rtol=1e-5, atol=1e-5)


def test_the_relative_tables_are_projected_once_and_their_projections_dropped():
    for name in ("v1", "v3", "v2 p2c"):
        _, model, encoder, _ = make(name)
        names = [n for n, _ in encoder.named_parameters()]
        assert not any("pos_key" in n or "pos_query" in n or "relative" in n for n in names)
        expected = len(model.config.pos_att_type)
        assert sum(".rel_" in n for n in names) == expected * 3
        assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize(("family", "overrides", "word"), [
    ("deberta", {"talking_head": True}, "talking_head"),
    ("deberta", {"pos_att_type": ["c2p", "p2p"]}, "pos_att_type"),
    ("deberta", {"embedding_size": 32}, "embedding_size"),
    ("deberta-v2", {"conv_kernel_size": 3, "conv_groups": 2}, "conv_groups"),
    ("deberta-v2", {"attention_head_size": 32}, "attention_head_size"),
    ("modernbert", {"mlp_dropout": 0.1}, "mlp_dropout"),
    ("modernbert", {"hidden_activation": "silu"}, "hidden_activation"),
])
def test_switches_that_the_stack_lacks_are_refused_by_name(family, overrides, word):
    model = tiny_model(family)
    for key, value in overrides.items():
        setattr(model.config, key, value)
    with pytest.raises(ConfigError, match=word):
        Encoder.from_pretrained(model)


# GLM


def glm(dtype=torch.float64):
    plain = PlainGLM().to(dtype)
    return plain, Encoder.from_pretrained(plain, dtype=dtype).eval()


def two_parts(lengths=((20, 6), (1, 1), (9, 0), (30, 11))):
    """A padded batch of [part A ; part B]: ids, mask, sep, position_ids [B, 2, S]."""
    B, S = len(lengths), max(a + b for a, b in lengths)
    ids, mask = torch.randint(5, 120, (B, S)), torch.zeros(B, S, dtype=torch.long)
    positions = torch.zeros(B, 2, S, dtype=torch.long)
    for i, (a, b) in enumerate(lengths):
        mask[i, :a + b] = 1
        positions[i, 0, :a] = torch.arange(a)
        positions[i, 0, a:a + b], positions[i, 1, a:a + b] = a // 2, torch.arange(1, b + 1)
    return ids, mask, torch.tensor([a for a, _ in lengths]), positions


@pytest.mark.parametrize("prompt_length", [0, 7])
def test_glm_states_and_prefix_gradients_equal_plain_pytorch(prompt_length):
    plain, encoder = glm()
    ids, mask, sep, positions = two_parts()
    rows = torch.randn(3, 2, prompt_length, 4, 16, dtype=torch.float64) if prompt_length else None
    ours_rows, their_rows = (None if rows is None else rows.clone().requires_grad_() for _ in range(2))
    ours = encoder(with_parts(pack(ids, mask), sep, positions), None if rows is None else prefix_of(ours_rows))
    theirs = []
    for b, length in enumerate(mask.sum(1).tolist()):
        theirs.append(plain(ids[b, :length], positions[b, :, :length], causal_from(int(sep[b]), length), their_rows))
    exact = torch.cat(theirs)
    assert (ours - exact).abs().max() <= 1e-12 * exact.abs().max()
    if rows is not None:
        weights = torch.randn_like(exact)
        (ours * weights).sum().backward()
        (exact * weights).sum().backward()
        assert (ours_rows.grad - their_rows.grad).abs().max() <= 1e-12 * their_rows.grad.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_glm_in_fp32_is_the_same_on_every_backend(backend):
    plain, encoder = glm(torch.float32)
    ids, mask, sep, positions = two_parts()
    batch = with_parts(pack(ids, mask), sep, positions)
    rows = torch.randn(3, 2, 7, 4, 16)
    ours_rows, exact_rows = rows.clone().requires_grad_(), rows.double().requires_grad_()
    with ops.use_backend(backend):
        ours = encoder(batch, prefix_of(ours_rows))
        ours.square().sum().backward()
    exact = Encoder.from_pretrained(plain, dtype=torch.float64).eval()(batch, prefix_of(exact_rows))
    exact.square().sum().backward()
    assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert (ours_rows.grad - exact_rows.grad).abs().max() <= 1e-5 * exact_rows.grad.abs().max()


def test_glm_without_parts_is_bidirectional():
    plain, encoder = glm()
    ids, mask, _, _ = two_parts()
    ours = encoder(pack(ids, mask))
    exact = []
    for b, n in enumerate(mask.sum(1).tolist()):
        positions = torch.stack((torch.arange(n), torch.zeros(n, dtype=torch.long)))
        exact.append(plain(ids[b, :n], positions, torch.ones(n, n, dtype=torch.bool)))
    assert (ours - torch.cat(exact)).abs().max() <= 1e-12 * ours.abs().max()


def test_a_deep_prompt_shifts_no_glm_position_and_a_shallow_one_stands_in_part_a():
    plain, encoder = glm()
    ids, mask, sep, positions = two_parts()
    batch = with_parts(pack(ids, mask), sep, positions)
    rows = torch.randn(1, 4, 64, dtype=torch.float64)
    ours = encoder(batch, input_prompt_KPE=rows)
    b, length = 3, int(mask[3].sum())
    moved = positions[b, :, :length] + torch.tensor([[4], [0]])
    moved = torch.cat((torch.stack((torch.arange(4), torch.zeros(4, dtype=torch.long))), moved), 1)

    class Inserted(torch.nn.Module):
        weight = plain.word_embeddings.weight

        def forward(self, tokens):
            return torch.cat((rows[0], self.weight[tokens[4:]]))

    words, plain.word_embeddings = plain.word_embeddings, Inserted()
    exact = plain(torch.cat((torch.zeros(4, dtype=torch.long), ids[b, :length])), moved, causal_from(int(sep[b]) + 4, length + 4))
    plain.word_embeddings = words
    assert (ours[-length:] - exact[4:]).abs().max() <= 1e-12 * exact.abs().max()
    for method, taken in (("deep", 0), ("shallow", 20)):
        model = PromptedModel.from_pretrained(PlainGLM(), prompt=PromptConfig(prompt_length=20, method=method))
        assert model.max_length() == TINY["max_sequence_length"] + 1 - taken


@pytest.mark.parametrize("kind", ["safetensors with the class's prefix", "bin in shards"])
def test_glm_checkpoints_of_transformers_load_with_one_tensor_more(tmp_path, kind):
    """Weights and one tensor beside them are all that is allocated; files are memory-mapped."""
    plain = PlainGLM()
    state = {name: t.half() for name, t in plain.state_dict().items()}
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    if kind.startswith("bin"):
        names = sorted(state)
        shards = {f"pytorch_model-0000{i}-of-00003.bin": {n: state[n] for n in names[i::3]} for i in range(3)}
        for file, part in shards.items():
            torch.save(part, tmp_path / file)
        where = {name: file for file, part in shards.items() for name in part}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    else:
        save_file({f"glm.{name}": t for name, t in state.items()}, tmp_path / "model.safetensors")
    mapped = {file.stat().st_size for file in tmp_path.iterdir()}
    live = peak = 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        encoder = Encoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and abs(event.nbytes()) not in mapped:
            live += event.nbytes()
            peak = max(peak, live)
    weights, largest = sum(p.nbytes for p in encoder.parameters()), max(p.numel() for p in encoder.parameters()) * 4
    assert weights <= peak <= weights + largest
    batch = pack(torch.randint(5, 120, (2, 9)))
    assert torch.equal(encoder.eval()(batch), Encoder.from_pretrained(plain.half(), dtype=torch.bfloat16).eval()(batch))


def test_a_glm4_decoder_config_is_told_apart():
    plain = PlainGLM()
    plain.settings = {"model_type": "glm", "num_hidden_layers": 2, "hidden_size": 64}
    with pytest.raises(ConfigError, match="GLM-4"):
        Encoder.from_pretrained(plain)
