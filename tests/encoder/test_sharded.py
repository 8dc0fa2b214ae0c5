"""FSDP2: a layer's weights are sharded when it is not at work. One process is enough to see who reads them at the wrong time."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ptv2_engine import PromptedModel
from ptv2_engine.testing import padded_batch
from tests.encoder.test_memory_policies import model_of


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def step(model: PromptedModel, policy: str) -> tuple[torch.Tensor, torch.Tensor]:
    model.train().zero_grad()
    model.set_memory(policy)
    torch.manual_seed(0)
    out = model(**padded_batch([7, 20, 1, 12]), labels=torch.tensor([0, 1, 2, 1]), seed=torch.tensor([5]))
    out.loss.backward()
    return out.loss.detach(), model.prompt.bank.grad.clone()


@pytest.mark.parametrize("policy", ["exact", "lean", "minimal"])
@pytest.mark.parametrize("family", ["bert", "deberta-v2", "modernbert", "glm"])
def test_layers_sharded_by_fsdp2_compute_the_same(one_process, family, policy):
    from torch.distributed.fsdp import fully_shard

    whole, sharded = model_of(family), model_of(family)
    for layer in sharded.encoder.layers:
        fully_shard(layer)
    for _ in range(2):
        for a, b in zip(step(sharded, policy), step(whole, policy), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
