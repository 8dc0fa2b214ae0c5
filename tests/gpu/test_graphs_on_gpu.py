"""CUDA graphs on the device: a replayed step is the step to the last bit, for every task; the Trainer replays or says why not."""

from __future__ import annotations

import gc

import pytest
import torch
import transformers

from ptv2_engine import PromptConfig, PromptedModel, Trainer
from ptv2_engine.graphed import GraphedAdamW, StepGraphs, recorded
from ptv2_engine.memory import Setup, plan
from ptv2_engine.memory.planner import Workload
from ptv2_engine.optim import parameter_groups
from ptv2_engine.testing import tiny_config, tiny_model
from tests.test_graph_inputs import LENGTHS, batch_of
from tests.test_graphed import rows_for_trainer

pytestmark = pytest.mark.gpu
TASKS = ["sequence-classification", "token-classification", "question-answering", "multiple-choice"]


class Uncaptured:
    """Steps on the same filled-up batches, without graphs."""

    def __init__(self, *_):
        self.pool = None

    def capture(self, function):
        raise RuntimeError("not captured")


def steps_of(graphs_class, family, task, memory, prompt, accumulate=1, count=12):
    torch.manual_seed(1)
    labels = {"num_labels": 2} if task.startswith(("sequence", "token")) else {}
    model = PromptedModel.from_pretrained(tiny_model(family), task=task, prompt=prompt, dtype=torch.bfloat16, device="cuda",
                                          memory=memory, **labels).train()
    optimizer = GraphedAdamW(parameter_groups(model, 0.01, head_lr=1e-3), lr=1e-2, fused=True)
    graphs = StepGraphs(model, optimizer, 0.5, examples=6, graphs=None if graphs_class is None else graphs_class())
    losses = []
    for i in range(count):
        losses.append(graphs.add_gradients(batch_of(LENGTHS[i % len(LENGTHS)], task, seed=i), num_items=4, divisor=1))
        if (i + 1) % accumulate == 0:
            losses.append(graphs.clip())
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + i)
            optimizer.step()
    captured = sum(step.part.captured for step in graphs.buckets.values())
    state = [t.clone() for s in optimizer.state.values() for t in s.values()]
    return torch.stack(losses), [*model.trained_parameters().values(), *state], captured


@pytest.mark.parametrize("family, task, memory, prompt", [
    *(("bert", task, "exact", PromptConfig(4)) for task in TASKS),
    ("roberta", "sequence-classification", "lean", PromptConfig(4, prompt_layers=2)),
    ("bert", "token-classification", "minimal", PromptConfig(4, reparameterization="mlp")),
    ("bert", "sequence-classification", "exact", PromptConfig(4, method="shallow", reparameterization="mlp")),
    ("deberta", "sequence-classification", "exact", PromptConfig(4)), ("deberta-v2", TASKS[2], "lean", PromptConfig(4)),
    ("modernbert", "sequence-classification", "exact", PromptConfig(4))])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_replays_equal_steps_without_graphs_bit_by_bit(family, task, memory, prompt, accumulate):
    """Dropout on, two rates, clipping, momentum; and a second run of replays equals the first."""
    plain = steps_of(Uncaptured, family, task, memory, prompt, accumulate)
    for _ in range(2):
        replayed = steps_of(None, family, task, memory, prompt, accumulate)
        assert replayed[2] >= 2 and plain[2] == 0
        assert torch.equal(plain[0], replayed[0])
        for one, other in zip(plain[1], replayed[1], strict=True):
            assert torch.equal(one, other)


def trained(folder, model=None, **options):
    torch.manual_seed(1)
    model = model or PromptedModel.from_pretrained(tiny_model("bert"), num_labels=2, prompt=PromptConfig(4), device="cuda")
    args = transformers.TrainingArguments(str(folder), per_device_train_batch_size=8, max_steps=24, learning_rate=1e-2,
                                          logging_steps=1, report_to=[], disable_tqdm=True, seed=3, save_strategy="no")
    trainer = Trainer(model, args, train_dataset=rows_for_trainer(60), **options)          # the last batch of an epoch has four
    seen = []
    drop = trainer.drop_graphs
    held = lambda: trainer.graphs and sum(step.part.captured for step in trainer.graphs.buckets.values())
    trainer.drop_graphs = lambda reason=None: (seen.append((held(), reason)), drop(reason))[1]
    trainer.train()
    return trainer, seen


def test_the_trainer_replays(tmp_path):
    graphed, seen = trained(tmp_path / "a")
    plain, _ = trained(tmp_path / "b", cuda_graphs=False)
    again, _ = trained(tmp_path / "c")
    assert graphed.graphs_refused is None and seen[0][1] is None and seen[0][0] >= 1          # that many buckets' graphs
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (graphed, plain, again)]
    assert losses[0] == losses[2]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_a_failed_capture_trains_on(tmp_path, monkeypatch):
    """A model that reads a value back cannot be captured; the process is fine afterwards."""
    torch.manual_seed(1)
    model = PromptedModel.from_pretrained(tiny_model("bert"), num_labels=2, prompt=PromptConfig(4), device="cuda")
    forward = model.head.forward
    model.head.forward = lambda x, *seed: forward(x * float(x.sum() != 0), *seed)
    trainer, seen = trained(tmp_path, model)
    assert "waits for the device" in trainer.graphs_refused
    assert trainer.state.global_step == 24 and torch.isfinite(torch.ones(3, device="cuda").sum())


def test_a_capture_that_breaks_off_leaves_the_process_as_it_was():
    x = torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError):
        recorded(lambda: x[x.nonzero()], torch.cuda.graph_pool_handle())
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    kept = torch.nn.functional.dropout(torch.ones(1000, device="cuda"), 0.5)           # the generator is free again
    assert 0 < int((kept > 0).sum()) < 1000
    replay, total = recorded(lambda: x.sum() * 2, torch.cuda.graph_pool_handle())
    replay()
    assert float(total) == 8.0


def test_memory_is_given_back(tmp_path):
    trained(tmp_path)
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    trained(tmp_path)
    assert torch.cuda.memory_reserved() <= before + (64 << 20)


@pytest.mark.parametrize("memory", ["exact", "minimal"])
def test_the_pool_takes_what_is_planned(memory):
    """What the driver is asked for in all, by steps that are captured and ones that are not: within a tenth and some blocks."""
    config = tiny_config("bert", hidden_size=768, intermediate_size=3072, num_hidden_layers=6, num_attention_heads=12,
                         vocab_size=2000, max_position_embeddings=600).to_dict()
    setup = Setup(config, prompt=PromptConfig(16), memory=memory, lengths=(256,) * 32, cuda_graphs=True)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    workload = Workload(setup, torch.device("cuda"))
    graphs = StepGraphs(workload.model, GraphedAdamW(parameter_groups(workload.model), lr=1e-3, fused=True), 1.0)
    batch = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in workload.batch().items()}
    for _ in range(3):
        graphs.add_gradients(batch)
        graphs.clip()
        graphs.optimizer.step()
    assert graphs.failed is None and graphs.buckets
    taken, planned = torch.cuda.memory_reserved() - before, plan(setup).peak
    graphs.release()
    assert taken <= 1.1 * planned + (64 << 20), (taken, planned)
