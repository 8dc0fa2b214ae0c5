"""What other ways of training take, counted on their own code: transformers' model on fake tensors, plain or wrapped by PEFT.

Fine-tuning is stock mixed precision: fp32 weights, bf16 autocast, AdamW. LoRA (rank 8, queries and values) and prefix tuning are
PEFT's on a bf16 backbone, which need no autocast. All are given full sequences without padding and flash attention where
transformers lets a model choose its attention, so they are counted at their best. Nobody else has code for GLM: a BERT of the
same sizes stands in.

A build of torch without CUDA has no fake CUDA tensors, so what a GPU does differently is put in place: dropout keeps a byte an
element (on the CPU it would keep the activation's dtype), and autocast computes LayerNorm and softmax in fp32.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ptv2_engine.encoder import EncoderConfig
from ptv2_engine.memory.planner import CUBLAS_WORKSPACE, CUDA_CONTEXT, Plan, track, warm_up
from ptv2_engine.memory.setup import Setup
from ptv2_engine.memory.tracker import OPTIMIZER, PROMPTS, WEIGHTS, MemoryTracker
from ptv2_engine.model import OF_TOKENS
from ptv2_engine.optim import state_tensors

PEERS = ("fine-tuning", "LoRA", "prefix tuning")


def _attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None,
               dropout: float = 0.0, **_: Any) -> tuple[Tensor, None]:
    """What F.scaled_dot_product_attention runs on a GPU without a mask."""
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout, scale=scaling)[0]
    return out.transpose(1, 2), None


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def _wide(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function as CUDA's autocast runs it: in fp32."""
    @functools.wraps(function)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return function(x, *args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return function(x.float(), *args, **kwargs)

    return run


@contextmanager
def _stock() -> Iterator[None]:
    """Fake tensors for code that was not written for them: modules are made where they stay, copies stay in the same mode, and
    what differs between the CPU and a GPU is as on a GPU."""
    from transformers.initialization import no_init_weights

    mode = FakeTensorMode()
    mode.__deepcopy__ = lambda memo: mode  # type: ignore[attr-defined]
    swaps: list[tuple[Any, str, Any]] = [
        (nn.Module, "to", lambda self, *_, **__: self), (F, "dropout", _dropout), (F, "layer_norm", _wide(F.layer_norm)),
        (F, "softmax", _wide(F.softmax))]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in swaps]
    log = logging.getLogger("torch._subclasses.fake_tensor")            # tells at length of what is tried and does not run
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        for owner, name, new in swaps:
            setattr(owner, name, new)
        with mode, no_init_weights():
            yield
    finally:
        log.setLevel(level)
        for owner, name, old in before:
            setattr(owner, name, old)


def _transformers_config(setup: Setup, sizes: EncoderConfig) -> Any:
    from transformers import AutoConfig

    config = setup.config()
    if sizes.family != "glm":
        kept = {name: value for name, value in config.items() if name not in ("model_type", "dtype", "torch_dtype")}
        return AutoConfig.for_model(config["model_type"], **kept | {"num_labels": setup.num_labels})
    return AutoConfig.for_model(
        "bert", vocab_size=sizes.vocab_size, hidden_size=sizes.hidden_size, num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads, intermediate_size=sizes.ffn_size, max_position_embeddings=2048,
        num_labels=setup.num_labels)


def _model(setup: Setup, sizes: EncoderConfig, dtype: torch.dtype) -> Any:
    import transformers

    transformers.AttentionInterface.register("ptv2_counted", _attention)
    head = "TokenClassification" if setup.task in OF_TOKENS else "SequenceClassification"       # a span's scores are two a token
    auto = getattr(transformers, f"AutoModelFor{head}")
    config = _transformers_config(setup, sizes)
    try:
        return auto.from_config(config, attn_implementation="ptv2_counted", dtype=dtype)
    except ValueError:                              # DeBERTa computes its attention itself
        return auto.from_config(config, dtype=dtype)


def _wrap(model: Any, setup: Setup, peer: str) -> Any:
    import peft

    if peer == "fine-tuning":
        return model
    task = "TOKEN_CLS" if setup.task in OF_TOKENS else "SEQ_CLS"
    if peer == "LoRA":
        targets = {"deberta": ["in_proj"], "deberta-v2": ["query_proj", "value_proj"], "modernbert": ["Wqkv"]}
        return peft.get_peft_model(model, peft.LoraConfig(
            task_type=task, r=8, target_modules=targets.get(model.config.model_type, ["query", "value"])))
    return peft.get_peft_model(model, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=setup.prompt.prompt_length))


class StockWorkload:
    """A model of somebody else's and one batch, for memory.track."""

    def __init__(self, setup: Setup, sizes: EncoderConfig, peer: str, autocast: bool) -> None:
        self.setup = setup
        low = setup.dtype == "bfloat16"
        self.autocast = low and autocast
        dtype = torch.bfloat16 if low and peer != "fine-tuning" else torch.float32
        self.model = _wrap(_model(setup, sizes, dtype), setup, peer).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, 1e-4, fused=True)

    def batch(self) -> dict[str, Any]:
        shape = (self.setup.batch_size, self.setup.seq_len)
        tokens = self.setup.task in OF_TOKENS
        return {"input_ids": torch.full(shape, 5), "labels": torch.zeros(shape if tokens else shape[:1], dtype=torch.long)}

    def step(self, batch: dict[str, Any], after_forward: Callable[[], None] = lambda: None) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            logits = self.model(input_ids=batch["input_ids"]).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, -2).float(), batch["labels"].flatten())
        after_forward()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def mark(self, tracker: MemoryTracker) -> None:
        tracker.mark((p.detach() for p in self.model.parameters() if not p.requires_grad), WEIGHTS)
        tracker.mark(self.model.buffers(), WEIGHTS)
        tracker.mark((p.detach() for p in self.parameters), PROMPTS)
        tracker.mark(state_tensors(self.optimizer), OPTIMIZER)


def plan_peer(setup: Setup, sizes: EncoderConfig, peer: str) -> Plan | str:
    """The peak memory of a step of one of PEERS on a GPU, or why it has none."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    reason = ""
    try:
        # DeBERTa's own code mixes dtypes, so that LoRA on it needs autocast
        for autocast in (True,) if peer == "fine-tuning" else (False, True):
            try:
                return _count(setup, sizes, peer, autocast)
            except ImportError as error:
                return f"{error.name or 'peft'} is not installed"
            except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError) as error:
                reason = reason or (str(error).splitlines()[0][:90] if str(error) else type(error).__name__)
        return f"does not run on {sizes.family} ({reason})"
    finally:
        transformers.logging.set_verbosity(level)


def _count(setup: Setup, sizes: EncoderConfig, peer: str, autocast: bool) -> Plan:
    tracker = MemoryTracker()
    with warnings.catch_warnings(), _stock():
        warnings.simplefilter("ignore")             # of code that asks fake tensors where they are
        workload = StockWorkload(setup, sizes, peer, autocast)
        warm_up(workload, packs=False)
        with tracker:
            peak = track(workload, tracker)
    parts = {name: size for name, size in peak.parts.items() if size}
    parts["workspaces"] = parts.get("workspaces", 0) + CUBLAS_WORKSPACE
    names = {"fine-tuning": "fine-tuning, AdamW", "LoRA": "LoRA r=8 (PEFT)", "prefix tuning": "prefix tuning (PEFT)"}
    with_autocast = " autocast" if workload.autocast else ""
    stand_in = ", on a BERT of these sizes" if sizes.family == "glm" else ""
    tokens = setup.batch_size * setup.seq_len
    return Plan(f"{names[peer]}, {setup.dtype}{with_autocast}{stand_in}", parts, [], 0, tokens, 0.0, CUDA_CONTEXT)
