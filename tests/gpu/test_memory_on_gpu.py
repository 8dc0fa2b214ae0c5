"""Memory on a CUDA device: predictions against max_memory_allocated, kernels of the policies, streamed weights, steps redone."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from lean_checks import check_int8_norm, check_packed_gelu, triton_functions

from ptv2_engine import PromptConfig, PromptedModel
from ptv2_engine.encoder.glm_sizes import glm_config
from ptv2_engine.encoder.weights import random_encoder
from ptv2_engine.memory import Setup, measure, plan
from ptv2_engine.testing import padded_batch, tiny_config

pytestmark = pytest.mark.gpu


def config_of(family: str) -> dict:
    if family == "glm":
        return glm_config(6, 1024, 16, 2000, 511)
    return tiny_config(family, hidden_size=768, intermediate_size=3072, num_hidden_layers=6, num_attention_heads=12,
                       vocab_size=2000, max_position_embeddings=600).to_dict()


def setup_of(family: str, **changes) -> Setup:
    return Setup(config_of(family), **{"batch_size": 32, "seq_len": 256, "prompt": PromptConfig(16)} | changes)


@pytest.mark.parametrize("memory", ["exact", "lean", "minimal"])
@pytest.mark.parametrize("family", ["bert", "deberta-v2", "modernbert", "glm"])
def test_prediction_and_measurement_agree(family, memory):
    setup = setup_of(family, memory=memory)
    assert plan(setup).peak == pytest.approx(measure(setup, "cuda"), rel=0.02)


@pytest.mark.parametrize("changes", [
    {"frozen_dtype": "int8"}, {"frozen_dtype": "fp8"}, {"frozen_dtype": "nf4"}, {"stream_weights": "host", "memory": "minimal"},
    {"stream_weights": "host", "frozen_dtype": "int8"}, {"dtype": "float32"}, {"task": "token-classification"},
    {"prompt": PromptConfig(16, prompt_layers=2)}, {"prompt": PromptConfig(100, reparameterization="mlp"), "accumulates": True},
], ids=str)
def test_prediction_and_measurement_agree_on_options(changes):
    setup = setup_of("bert", **changes)
    assert plan(setup).peak == pytest.approx(measure(setup, "cuda"), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_of_lean(dtype):
    for T, H in ((1, 64), (333, 1024), (65, 4096), (4, 129)):
        check_int8_norm(triton_functions(), T, H, dtype, 0.1, True, device="cuda")
    for T, F in ((3, 100), (333, 4096)):
        check_packed_gelu(triton_functions(), T, F, dtype, "none", device="cuda")


def model_of(family: str, **placement) -> PromptedModel:
    torch.manual_seed(0)
    encoder, origin = random_encoder(config_of(family), dtype=torch.bfloat16, device="cuda", **placement)
    torch.manual_seed(1)
    return PromptedModel(encoder, origin, PromptConfig(5), num_labels=3).train()


def gradient(model: PromptedModel, policy: str) -> torch.Tensor:
    model.zero_grad()
    model.set_memory(policy)
    torch.manual_seed(2)
    batch = {name: t.cuda() for name, t in padded_batch([70, 200, 1, 120], vocab_size=1900).items()}
    model(**batch, labels=torch.tensor([0, 1, 2, 1], device="cuda"), seed=torch.tensor([5], device="cuda")).loss.backward()
    return model.prompt.bank.grad.clone()


@pytest.mark.parametrize("family", ["bert", "glm", "modernbert"])
@pytest.mark.parametrize("frozen_dtype", [None, "int8", "nf4"])
@pytest.mark.parametrize("policy", ["exact", "lean", "minimal"])
def test_streaming_changes_no_bit(family, frozen_dtype, policy):
    """Six layers through three slots, step after step: a copy that came too early or too late would show."""
    here, streamed = (model_of(family, frozen_dtype=frozen_dtype, stream_weights=s) for s in (None, "host"))
    for _ in range(4):
        assert torch.equal(gradient(streamed, policy), gradient(here, policy))


def test_a_step_that_runs_out_of_memory_on_the_device_is_redone(tmp_path):
    import transformers

    from ptv2_engine import Trainer

    rows = [{"input_ids": [5 + i % 50] * 250, "label": i % 3} for i in range(64)]
    args = transformers.TrainingArguments(str(tmp_path), per_device_train_batch_size=64, max_steps=2, report_to="none",
                                          save_strategy="no", disable_tqdm=True)
    model = model_of("bert")
    fits = plan(replace(setup_of("bert"), batch_size=24, seq_len=250)).peak + torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(fits / torch.cuda.get_device_properties(0).total_memory)
    try:
        trainer = Trainer(model, args, train_dataset=rows, plan_memory=False)
        trainer.train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert trainer.pieces > 1 and trainer.state.global_step == 2
