"""The cloze head: verbalizers at <sop>, candidates behind one context, against a plain GLM run one answer at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ptv2_engine import PromptConfig, PromptedModel
from ptv2_engine.batches import PackedCollator, split_inputs
from ptv2_engine.errors import ConfigError, InputError
from ptv2_engine.ops.lm_head import reference, vocabulary_log_prob
from ptv2_engine.testing import tiny_model
from tests.encoder.plain_glm import PlainGLM, causal_from

SOP = 7


def model_of(plain, dtype=torch.float64, **options):
    return PromptedModel.from_pretrained(plain, task="cloze", prompt=PromptConfig(prompt_length=5, init_std=0.5), dtype=dtype,
                                         **options)


def prefix_of(model):
    """[L, 2, P, N, D] in fp64 with a graph back to the prompt."""
    return model.prompt.rows()[0].double().view(5, 3, 2, 4, 16).permute(1, 2, 0, 3, 4)


def example(context, mask_at, answers=None, label=0):
    """Features of one sequence as tasks.cloze makes them: <sop> alone, or all answers behind one context."""
    ids, positions, blocks = list(context), list(range(len(context))), [0] * len(context)
    candidates, targets = [-1] * len(context), [-100] * len(context)
    for c, answer in enumerate([[0]] if answers is None else answers):
        ids += [SOP, *answer[:-1]]
        positions += [mask_at] * len(answer)
        blocks += range(1, len(answer) + 1)
        candidates += [c] * len(answer)
        targets += answer
    found = {"input_ids": ids, "causal_from": len(context), "position_ids": [positions, blocks], "label": label}
    return found if answers is None else found | {"candidate_ids": candidates, "target_ids": targets}


def plain_hidden(plain, prefix, context, mask_at, answer):
    ids = torch.tensor([*context, SOP, *answer[:-1]])
    n, a = len(context), len(answer)
    positions = torch.tensor([[*range(n), *[mask_at] * a], [0] * n + list(range(1, a + 1))])
    return plain(ids, positions, causal_from(n, n + a), prefix)[n:]


CONTEXTS = [(list(range(20, 32)), 4), ([50, 60, 9], 1), (list(range(70, 110)), 33)]
ANSWERS = [[[11, 12, 13], [14], [15, 16]], [[40, 41], [42, 43, 44, 45]], [[9, 8], [7, 6]]]


def test_verbalizer_logits_are_the_language_models_at_sop():
    plain = PlainGLM().double()
    model = model_of(plain, verbalizer_ids=[101, 3, 55])
    batch = PackedCollator()([example(*c, label=i) for i, c in enumerate(CONTEXTS)])
    out = model(**batch)
    exact = torch.stack([plain.logits(plain_hidden(plain, prefix_of(model), *c, [0]))[0, [101, 3, 55]] for c in CONTEXTS])
    assert out.logits.shape == (3, 3)
    assert (out.logits - exact).abs().max() <= 1e-6 * exact.abs().max()
    assert torch.allclose(out.loss.double(), F.cross_entropy(exact, torch.arange(3)), rtol=1e-6)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_candidates_behind_one_context_score_as_if_each_stood_alone(length_penalty):
    plain = PlainGLM().double()
    model = model_of(plain, length_penalty=length_penalty)
    labels = [2, 1, 0]
    batch = PackedCollator()([example(*c, answers, label) for c, answers, label in zip(CONTEXTS, ANSWERS, labels, strict=True)])
    out = model(**batch)
    out.loss.backward()
    ours = model.prompt.bank.grad.clone()
    model.zero_grad()
    prefix = prefix_of(model)
    exact = torch.full((3, 3), -10000.0, dtype=torch.float64)
    for b, (context, answers) in enumerate(zip(CONTEXTS, ANSWERS, strict=True)):
        for c, answer in enumerate(answers):
            logp = plain.logits(plain_hidden(plain, prefix, *context, answer)).log_softmax(-1)
            exact[b, c] = logp.gather(1, torch.tensor(answer)[:, None]).sum() / len(answer) ** length_penalty
    loss = F.cross_entropy(exact, torch.tensor(labels))
    loss.backward()
    assert (out.logits - exact).abs().max() <= 1e-6 * exact.detach().abs()[exact > -10000].max()
    assert (ours - model.prompt.bank.grad).abs().max() <= 1e-5 * model.prompt.bank.grad.abs().max()


def test_rows_with_one_candidate_each_are_a_choice_and_no_regression():
    model = model_of(PlainGLM(), dtype=torch.float32)
    batch = PackedCollator()([example(*c, answers[:1], 0) for c, answers in zip(CONTEXTS, ANSWERS, strict=True)])
    out = model(**batch)
    assert out.logits.shape == (3, 1) and out.loss.item() == 0.0


def test_rows_whose_right_candidate_is_unknown_add_nothing_to_the_loss():
    """WSC rows whose span is wrong: their label is -100, and a batch of nothing else has loss 0, not nan."""
    model = model_of(PlainGLM(), dtype=torch.float32)
    features = [example(*c, answers, label) for c, answers, label in zip(CONTEXTS, ANSWERS, [2, -100, -100], strict=True)]
    logits = model(**PackedCollator()(features)).logits
    assert torch.allclose(model(**PackedCollator()(features)).loss, F.cross_entropy(logits[:1], torch.tensor([2])))
    assert model(**PackedCollator()(features[1:])).loss.item() == 0.0


def test_padded_and_packed_inputs_give_the_same():
    model = model_of(PlainGLM(), dtype=torch.float32)
    features = [example(*c, answers) for c, answers in zip(CONTEXTS, ANSWERS, strict=True)]
    S = max(len(f["input_ids"]) for f in features)

    def padded(name, fill):
        return torch.tensor([list(f[name]) + [fill] * (S - len(f[name])) for f in features])

    mask = torch.tensor([[1] * len(f["input_ids"]) + [0] * (S - len(f["input_ids"])) for f in features])
    positions = torch.tensor([[list(p) + [0] * (S - len(p)) for p in f["position_ids"]] for f in features])
    causal = torch.tensor([f["causal_from"] for f in features])
    out = model(padded("input_ids", 0), mask, position_ids=positions, causal_from=causal,
                candidate_ids=padded("candidate_ids", -1), target_ids=padded("target_ids", -100))
    packed = PackedCollator()(features)
    packed.pop("labels")
    assert torch.equal(out.logits, model(**packed).logits)


def test_the_vocabulary_product_is_exact_over_several_chunks():
    h = torch.randn(600, 32, requires_grad=True)
    word, targets, weights = torch.randn(90, 32), torch.randint(0, 90, (600,)), torch.randn(600)
    logp = vocabulary_log_prob(h, word, targets)
    (logp * weights).sum().backward()
    exact_h = h.detach().double().requires_grad_()
    exact = reference(exact_h, word.double(), targets)
    (exact * weights.double()).sum().backward()
    assert (logp - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert (h.grad - exact_h.grad).abs().max() <= 1e-5 * exact_h.grad.abs().max()


def test_the_gradient_of_a_sure_prediction_is_no_noise():
    """bf16, the targets' probabilities above 0.99: within twice the error of autograd's own bf16."""
    torch.manual_seed(0)
    word, targets, weights = torch.randn(90, 32).bfloat16(), torch.randint(0, 90, (300,)), torch.rand(300)
    grads = []
    for function, dtype in ((reference, torch.float64), (reference, torch.bfloat16), (vocabulary_log_prob, torch.bfloat16)):
        h = (word[targets] * 0.6).to(dtype).requires_grad_()
        logp = function(h, word.to(dtype), targets)
        assert logp.exp().median() > 0.99
        (logp * weights).sum().backward()
        grads.append(h.grad.double())
    exact, stock, ours = grads
    assert (ours - exact).norm() <= 2 * (stock - exact).norm() < 0.1 * exact.norm()


def test_only_the_prompt_trains_and_an_adapter_keeps_the_verbalizers(tmp_path):
    plain = PlainGLM()
    model = model_of(plain, dtype=torch.float32, verbalizer_ids=[4, 5], length_penalty=0.5)
    assert list(model.trained_parameters()) == ["prompt.bank"]
    model.save_pretrained(tmp_path / "a")
    again = PromptedModel.from_adapter(tmp_path / "a", backbone=plain)
    batch = PackedCollator()([example(*c) for c in CONTEXTS])
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert again.head.length_penalty == 0.5 and again.task == "cloze"


@pytest.mark.parametrize(("options", "word"), [
    ({"verbalizer_ids": [4, 400]}, "verbalizer id 400"),
    ({"verbalizer_ids": [4, 4]}, "twice"),
    ({"verbalizer_ids": [4, 5], "num_labels": 3}, "3 labels"),
    ({"prompt": PromptConfig(method="none"), "verbalizer_ids": [4, 5]}, "nothing to train"),
])
def test_a_cloze_model_that_cannot_be_is_refused(options, word):
    with pytest.raises(ConfigError, match=word):
        PromptedModel.from_pretrained(PlainGLM(), task="cloze", **options)


def test_a_backbone_without_a_language_model_head_is_refused():
    with pytest.raises(ConfigError, match="no masked-language-model head"):
        PromptedModel.from_pretrained(tiny_model("bert"), task="cloze", verbalizer_ids=[1, 2])


@pytest.mark.parametrize(("change", "word"), [
    (lambda b: b.pop("causal_from"), "causal_from"),
    (lambda b: b.pop("position_ids"), "position_ids"),
    (lambda b: b.update(causal_from=torch.tensor([13, 3, 40])), "no <sop>"),
    (lambda b: b["position_ids"].fill_(500), "position id 500"),
])
def test_a_batch_that_is_no_cloze_batch_is_refused(change, word):
    model = model_of(PlainGLM(), dtype=torch.float32, verbalizer_ids=[1, 2])
    batch = PackedCollator()([example(*c) for c in CONTEXTS])
    change(batch)
    with pytest.raises(InputError, match=word):
        model(**batch)


def test_other_backbones_refuse_glm_inputs():
    model = PromptedModel.from_pretrained(tiny_model("bert"))
    with pytest.raises(InputError, match="GLM"):
        model(torch.tensor([[5, 6]]), causal_from=torch.tensor([1]), position_ids=torch.zeros(1, 2, 2, dtype=torch.long))


def test_the_mix_loss_adds_the_right_candidates_negative_score():
    """WSC as published: minus the gold candidate's score, averaged, on top of the cross-entropy; rows without a label count for
    nothing."""
    options = {"task": "cloze", "prompt": PromptConfig(4, prompt_dropout=0.0), "length_penalty": 1.0}
    plain, mixed = (PromptedModel.from_pretrained(PlainGLM(), mix_loss=mix, **options) for mix in (False, True))
    with torch.no_grad():
        mixed.prompt.bank.copy_(plain.prompt.bank)
    rows = [example([5, 6, 7], 1, [[11, 12], [13]], label=1), example([8, 9], 1, [[14], [15, 16, 17]], label=0),
            example([8, 9], 1, [[14], [15]], label=-100)]
    batch = PackedCollator()(rows)
    a, b = plain(**batch), mixed(**batch)
    scores = a.logits.detach()
    assert torch.allclose(b.loss, a.loss - (scores[0, 1] + scores[1, 0]) / 2, rtol=1e-6)
    pieces = [mixed(**part, num_items_in_batch=2).loss for part in split_inputs(batch, 3)]
    assert torch.allclose(sum(pieces), b.loss, rtol=1e-5)
