"""The frozen masked-language-model head against transformers' own models for masked words."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from ptv2_engine.errors import ConfigError, InputError, WeightError
from ptv2_engine.masked_lm import load_masked_lm_head

SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
         "max_position_embeddings": 40}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False, "type_vocab_size": 0}
KINDS = {
    "bert": (transformers.BertConfig, transformers.BertForMaskedLM, {}),
    "bert, tanh GELU": (transformers.BertConfig, transformers.BertForMaskedLM, {"hidden_act": "gelu_new"}),
    "roberta": (transformers.RobertaConfig, transformers.RobertaForMaskedLM, {"pad_token_id": 1}),
    "camembert": (transformers.CamembertConfig, transformers.CamembertForMaskedLM, {"pad_token_id": 1}),
    "deberta, legacy head": (transformers.DebertaConfig, transformers.DebertaForMaskedLM, RELATIVE),
    "deberta, published head": (transformers.DebertaConfig, transformers.DebertaForMaskedLM, RELATIVE | {"legacy": False}),
    "deberta-v2": (transformers.DebertaV2Config, transformers.DebertaV2ForMaskedLM, RELATIVE | {"legacy": False}),
}
IDS = torch.tensor([[5, 9, 3, 17, 6], [5, 3, 44, 12, 6]])
BLANKS = (torch.arange(2), torch.tensor([2, 1]))


def made(kind, **changes):
    """A random model whose biases and norms are not their neutral values."""
    config, model, switches = KINDS[kind]
    torch.manual_seed(3)
    theirs = model(config(**SIZES | switches | changes)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "bias" in name or "orm.weight" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return theirs


def compare(head, theirs):
    """Our logits at the blanks against the whole model's."""
    with torch.no_grad():
        out = theirs(IDS, output_hidden_states=True)
        h_BH, word_VH = out.hidden_states[-1][BLANKS], theirs.get_input_embeddings().weight
        exact = out.logits[BLANKS]
        ours = head(h_BH, word_VH)
        some = head(h_BH, word_VH, torch.tensor([7, 0, 60]))
    assert ours.shape == (2, SIZES["vocab_size"]) and ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert (some - exact[:, [7, 0, 60]]).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_at_the_blank_are_transformers(kind):
    theirs = made(kind)
    compare(load_masked_lm_head(theirs), theirs)


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta, published head"])
def test_from_a_folder_of_safetensors_or_bin(kind, tmp_path):
    theirs = made(kind)
    theirs.save_pretrained(tmp_path / "safe")
    (tmp_path / "bin").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    for folder in ("safe", "bin"):
        compare(load_masked_lm_head(tmp_path / folder), theirs)


def test_the_layer_norm_names_of_the_first_checkpoints(tmp_path):
    theirs = made("bert")
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for n, t in theirs.state_dict().items() if "decoder" not in n}
    torch.save(old, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    compare(load_masked_lm_head(tmp_path), theirs)


def test_a_decoder_that_is_not_tied_is_kept():
    theirs = made("bert", tie_word_embeddings=False)
    assert not torch.equal(theirs.cls.predictions.decoder.weight, theirs.get_input_embeddings().weight)
    assert not torch.equal(theirs.cls.predictions.decoder.bias, theirs.cls.predictions.bias)
    compare(load_masked_lm_head(theirs), theirs)


def test_nothing_trains_but_the_gradient_reaches_the_hidden_states():
    theirs = made("roberta")
    head = load_masked_lm_head(theirs)
    assert not any(p.requires_grad for p in head.parameters())
    h = torch.randn(2, 24, requires_grad=True)
    exact_h = h.detach().clone().requires_grad_()
    word, ids = theirs.get_input_embeddings().weight.detach(), torch.tensor([4, 8])
    torch.nn.functional.cross_entropy(head(h, word, ids), torch.tensor([0, 1])).backward()
    torch.nn.functional.cross_entropy(theirs.lm_head(exact_h)[:, ids], torch.tensor([0, 1])).backward()
    assert (h.grad - exact_h.grad).abs().max() <= 1e-5 * exact_h.grad.abs().max()


def test_low_precision_weights_are_computed_with_in_fp32():
    theirs = made("bert")
    head = load_masked_lm_head(theirs, dtype=torch.bfloat16)
    assert head.dense.dtype == torch.bfloat16
    h, word = torch.randn(2, 24).bfloat16(), theirs.get_input_embeddings().weight.detach().bfloat16()
    with torch.no_grad():
        exact = load_masked_lm_head(theirs.bfloat16().float())(h.float(), word.float())
    assert torch.allclose(head(h, word), exact, rtol=0, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize(("source", "word"), [
    (lambda: transformers.BertModel(transformers.BertConfig(**SIZES)), "no masked-language-model head"),
    (lambda: transformers.ElectraForPreTraining(transformers.ElectraConfig(**SIZES)), "electra"),
    (lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SIZES)), "lm_head.dense"),
])
def test_a_checkpoint_without_a_head_is_refused(source, word):
    with pytest.raises(ConfigError, match=word):
        load_masked_lm_head(source())


def test_a_detector_of_replaced_tokens_is_refused(tmp_path):
    theirs = made("deberta-v2")
    extra = {"mask_predictions.dense.weight": torch.zeros(24, 24)}
    torch.save(theirs.state_dict() | extra, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    with pytest.raises(ConfigError, match="v3"):
        load_masked_lm_head(tmp_path)


def test_tensors_that_are_missing_or_of_another_shape_are_named(tmp_path):
    theirs = made("roberta")
    (tmp_path / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    torch.save({n: t for n, t in theirs.state_dict().items() if n != "lm_head.layer_norm.bias"}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightError, match="lm_head.layer_norm.bias"):
        load_masked_lm_head(tmp_path)
    torch.save(theirs.state_dict() | {"lm_head.dense.weight": torch.zeros(24, 25)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightError, match="24, 25"):
        load_masked_lm_head(tmp_path)


def test_word_embeddings_of_another_checkpoint_are_refused():
    with pytest.raises(InputError, match="60, 24"):
        load_masked_lm_head(made("bert"))(torch.randn(1, 24), torch.randn(60, 24))
