"""Models at their real size with random weights made on the device, batches of real lengths, and training steps of everybody."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.flex_encoder import FlexEncoder
from ptv2_engine import PromptConfig, PromptedModel
from ptv2_engine.batches import PackedCollator
from ptv2_engine.encoder.glm_sizes import SIZES
from ptv2_engine.encoder.weights import random_encoder
from ptv2_engine.graphed import GraphedAdamW, StepGraphs
from ptv2_engine.optim import adamw, parameter_groups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def config_of(name: str) -> dict[str, Any]:
    """A published model's config.json. MiniLM: 6 layers of 384, as all-MiniLM-L6."""
    import transformers

    if name.lower() in SIZES:
        return SIZES[name.lower()]
    bert = lambda layers, hidden, heads: transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden)
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False, "type_vocab_size": 0,
                "position_buckets": 256, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
    makers: dict[str, Callable[[], Any]] = {
        "MiniLM": lambda: bert(6, 384, 12), "BERT-base": lambda: bert(12, 768, 12), "BERT-large": lambda: bert(24, 1024, 16),
        "RoBERTa-large": lambda: transformers.RobertaConfig(num_hidden_layers=24, hidden_size=1024, num_attention_heads=16,
                                                            intermediate_size=4096, vocab_size=50265, type_vocab_size=1,
                                                            max_position_embeddings=514),
        "DeBERTa-xlarge": lambda: transformers.DebertaV2Config(num_hidden_layers=24, hidden_size=1536, num_attention_heads=24,
                                                               intermediate_size=6144, vocab_size=128100, **relative)}
    return makers[name]().to_dict()


def our_model(config: dict[str, Any], P: int, dtype: torch.dtype, device: str, **options: Any) -> PromptedModel:
    torch.manual_seed(0)
    encoder, origin = random_encoder(config, dtype=dtype, device=device)
    return PromptedModel(encoder, origin, PromptConfig(P), num_labels=2, **options).train()


def batch_of(lengths: Sequence[int], vocab_size: int, multiple: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same examples on the host: packed (PackedCollator's), and padded to the longest, up to a multiple of tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(1000, vocab_size, (n,), generator=generator).tolist(), "labels": i % 2}
            for i, n in enumerate(lengths)]
    longest = -(-max(lengths) // multiple) * multiple
    padded = {"input_ids": torch.tensor([r["input_ids"] + [0] * (longest - len(r["input_ids"])) for r in rows]),
              "attention_mask": (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long(),
              "labels": torch.tensor([r["labels"] for r in rows])}
    return PackedCollator()(rows), padded


def moved(batch: dict[str, Any], device: str) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def stepper(model: Callable[..., Any], parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, batch: dict[str, Any],
            autocast: bool = False) -> Callable[[], None]:
    """A function that takes one training step on the batch: forward, loss, backward, clipping, AdamW."""

    def step() -> None:
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)                  # nothing is left for a step that shares the parameters

    return step


def our_step(model: PromptedModel, packed: dict[str, Any]) -> Callable[[], None]:
    return stepper(model, list(model.trained_parameters().values()), adamw(model, 1e-3), moved(packed, str(model.device)))


def our_replayed_step(model: PromptedModel, packed: dict[str, Any]) -> Callable[[], None]:
    """The same step through CUDA graphs, as the Trainer takes it: from a batch on the host. Raises where it is not captured."""
    graphs = StepGraphs(model, GraphedAdamW(parameter_groups(model), lr=1e-3, fused=True), 1.0)

    def step() -> None:
        graphs.add_gradients(packed)
        graphs.clip()
        graphs.optimizer.step()

    for _ in range(3):
        step()
    if graphs.failed is not None or not any(s.part.captured for s in graphs.buckets.values()):
        raise RuntimeError(graphs.failed or "nothing was captured")
    return step


def peft_model(base: nn.Module, P: int) -> nn.Module:
    from peft import PrefixTuningConfig, get_peft_model

    return get_peft_model(base, PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P)).train()


def stock_model(config: dict[str, Any], dtype: torch.dtype, device: str) -> nn.Module:
    """transformers' classifier of the same shape (BERT, RoBERTa, DeBERTa), random weights, SDPA where it has that."""
    import transformers

    torch.manual_seed(0)
    known = transformers.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
    with torch.device(device):
        return transformers.AutoModelForSequenceClassification.from_config(
            known, dtype=dtype, attn_implementation="eager" if "deberta" in known.model_type else "sdpa")


def peft_step(base: nn.Module, ours: PromptedModel, packed: dict[str, Any], padded: dict[str, Any],
              compiled: bool = False) -> Callable[[], None]:
    """PEFT prefix tuning in its best practice: weights in the compute dtype, padded to the longest of the batch, SDPA. base: the
    transformers model that ours has its weights of. Raises AssertionError where the two losses differ."""
    packed, padded = (moved(batch, str(ours.device)) for batch in (packed, padded))
    model = peft_model(copy.deepcopy(base), ours.prompt_config.prompt_length).to(ours.device)
    check_losses(ours, model, packed, padded, 2e-2)
    trained = [p for p in model.parameters() if p.requires_grad]
    call = torch.compile(model, mode="reduce-overhead") if compiled else model          # its CUDA graphs, as ours has
    return stepper(call, trained, torch.optim.AdamW(trained, 1e-3, fused=True), padded)


def flex_step(model: PromptedModel, packed: dict[str, Any], compiled: bool = True) -> Callable[[], None]:
    """A packed encoder on FlexAttention with our model's weights: what a kernel-minded user can assemble (flex_encoder.py).
    Raises AssertionError where the two losses differ."""
    packed = moved(packed, str(model.device))
    peer = FlexEncoder(model, packed, compiled)
    with torch.no_grad():
        same_loss(*(float(loss) for loss in (model.eval()(**packed).loss, peer.eval()())), 2e-2)
    model.train()
    peer.train()
    optimizer = torch.optim.AdamW(list(peer.parameters()), 1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        peer().backward()
        torch.nn.utils.clip_grad_norm_(list(peer.parameters()), 1.0)
        optimizer.step()

    return step


def check_losses(ours: PromptedModel, peft: nn.Module, packed: dict[str, Any], padded: dict[str, Any], tolerance: float) -> None:
    """Same prompt, same head, dropout off: the two must compute the same thing before they are timed."""
    head = ours.head.state_dict()                  # BERT's classifier is a Linear, RoBERTa's has a dense in front of it
    with torch.no_grad():
        peft.prompt_encoder["default"].embedding.weight.copy_(ours.prompt.bank[0])
        for name, p in peft.base_model.classifier.modules_to_save["default"].named_parameters():
            p.copy_(head[name.replace("out_proj", "classifier") if "." in name else f"classifier.{name}"])
        ours.eval()
        peft.eval()
        a, b = float(ours(**packed).loss), float(peft(**padded).loss)
        ours.train()
        peft.train()
    same_loss(a, b, tolerance)


def same_loss(ours: float, theirs: float, tolerance: float) -> None:
    assert abs(ours - theirs) <= tolerance * abs(theirs), f"the peer's loss is {theirs}, ours {ours}"


def with_weights_of(base: nn.Module, P: int, dtype: torch.dtype, device: str) -> tuple[PromptedModel, nn.Module]:
    """Ours and PEFT's on the weights of one transformers model."""
    ours = PromptedModel.from_pretrained(base, num_labels=2, prompt=PromptConfig(P), dtype=dtype, device=device).train()
    return ours, peft_model(copy.deepcopy(base), P).to(device)
