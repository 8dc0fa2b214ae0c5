"""Steps as graphs, without a GPU: what is captured is run again instead of replayed, and a capture's rules are checked on fake
tensors. tests/gpu/test_graphs_on_gpu.py has the real thing."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ptv2_engine import PromptConfig, PromptedModel, Trainer, graphed, trainer_graphs
from ptv2_engine.batches import PackedCollator
from ptv2_engine.encoder import deberta
from ptv2_engine.graph_inputs import bucket_of, bucket_of_longest, bucket_of_tokens, fill_up
from ptv2_engine.graphed import GraphedAdamW, StepGraphs
from ptv2_engine.memory import Setup
from ptv2_engine.memory.planner import Workload, warm_up
from ptv2_engine.ops import planned_for
from ptv2_engine.optim import parameter_groups
from ptv2_engine.testing import tiny_config, tiny_model
from tests.encoder.plain_glm import PlainGLM
from tests.test_cloze import CONTEXTS, example

LENGTHS = [[9, 3, 17, 12], [8, 4, 16, 13], [21, 2, 5, 30], [10, 3, 17, 11], [22, 2, 5, 29], [7, 30, 1, 3]]


class Again:
    """Captures by remembering the function: a replay runs it once more and writes where the first result lies."""

    def __init__(self, *_):
        self.captured = 0

    def capture(self, function):
        self.captured += 1
        result = torch.zeros(())

        def replay():
            if (made := function()) is not None:
                result.copy_(made)

        return replay, result


def batch_of(lengths, task="sequence-classification", seed=0, glm=False):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i, n in enumerate(lengths):
        ids = torch.randint(5, 119, (n,), generator=generator).tolist()
        row = {"input_ids": ids, "token_type_ids": [j % 2 for j in range(n)]}
        if task == "token-classification":
            row["labels"] = [-100] + [t % 2 for t in ids[1:]]
        elif task == "question-answering":
            row |= {"start_positions": [0, n - 1, 64][i % 3], "end_positions": [0, n - 1, 64][i % 3]}
        elif task == "multiple-choice":
            row |= {"input_ids": [ids, ids[: n // 2 + 1]], "token_type_ids": [[0] * n, [1] * (n // 2 + 1)], "labels": i % 2}
        else:
            row["labels"] = i % 2
        rows.append(row)
    return PackedCollator()(rows)


def model_of(family="bert", task="sequence-classification", dropout=True, **prompt):
    torch.manual_seed(1)
    labels = {"num_labels": 2} if task in ("sequence-classification", "token-classification") else {}
    model = PromptedModel.from_pretrained(tiny_model(family), task=task, prompt=PromptConfig(4, **prompt), **labels).train()
    if not dropout:
        model.set_hidden_dropout(0.0)
        model.encoder.attention_dropout = 0.0
    return model


def test_buckets_waste_less_than_an_eighth():
    buckets = {bucket_of_tokens(n): n for n in range(1, 70_000)}
    assert all(bucket >= n for bucket, n in buckets.items())
    assert all(n <= bucket_of_tokens(n) < 1.125 * n for n in range(128, 70_000))
    assert sum(16_384 < bucket <= 32_768 for bucket in buckets) == 8             # few graphs
    assert [bucket_of_longest(n, 500) for n in (1, 16, 17, 300, 500)] == [16, 16, 32, 500, 500]


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "deberta", "deberta-v2", "modernbert"])
@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "question-answering", "multiple-choice"])
def test_spare_tokens_change_nothing(family, task):
    model, batch = model_of(family, task), batch_of(LENGTHS[2], task)
    results = []
    for inputs in (batch, fill_up(batch, model.max_length(), task == "token-classification")):
        model.zero_grad()
        torch.manual_seed(5)                                   # of the head's dropout
        loss = model(**inputs, seed=torch.tensor([7])).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert inputs["input_ids"].shape[0] > batch["input_ids"].shape[0] and inputs["max_seqlen"] > batch["max_seqlen"]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("prompt", [{"method": "shallow"}, {"reparameterization": "mlp"}, {"prompt_layers": 1}])
def test_spare_tokens_and_every_kind_of_prompt(prompt):
    model, batch = model_of(dropout=False, **prompt), batch_of(LENGTHS[2])
    both = [model(**inputs).loss for inputs in (batch, fill_up(batch, model.max_length(), False))]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)


def test_spare_tokens_behind_part_b():
    """GLM's cloze by verbalizers: two positions a token, and a causal part that spare rows must not widen."""
    model = PromptedModel.from_pretrained(PlainGLM(), task="cloze", prompt=PromptConfig(5), verbalizer_ids=[101, 3, 55]).train()
    batch = PackedCollator()([example(*context, label=i) for i, context in enumerate(CONTEXTS)])
    results = []
    for inputs in (batch, fill_up(batch, model.max_length(), False)):
        model.zero_grad()
        loss = model(**inputs, seed=torch.tensor([7])).loss
        loss.backward()
        results.append((loss.detach(), model.prompt.bank.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=2e-5, atol=2e-6)


def plain_steps(model, optimizer, batches, accumulate, max_norm):
    """The same training in a loop that anybody would write."""
    losses = []
    for i, batch in enumerate(batches):
        loss = model(**batch).loss / accumulate
        loss.backward()
        losses.append(loss.item())
        if (i + 1) % accumulate == 0:
            torch.nn.utils.clip_grad_norm_(list(model.trained_parameters().values()), max_norm)
            optimizer.step()
            optimizer.zero_grad()
    return losses


def graphed_steps(graphs, batches, accumulate, rates=()):
    losses = []
    for i, batch in enumerate(batches):
        losses.append(float(graphs.add_gradients(batch, divisor=accumulate)))
        if (i + 1) % accumulate == 0:
            graphs.clip()
            if rates:
                graphs.optimizer.param_groups[0]["lr"] = rates[i % len(rates)]
            graphs.optimizer.step()
            graphs.model.zero_grad()                           # as transformers' loop does: .grad is None then
    return losses


@pytest.mark.parametrize("accumulate", [1, 2])
def test_replayed_steps_train_as_a_plain_loop_does(accumulate):
    """Dropout on: the seed is drawn where the encoder draws it."""
    batches = [batch_of(lengths, seed=i) for i, lengths in enumerate(2 * LENGTHS)]
    made = []
    for graphed_run in (False, True):
        model = model_of()
        groups = parameter_groups(model, 0.01, head_lr=1e-3)
        torch.manual_seed(2)
        if graphed_run:
            optimizer = GraphedAdamW(groups, lr=1e-2, fused=True)
            graphs = StepGraphs(model, optimizer, 0.1, graphs=Again())
            losses = graphed_steps(graphs, batches, accumulate)
            held = [step for step in graphs.buckets.values() if step.captured]
            assert len(held) == len(graphs.buckets) >= 2 and graphs.graphs.captured == len(held) + 2
            assert optimizer.param_groups[0]["lr"] == 1e-2 and not optimizer.param_groups[0]["capturable"]
        else:
            losses = plain_steps(model, torch.optim.AdamW(groups, lr=1e-2, fused=True), batches, accumulate, 0.1)
        made.append((losses, model.trained_parameters()))
    assert made[0][0] == pytest.approx(made[1][0], rel=2e-5)
    for name, value in made[0][1].items():
        torch.testing.assert_close(made[1][1][name], value, rtol=1e-4, atol=1e-5)


def test_a_changed_rate_and_a_changed_dropout_reach_the_replay():
    model = model_of()
    graphs = StepGraphs(model, GraphedAdamW(parameter_groups(model), lr=1e-2, fused=True), 1.0, graphs=Again())
    batch = batch_of(LENGTHS[0])
    graphed_steps(graphs, [batch] * 3, 1)
    before = {k: v.clone() for k, v in model.trained_parameters().items()}
    graphed_steps(graphs, [batch], 1, rates=[0.0])
    for name in ("prompt.bank",):
        assert torch.equal(model.trained_parameters()[name], before[name])
    model.set_hidden_dropout(0.5)
    graphed_steps(graphs, [batch], 1)
    assert len(graphs.buckets) == 2


def test_gradients_are_those_of_the_batches_since_zero_grad():
    model = model_of(dropout=False)
    graphs = StepGraphs(model, GraphedAdamW(parameter_groups(model), lr=1e-2, fused=True), 1.0, graphs=Again())
    batches = [batch_of(lengths, seed=i) for i, lengths in enumerate(LENGTHS)]
    for batch in (*batches, *batches):                         # the second time from replays
        model.zero_grad()                                      # and no step behind it
        graphs.add_gradients(batch)
        graphs.add_gradients(batches[0])
        found = [p.grad.clone() for p in graphs.parameters]
        model.zero_grad()
        (model(**batch).loss + model(**batches[0]).loss).backward()
        for one, other in zip(found, graphs.parameters, strict=True):
            torch.testing.assert_close(one, other.grad, rtol=2e-5, atol=2e-6)


def rows_for_trainer(count=42):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 20, (count,), generator=generator).tolist()
    return [{"input_ids": (torch.randint(8, 64, (n,), generator=generator) + 50 * (i % 2)).tolist(), "labels": i % 2}
            for i, n in enumerate(lengths)]


def trained(folder, monkeypatch, graphs, steps=12, resume=None, graphs_class=Again, **changes):
    with monkeypatch.context() as patch:
        if graphs:
            patch.setattr(trainer_graphs, "unsupported", lambda *_: None)
            patch.setattr(graphed, "CudaGraphs", graphs_class)
        args = transformers.TrainingArguments(
            str(folder), per_device_train_batch_size=8, max_steps=steps, learning_rate=1e-2, logging_steps=1, report_to=[],
            disable_tqdm=True, use_cpu=True, seed=3, **{"save_strategy": "no"} | changes)
        torch.manual_seed(1)
        trainer = Trainer(model_of(), args, train_dataset=rows_for_trainer(), head_learning_rate=5e-3)
        assert (trainer.graphs_refused is None) == graphs
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_trainer_is_the_same_with_and_without(tmp_path, monkeypatch, accumulate):
    runs = [trained(tmp_path / str(on), monkeypatch, on, gradient_accumulation_steps=accumulate) for on in (False, True)]
    for key in ("loss", "grad_norm", "learning_rate"):
        assert logged(runs[1], key) == pytest.approx(logged(runs[0], key), rel=1e-3), key
    assert runs[0].tokens_seen == runs[1].tokens_seen


def test_a_checkpoint_goes_on_with_graphs_or_without(tmp_path, monkeypatch):
    whole = trained(tmp_path / "a", monkeypatch, True, save_strategy="steps", save_steps=6)
    for on in (True, False):
        again = trained(tmp_path / f"b{on}", monkeypatch, on, resume=str(tmp_path / "a" / "checkpoint-6"))
        assert logged(again)[-6:] == pytest.approx(logged(whole)[-6:], rel=1e-4 if on else 1e-3)


class Fails(Again):
    def capture(self, function):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")


def test_what_cannot_be_captured_trains_on_without_and_says_so_once(tmp_path, monkeypatch, caplog):
    plain = trained(tmp_path / "a", monkeypatch, False)
    with caplog.at_level(logging.WARNING, "ptv2_engine"):
        failing = trained(tmp_path / "b", monkeypatch, True, graphs_class=Fails)
    assert logged(failing) == pytest.approx(logged(plain), rel=1e-3)
    said = [r.getMessage() for r in caplog.records if "CUDA graphs" in r.getMessage()]
    assert said == ["steps run without CUDA graphs from here on: a step cannot be captured (CUDA error: operation not permitted "
                    "when stream is capturing)"]


@pytest.mark.parametrize("changes, reason", [({"optim": "sgd"}, "sgd"), ({"label_smoothing_factor": 0.1}, "loss"), ({}, "cpu")])
def test_why_there_are_no_graphs(tmp_path, changes, reason):
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **changes)
    assert reason in Trainer(model_of(), args, train_dataset=rows_for_trainer()).graphs_refused


def test_a_batch_of_candidates_goes_without(tmp_path, monkeypatch):
    """GLM's cloze finds the tokens to score by reading the batch back."""
    monkeypatch.setattr(trainer_graphs, "unsupported", lambda *_: None)
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = Trainer(model_of(), args, train_dataset=rows_for_trainer())
    assert trainer.graphed_step(trainer.model, {"target_ids": torch.zeros(3)}, None) is None
    assert "reading the batch back" in trainer.graphs_refused


class NoReadBack(TorchDispatchMode):
    """A stream that is captured may neither be waited for nor be fed from pageable memory."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh", "aten::masked_select",
                            "aten::is_nonzero", "aten::equal"), f"{name} cannot be captured"
        return function(*args, **kwargs or {})


SETUPS = [Setup(tiny_config(family).to_dict(), task=task, lengths=(20, 7, 9), device="cuda", memory=memory)
          for family in ("bert", "deberta-v2", "modernbert")
          for task, memory in (("sequence-classification", "exact"), ("token-classification", "lean"),
                               ("question-answering", "minimal"), ("multiple-choice", "exact"))]


@pytest.mark.parametrize("setup", SETUPS, ids=lambda s: f"{s.config()['model_type']}-{s.task}-{s.memory}")
@pytest.mark.parametrize("prompt", [PromptConfig(4), PromptConfig(4, method="shallow")], ids=["deep", "shallow"])
def test_nothing_in_a_step_reads_back(setup, prompt, monkeypatch):
    """On fake tensors, with the backends of a GPU chosen: what a capture would refuse."""
    monkeypatch.setattr(deberta, "slots_of", functools.cache(deberta.slots_of))       # kept from a run before, as on a GPU
    with FakeTensorMode(), planned_for("cuda"):
        workload = Workload(replace(setup, prompt=prompt), torch.device("cpu"))
        warm_up(workload, packs=False)
        graphs = StepGraphs(workload.model, workload.optimizer, 1.0, graphs=Again())
        inputs = {k: v for k, v in workload.batch().items()} | {"seed": torch.zeros(1, dtype=torch.long), "spare_tokens": True,
                                                                 "divisor": 2, "num_items_in_batch": torch.ones(())}
        bucket = bucket_of(inputs)
        step = graphed._Gradients(graphs, bucket)
        step.compute()                                         # makes tables that are kept
        with NoReadBack():
            step.compute()
            graphs.clip()
            graphs.step(workload.optimizer.step)
