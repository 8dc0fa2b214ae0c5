"""Several data sets, one prompt: batches, losses, sampling, saving, and the two stages on the command line."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from ptv2_engine import PromptConfig, PromptedModel
from ptv2_engine.adapter import TENSORS, read_tensors
from ptv2_engine.batches import PackedCollator
from ptv2_engine.cli import main
from ptv2_engine.errors import ConfigError
from ptv2_engine.multitask import MultiTaskBatchSampler, MultiTaskCollator, MultiTaskModel
from ptv2_engine.optim import parameter_groups
from ptv2_engine.testing import tiny_model
from tests.test_cli_tasks import backbone, files, train  # noqa: F401

OTHERS = {"tags": {"task": "token-classification", "num_labels": 4}, "span": {"task": "question-answering"},
          "choice": {"task": "multiple-choice"}}


def model_of(prompt=None, **options):
    prompt = prompt or PromptConfig(4, init_std=0.5)
    first = PromptedModel.from_pretrained(tiny_model("bert"), num_labels=3, prompt=prompt, **options)
    return MultiTaskModel.from_first("pair", first, OTHERS)


def features():
    """Two examples of each data set."""
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(5, 120, (n,), generator=generator).tolist()

    return [{"data_set": 0, "input_ids": ids(7), "labels": 2}, {"data_set": 0, "input_ids": ids(3), "labels": 0},
            {"data_set": 1, "input_ids": ids(5), "labels": [0, 1, -100, 3, 2]},
            {"data_set": 1, "input_ids": ids(2), "labels": [1, 1]},
            {"data_set": 2, "input_ids": ids(9), "start_positions": 2, "end_positions": 5},
            {"data_set": 2, "input_ids": ids(4), "start_positions": 0, "end_positions": 0},
            {"data_set": 3, "input_ids": [ids(4), ids(6)], "labels": 1},
            {"data_set": 3, "input_ids": [ids(5), ids(3), ids(2)], "labels": 0}]


def collate(rows):
    return MultiTaskCollator(PackedCollator())(rows)


def test_there_is_one_prompt_and_a_head_each():
    model = model_of()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"prompt.bank", *(f"head.{d}.{p}.{w}" for w in ("weight", "bias") for d, p in (
        ("pair", "classifier"), ("tags", "classifier"), ("span", "qa_outputs"), ("choice", "classifier")))}
    assert [g["name"] for g in parameter_groups(model)] == ["prompt", "head"]
    assert all(member.prompt is model.prompt for member in model.members.values())


def test_a_mixed_batch_is_the_mean_over_its_examples_and_so_are_its_gradients():
    model, rows = model_of(), features()
    mixed = model(**collate([rows[i] for i in (4, 0, 6, 2, 5, 1, 7, 3)])).loss
    mixed.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    alone = sum(model(**collate(rows[2 * d:2 * d + 2])).loss * 2 / 8 for d in range(4))
    alone.backward()
    assert mixed.item() == pytest.approx(alone.item(), rel=1e-5)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert (gradients[name] - p.grad).abs().max() <= 1e-5 * p.grad.abs().max() + 1e-8, name


@pytest.mark.parametrize("d", range(4))
def test_a_batch_of_one_data_set_is_that_models_own(d):
    model, rows = model_of(), features()[2 * d:2 * d + 2]
    member = model.members[model.names[d]]
    own = member(**PackedCollator()([{k: v for k, v in row.items() if k != "data_set"} for row in rows]))
    assert torch.equal(model(**collate(rows)).loss, own.loss)


def test_sampling_follows_the_temperature():
    sizes = [4000, 400]
    for temperature, share in ((1.0, 4000 / 4400), (2.0, 4000**0.5 / (4000**0.5 + 400**0.5)), (1e6, 0.5)):
        for mix in (False, True):
            sampler = MultiTaskBatchSampler([5] * 4400, sizes, 10, temperature=temperature, mix=mix)
            drawn = Counter(i >= 4000 for batch in sampler for i in batch)
            assert drawn[False] / sum(drawn.values()) == pytest.approx(share, abs=0.06), (temperature, mix)


def test_batches_are_of_one_data_set_unless_mixed_and_repeat():
    sampler = MultiTaskBatchSampler([5] * 70, [40, 30], 8, seed=3)
    first, again = list(sampler), list(sampler)
    assert first == again and len(first) == len(sampler) == 9
    assert all(len({i >= 40 for i in batch}) == 1 and len(set(batch)) == 8 for batch in first)
    sampler.set_epoch(1)
    assert list(sampler) != first
    mixed = list(MultiTaskBatchSampler([5] * 70, [40, 30], 8, mix=True))
    assert any(len({i >= 40 for i in batch}) == 2 for batch in mixed)
    seen = Counter(i for batch in mixed for i in batch if i < 40)
    assert max(seen.values()) - min(seen.values(), default=0) <= 1         # a data set is used up before it starts again


def test_a_small_data_set_is_a_small_batch():
    sampler = MultiTaskBatchSampler([5] * 43, [40, 3], 8, temperature=100.0)
    assert {len(batch) for batch in sampler} == {8, 3}


def test_saved_adapters_are_ordinary_ones(tmp_path):
    model, rows = model_of(), features()
    model.save_pretrained(tmp_path)
    for d, name in enumerate(model.names):
        again = PromptedModel.from_adapter(tmp_path / name, backbone=tiny_model("bert"))
        assert torch.equal(again(**PackedCollator()(rows[2 * d:2 * d + 2])).loss, model(**collate(rows[2 * d:2 * d + 2])).loss)
    other = model_of()
    with torch.no_grad():
        other.prompt.bank.zero_()
    other.load_adapter(tmp_path)
    assert torch.equal(other.prompt.bank, model.prompt.bank)
    started = PromptedModel.from_pretrained(tiny_model("bert"), num_labels=2, prompt=PromptConfig(4, init=str(tmp_path)))
    assert torch.equal(started.prompt.bank, model.prompt.bank)


def test_fine_tuning_together_trains_the_pooler_that_a_member_reads():
    model = model_of(PromptConfig(method="none"), trained_backbone="all")
    assert all(p.requires_grad for p in model.encoder.parameters())
    model(**collate(features())).loss.backward()
    assert model.encoder.pooler.weight.grad.abs().max() > 0


def plan(folder, kinds, **options):
    sets = {}
    for kind in kinds:
        (folder / kind).mkdir()
        files(folder / kind, kind)
        sets[kind] = {"train_file": str(folder / kind / "train.jsonl"), "validation_file": str(folder / kind / "dev.jsonl")}
    (folder / "tasks.yaml").write_text(json.dumps({"data_sets": sets} | options))
    return folder / "tasks.yaml"


@pytest.mark.parametrize("mix", [False, True])
def test_both_stages_on_the_command_line(backbone, mix, tmp_path, capsys):  # noqa: F811
    yaml = plan(tmp_path, ("pair", "tags", "span", "choice"), temperature=2, mix=mix)
    assert train(backbone, tmp_path / "a", "--multi_task", yaml, "--save_strategy", "epoch") == 0
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert set(results["data_sets"]) == {"pair", "tags", "span", "choice"}
    capsys.readouterr()
    for kind, metric in (("pair", "accuracy"), ("tags", "f1"), ("span", "f1"), ("choice", "accuracy")):
        assert main(["evaluate", str(tmp_path / "a" / kind), str(tmp_path / kind / "dev.jsonl"), "--device", "cpu"]) == 0
        found = json.loads(capsys.readouterr().out)
        scores = results["data_sets"][kind]
        assert scores["metric"] == metric
        assert found[metric] == pytest.approx(scores["validation"][f"validation_{metric}"], abs=1e-6)

    steps = 2 * 24 * 4 // 8
    assert train(backbone, tmp_path / "b", "--multi_task", yaml, "--resume_from_checkpoint",
                 tmp_path / "a" / f"checkpoint-{steps // 2}") == 0
    for kind in results["data_sets"]:
        ours, theirs = (read_tensors(tmp_path / name / kind / TENSORS)[0] for name in "ab")
        assert all(torch.equal(t, theirs[name]) for name, t in ours.items()), kind

    # the second stage: a run of one data set starts from the shared prompt
    assert train(backbone, tmp_path / "c", "--train_file", tmp_path / "pair" / "train.jsonl", "--init", tmp_path / "a",
                 "--learning_rate", "0", epochs=1) == 0
    shared, own = (read_tensors(tmp_path / name / TENSORS)[0]["prompt_embeddings"] for name in ("a/tags", "c"))
    assert torch.equal(shared, own)


@pytest.mark.parametrize(("content", "sentence"), [
    ({"data_set": {}}, "did you mean data_sets"),
    ({"data_sets": {}}, "needs data_sets"),
    ({"data_sets": {"a b": {"train_file": "x"}}}, "x has the suffix"),
    ({"data_sets": {"a": {"train_fil": "x"}}}, "did you mean train_file"),
    ({"data_sets": {"a": {"train_file": "x"}}, "temperature": "hot"}, "temperature 'hot' must be a number"),
])
def test_a_wrong_file_is_one_sentence(backbone, content, sentence, tmp_path, capsys):  # noqa: F811
    (tmp_path / "tasks.yaml").write_text(json.dumps(content))
    assert train(backbone, tmp_path / "a", "--multi_task", tmp_path / "tasks.yaml") == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_what_cannot_be():
    with pytest.raises(ConfigError, match="becomes a folder"):
        MultiTaskModel({"a b": PromptedModel.from_pretrained(tiny_model("bert"))})
    with pytest.raises(ConfigError, match="another encoder"):
        MultiTaskModel({n: PromptedModel.from_pretrained(tiny_model("bert")) for n in "ab"})
    with pytest.raises(ConfigError, match="temperature 0 is not above 0"):
        MultiTaskBatchSampler([1], [1], 1, temperature=0)
