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
from ptv2_engine.optim import adamw
from ptv2_engine.packing import PackedCollator

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


def stepper(model, parameters, optimizer, inputs, autocast=None):
    """A function that takes one training step, on the next of `inputs` each time."""
    state = {"next": 0}

    def step():
        batch = inputs[state["next"] % len(inputs)]
        state["next"] += 1
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=autocast is not None):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def bare_products(inputs, dtype):
    """The matrix products of our step and nothing else: forward and dX, weights packed, the shapes the engine really runs."""
    weights = {}
    for name, (rows_out, rows_in) in {"qkv": (2304, 768), "out": (768, 768), "up": (3072, 768), "down": (768, 3072)}.items():
        w = torch.randn(rows_out, rows_in, dtype=dtype)
        weights[name] = (
            torch.ops.mkldnn._reorder_linear_weight(w, 2048),
            torch.ops.mkldnn._reorder_linear_weight(w.t().contiguous(), 2048),
        )
    state = {"next": 0}
    linear = torch.ops.mkldnn._linear_pointwise
    buffers = {}

    def rows(T, width):
        return buffers.setdefault((T, width), torch.randn(T, width, dtype=dtype))

    def run():
        T = inputs[state["next"] % len(inputs)]["input_ids"].shape[0]
        state["next"] += 1
        for layer in range(12):
            behind = BATCH if layer == 11 else T       # the last layer computes first tokens only behind its attention
            for name, count in (("qkv", T), ("out", behind), ("up", behind), ("down", behind)):
                forward, backward = weights[name]
                out = linear(rows(count, 3072 if name == "down" else 768), forward, None, "none", [], "")
                if not (layer == 0 and name == "qkv"):  # nothing below the first layer's attention is trained
                    linear(out, backward, None, "none", [], "")

    return run


@pytest.mark.parametrize("data", ["mrpc", "rte"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cpu_step(compare, dtype, data):
    base = bert_base()
    inputs = list(batches(data, 4, "cpu"))
    ours = PromptedModel.from_pretrained(base, num_labels=2, prompt=PromptConfig(PROMPT), dtype=DTYPES[dtype]).train()
    peft = peft_model(base, "cpu").train()
    check_losses(ours, peft, inputs[0], 1e-4 if dtype == "fp32" else 2e-2)
    tokens = sum(p["input_ids"].shape[0] for p, _ in inputs) / len(inputs)
    padded = sum(p["input_ids"].numel() for _, p in inputs) / len(inputs)
    trained = [p for p in peft.parameters() if p.requires_grad]
    compare(f"train step  BERT-base B=32 P=20 {data} {dtype}", {
        "ptv2": stepper(ours, list(ours.trained_parameters().values()), adamw(ours, 1e-3), [p for p, _ in inputs]),
        "PEFT padded" + (" bf16 autocast" if dtype == "bf16" else ""): stepper(
            peft, trained, torch.optim.AdamW(trained, 1e-3), [p for _, p in inputs], autocast=True if dtype == "bf16" else None),
        "bare products": bare_products([p for p, _ in inputs], DTYPES[dtype]),
    }, rounds=4, warmup=1, tokens=tokens, padded_tokens=padded, batch=BATCH, prompt_length=PROMPT)


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
    inputs = list(batches(data, 8, "cuda"))
    ours = PromptedModel.from_pretrained(
        base, num_labels=2, prompt=PromptConfig(PROMPT), dtype=torch.bfloat16, device="cuda"
    ).train()
    peft = peft_model(base, "cuda").train()
    check_losses(ours, peft, inputs[0], 2e-2)
    trained = [p for p in peft.parameters() if p.requires_grad]
    tokens = sum(p["input_ids"].shape[0] for p, _ in inputs) / len(inputs)
    torch.cuda.reset_peak_memory_stats()
    step = stepper(ours, list(ours.trained_parameters().values()), adamw(ours, 1e-3), [p for p, _ in inputs])
    step()
    memory = torch.cuda.max_memory_allocated()
    compare(
        f"train step  BERT-base B=32 P=20 {data} bf16",
        {
            "ptv2": step,
            "PEFT padded bf16 autocast": stepper(
                peft, trained, torch.optim.AdamW(trained, 1e-3, fused=True), [p for _, p in inputs], autocast=True
            ),
        },
        rounds=24,
        warmup=8,
        tokens=tokens,
        peak_memory_bytes=memory,
        batch=BATCH,
        prompt_length=PROMPT,
    )
