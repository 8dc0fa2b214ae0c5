"""Steps as graphs, without a GPU: what is captured is a tape of operators (tape.py), and a capture's rules are checked on fake
tensors. tests/gpu/test_graphs_on_gpu.py has the real thing."""

from __future__ import annotations

import functools
import logging
import re
from dataclasses import replace

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ptv2_engine import PromptConfig, Trainer, graphed, trainer_graphs, trainer_memory
from ptv2_engine.encoder import deberta
from ptv2_engine.graph_inputs import bucket_of
from ptv2_engine.graphed import GraphedAdamW, StepGraphs
from ptv2_engine.memory import Setup
from ptv2_engine.memory.planner import Workload, warm_up
from ptv2_engine.ops import planned_for
from ptv2_engine.optim import parameter_groups
from ptv2_engine.testing import tiny_config
from tests.tape import Tapes
from tests.test_graph_inputs import LENGTHS, batch_of, filled, model_of


def test_a_tape_freezes_what_a_graph_freezes():
    x, factor, kept = torch.ones(3), [2.0], {}
    replay, product = Tapes().capture(lambda: x.add_(1) * factor[0] + kept.setdefault("table", torch.full((3,), 10.0)))
    assert torch.equal(x, torch.ones(3))                       # nothing has run
    factor[0] = 3.0
    for times in (1, 2):
        replay()
        assert torch.equal(x, torch.full((3,), 1.0 + times)) and torch.equal(product, 2 * x + 10)
    other, out = Tapes().capture(lambda: kept["table"] * 1)    # made inside of the first: another may use its memory
    replay()
    kept["table"].fill_(torch.nan)
    other()
    assert out.isnan().all()


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
        losses.append(graphs.add_gradients(batch, divisor=accumulate))       # looked at later, when others have been made
        if (i + 1) % accumulate == 0:
            graphs.clip()
            if rates:
                graphs.optimizer.param_groups[0]["lr"] = rates[i % len(rates)]
            graphs.optimizer.step()
            graphs.model.zero_grad()                           # as transformers' loop does: .grad is None then
    return [float(loss) for loss in losses]


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
            graphs = StepGraphs(model, optimizer, 0.1, graphs=Tapes())
            losses = graphed_steps(graphs, batches, accumulate)
            held = [step for step in graphs.buckets.values() if step.part.captured]
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
    graphs = StepGraphs(model, GraphedAdamW(parameter_groups(model), lr=1e-2, fused=True), 1.0, graphs=Tapes())
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
    graphs = StepGraphs(model, GraphedAdamW(parameter_groups(model), lr=1e-2, fused=True), 1.0, graphs=Tapes())
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


def trained(folder, monkeypatch, graphs, steps=12, resume=None, graphs_class=Tapes, **changes):
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


def test_an_epochs_last_batch_shares_its_graphs(tmp_path, monkeypatch):
    """42 examples in eights: the sixth batch has two."""
    made = []
    monkeypatch.setattr(graphed._Gradients, "__init__", functools.partialmethod(
        lambda self, owner, bucket, start: (start(self, owner, bucket), made.append(dict(b[:2] for b in bucket.tensors)))[0],
        start=graphed._Gradients.__init__))
    trained(tmp_path, monkeypatch, True)
    assert len(made) > 1 and {bucket["seq_lengths"] for bucket in made} == {(8,)}


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


class Fails(Tapes):
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


def test_graphs_that_do_not_fit_are_left_out(tmp_path, monkeypatch):
    """Where the step alone fits by plan, and both do."""
    monkeypatch.setattr(trainer_graphs, "unsupported", lambda *_: None)
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    budget = Trainer(model_of(), args, train_dataset=rows_for_trainer()).budget
    alone, both = (budget.plan(replace(budget.setup, cuda_graphs=on)).peak for on in (False, True))
    for limit, refused in ((both, None), (both - 1, "memory pool a step takes .* by plan, but .* are free"), (alone, "pool")):
        monkeypatch.setattr(trainer_memory, "available", lambda *_, limit=limit: limit)
        found = Trainer(model_of(), args, train_dataset=rows_for_trainer()).graphs_refused
        assert found is None if refused is None else re.search(refused, found)
    assert Trainer(model_of(), args, train_dataset=rows_for_trainer(), plan_memory=False).graphs_refused is None


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
        graphs = StepGraphs(workload.model, workload.optimizer, 1.0, graphs=Fails())
        inputs = filled(workload.batch(), workload.model) | {"seed": torch.zeros(1, dtype=torch.long), "divisor": 2,
                                                             "num_items_in_batch": torch.ones(())}
        bucket = bucket_of(inputs)
        step = graphed._Gradients(graphs, bucket)
        step.compute()                                         # makes tables that are kept
        with NoReadBack():
            step.compute()
            graphs.clip()
            graphs.step(workload.optimizer.step)
