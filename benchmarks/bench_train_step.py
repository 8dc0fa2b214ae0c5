"""A full training step (forward, loss, backward, clipping, AdamW): BERT-base shape, batch 32, P = 20, real length distributions.

Peers on the same weights and the same batches: PEFT prefix tuning, padded to the longest of each batch (its best practice);
and the bare oneDNN matrix products of our step with packed weights, which no training step can beat. Lengths are those of
512 MRPC and 512 RTE pairs (lengths.json). Dropout is on as in training for both; the losses are compared with dropout off first.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from ptv2_engine import PromptConfig, PromptedModel
from ptv2_engine.batches import PackedCollator
from ptv2_engine.optim import adamw

BATCH, PROMPT = 32, 20
LENGTHS = json.loads((Path(__file__).parent / "lengths.json").read_text())
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def bert_base():
    import transformers

    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig())


def batches(name: str, count: int, device: str):
    """(packed, padded) inputs of the same examples."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        lengths = LENGTHS[name][i * BATCH:(i + 1) * BATCH]
        rows = [{"input_ids": torch.randint(1000, 30000, (n,), generator=generator).tolist(), "labels": j % 2}
                for j, n in enumerate(lengths)]
        longest = max(lengths)
        padded = {"input_ids": torch.tensor([r["input_ids"] + [0] * (longest - len(r["input_ids"])) for r in rows]),
                  "attention_mask": (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long(),
                  "labels": torch.tensor([r["labels"] for r in rows])}
        packed = PackedCollator()(rows)
        yield tuple({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in (packed, padded))


def peft_model(base, device):
    from peft import PrefixTuningConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(base), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=PROMPT))
    return model.to(device)


def median_batch(name: str, device: str):
    """The batch of 32 whose padding (padded cells over tokens) is the median of 16: its (packed, padded) inputs."""
    groups = [LENGTHS[name][i : i + BATCH] for i in range(0, 16 * BATCH, BATCH)]
    order = sorted(range(16), key=lambda i: max(groups[i]) * BATCH / sum(groups[i]))
    return list(batches(name, 16, device))[order[8]]


def stepper(model, parameters, optimizer, batch, autocast=None):
    """A function that takes one training step on the batch."""

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=autocast is not None):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def bare_products(T, dtype):
    """The matrix products of our step and nothing else: forward and dX, weights packed, the shapes the engine really runs."""
    weights = {}
    for name, (rows_out, rows_in) in {"qkv": (2304, 768), "out": (768, 768), "up": (3072, 768), "down": (768, 3072)}.items():
        w = torch.randn(rows_out, rows_in, dtype=dtype)
        weights[name] = [torch.ops.mkldnn._reorder_linear_weight(x, 2048) for x in (w, w.t().contiguous())]
    linear = torch.ops.mkldnn._linear_pointwise
    inputs = {(count, width): torch.randn(count, width, dtype=dtype) for count in (T, BATCH) for width in (768, 3072)}

    def run():
        for layer in range(12):
            behind = BATCH if layer == 11 else T  # the last layer computes first tokens only behind its attention
            for name, count in (("qkv", T), ("out", behind), ("up", behind), ("down", behind)):
                forward, backward = weights[name]
                out = linear(inputs[count, 3072 if name == "down" else 768], forward, None, "none", [], "")
                if not (layer == 0 and name == "qkv"):  # nothing below the first layer's attention is trained
                    linear(out, backward, None, "none", [], "")

    return run


@pytest.mark.parametrize("data", ["mrpc", "rte"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cpu_step(compare, dtype, data):
    base = bert_base()
    packed, padded = median_batch(data, "cpu")
    ours = PromptedModel.from_pretrained(base, num_labels=2, prompt=PromptConfig(PROMPT), dtype=DTYPES[dtype]).train()
    peft = peft_model(base, "cpu").train()
    check_losses(ours, peft, (packed, padded), 1e-4 if dtype == "fp32" else 2e-2)
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3)
    half = dtype == "bf16"
    T = packed["input_ids"].shape[0]
    compare(
        f"train step  BERT-base B=32 P=20 {data} {dtype}",
        {
            "ptv2": stepper(ours, list(ours.trained_parameters().values()), adamw(ours, 1e-3), packed),
            "PEFT padded" + (" bf16 autocast" if half else ""): stepper(peft, trained, optimizer, padded, True if half else None),
            "bare products": bare_products(T, DTYPES[dtype]),
        },
        rounds=4, warmup=1, tokens=T, padded_tokens=padded["input_ids"].numel(), batch=BATCH, prompt_length=PROMPT,
    )


def check_losses(ours, peft, batch, tolerance):
    """Same prompt, same head, dropout off: the two must compute the same thing before they are timed."""
    with torch.no_grad():
        for p, q in ((peft.prompt_encoder["default"].embedding.weight, ours.prompt.bank[0]),
                     *((dict(peft.base_model.classifier.modules_to_save["default"].named_parameters())[w],
                        getattr(ours.head.classifier, w)) for w in ("weight", "bias"))):
            p.copy_(q)
        ours.eval()
        peft.eval()
        a, b = float(ours(**batch[0]).loss), float(peft(**batch[1]).loss)
        ours.train()
        peft.train()
    assert abs(a - b) <= tolerance * abs(b), (a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("data", ["mrpc", "rte"])
def test_gpu_step(compare, data):
    base = bert_base()
    packed, padded = median_batch(data, "cuda")
    prompt = PromptConfig(PROMPT)
    ours = PromptedModel.from_pretrained(base, num_labels=2, prompt=prompt, dtype=torch.bfloat16, device="cuda").train()
    peft = peft_model(base, "cuda").train()
    check_losses(ours, peft, (packed, padded), 2e-2)
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3, fused=True)
    step = stepper(ours, list(ours.trained_parameters().values()), adamw(ours, 1e-3), packed)
    torch.cuda.reset_peak_memory_stats()
    step()
    memory = torch.cuda.max_memory_allocated()
    compare(
        f"train step  BERT-base B=32 P=20 {data} bf16",
        {"ptv2": step, "PEFT padded bf16 autocast": stepper(peft, trained, optimizer, padded, True)},
        rounds=24, warmup=8, tokens=packed["input_ids"].shape[0], peak_memory_bytes=memory, batch=BATCH, prompt_length=PROMPT,
    )
