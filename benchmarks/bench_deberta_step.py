"""A full training step of DeBERTa-base (v1 and v3), batch 32, P = 20, real length distributions; packed against padded.

The peer is stock transformers with a prefix patched in (deberta_peer.py), on the same weights and examples. Before timing, both
losses are compared with dropout off and the same prompt and head.
"""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.bench_train_step import PROMPT, median_batch
from benchmarks.deberta_peer import PatchedDeberta
from benchmarks.models import DTYPES, batch_of, moved, our_replayed_step, our_step, stepper
from benchmarks.shapes import full
from ptv2_engine import PromptConfig, PromptedModel

RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False, "type_vocab_size": 0,
            "layer_norm_eps": 1e-7}


def deberta_base(version: str):
    """Random weights in the published shape; the vocabulary, which no step multiplies with, is v1's in both."""
    import transformers

    torch.manual_seed(0)
    if version == "v1":
        return transformers.DebertaForSequenceClassification(transformers.DebertaConfig(**RELATIVE, max_relative_positions=-1))
    return transformers.DebertaV2ForSequenceClassification(transformers.DebertaV2Config(
        **RELATIVE, vocab_size=50265, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        position_buckets=256, share_att_key=True, norm_rel_ebd="layer_norm"))


def models(version: str, dtype: torch.dtype, device: str):
    """(ours, peer) in training mode with equal prompts and heads."""
    base = deberta_base(version)
    ours = PromptedModel.from_pretrained(base, num_labels=2, prompt=PromptConfig(PROMPT), dtype=dtype, device=device)
    peer = PatchedDeberta(copy.deepcopy(base), PROMPT).to(device)
    peer.take_trained(ours)
    return ours, peer


def check_losses(ours, peer, batch, tolerance: float) -> None:
    ours.eval()
    peer.eval()
    with torch.no_grad():
        a, b = float(ours(**batch[0]).loss), float(peer(**batch[1]).loss)
    assert abs(a - b) <= tolerance * abs(b), (a, b)
    ours.train()
    peer.train()


def run(compare, version: str, data: str, dtype: str, device: str, rounds: int, warmup: int) -> None:
    on_host, padded = batch_of(median_batch(data), 30000, multiple=8 if device == "cuda" else 1)
    packed, padded = (moved(batch, device) for batch in (on_host, padded))
    ours, peer = models(version, DTYPES[dtype], device)
    check_losses(ours, peer, (packed, padded), 1e-4 if dtype == "fp32" else 2e-2)
    trained, on_gpu = [p for p in peer.parameters() if p.requires_grad], device == "cuda"
    optimizer = torch.optim.AdamW(trained, 1e-3, fused=on_gpu)
    half = dtype == "bf16"
    if on_gpu and half:                                        # its weights as ours; autocast does the rest
        for p in peer.parameters():
            p.data = p.data if p.requires_grad else p.data.bfloat16()
    compare(
        f"train step  DeBERTa-{version}-base B=32 P={PROMPT} {data} {dtype}",
        {"ptv2": our_replayed_step(ours, on_host) if on_gpu else our_step(ours, packed),
         "patched transformers" + (" bf16 autocast" if half else ""): stepper(peer, trained, optimizer, padded,
                                                                               half)},
        rounds=rounds, warmup=warmup, tokens=packed["input_ids"].shape[0], padded_tokens=padded["input_ids"].numel(),
        prompt_length=PROMPT, device=device, op="train_step", model=f"DeBERTa-{version}-base", lengths=data, dtype=dtype,
        **{"pass": "step"},
    )


@full
@pytest.mark.parametrize("data", ["mrpc", "rte"])
@pytest.mark.parametrize("version", ["v1", "v3"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cpu_step(compare, dtype, version, data):
    run(compare, version, data, dtype, "cpu", rounds=4, warmup=1)


@pytest.mark.gpu
@pytest.mark.parametrize("data", ["mrpc", "rte"])
@pytest.mark.parametrize("version", ["v1", "v3"])
def test_gpu_step(compare, version, data):
    run(compare, version, data, "bf16", "cuda", rounds=24, warmup=8)
