"""What tests, benchmarks and the self test share: the error budget, ragged batches, poisoned memory, tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def assert_error_within(name: str, actual: Tensor, exact_fp64: Tensor, stock: Tensor | None = None,
                        times: float = 2.0, roundings: float = 1.0) -> None:
    """Assert that `actual` is no further from the truth than `times` what a stock low-precision run gets wrong.

    The budget is times * (max |stock - exact| + roundings * eps(actual.dtype) * max |exact|): `stock` is the same
    computation by plain PyTorch in actual's dtype on the same inputs (None: only the rounding term counts).
    Inputs must be rounded to the low precision before `exact_fp64` is computed from them. All tensors on any device.

    Raises AssertionError naming the tensor, the position, the error and the budget.
    """
    actual, exact = actual.detach(), exact_fp64.detach().to(actual.device)
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: {int((~torch.isfinite(actual)).sum())} non-finite values"
    error = (actual.double() - exact.double()).abs()
    stock_error = 0.0 if stock is None else float((stock.detach().to(actual.device).double() - exact.double()).abs().max())
    scale = float(exact.double().abs().max())
    budget = times * (stock_error + roundings * torch.finfo(actual.dtype).eps * scale)
    worst = int(error.argmax())
    position = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    assert float(error.max()) <= budget, (
        f"{name}: error {float(error.max()):.3e} at {position} (got {float(actual.flatten()[worst]):.6g}, "
        f"exact {float(exact.flatten()[worst]):.6g}) > budget {budget:.3e} = {times} x (stock {stock_error:.3e} + rounding)")


def cu_seqlens_of(lengths: list[int], device: str | torch.device = "cpu") -> Tensor:
    """int32 [B+1] offsets of sequences of the given lengths (FlashAttention's varlen convention)."""
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32, device=device)


def random_qkv(lengths: list[int], num_heads: int, head_dim: int, dtype: torch.dtype = torch.float32,
               seed: int = 0, device: str | torch.device = "cpu") -> Tensor:
    """qkv [T, 3, N, D] with q, k, v as the three slices of one buffer, as the encoder makes them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), 3, num_heads, head_dim, generator=generator).to(device, dtype)


def random_prefix(num_prompts: int, prompt_length: int, num_heads: int, head_dim: int,
                  dtype: torch.dtype = torch.float32, seed: int = 1,
                  device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """prefix_k, prefix_v [K, P, N, D]."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, num_prompts, prompt_length, num_heads, head_dim, generator=generator).to(device, dtype)
    return both[0].contiguous(), both[1].contiguous()


@contextmanager
def poisoned_memory(value: float = float("nan")) -> Iterator[None]:
    """Fresh floating-point memory holds `value` inside, so that a row a kernel forgot is seen (zeroed memory hides it)."""
    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            fresh = make(*args, **kwargs)
            if type(fresh) is Tensor and fresh.is_floating_point() and fresh.device.type != "meta" and not fresh.requires_grad:
                fresh.fill_(value)
            return fresh
        return wrapper

    owners = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]
    originals = [getattr(owner, name) for owner, name in owners]
    for (owner, name), make in zip(owners, originals, strict=True):
        setattr(owner, name, filled(make))
    try:
        yield
    finally:
        for (owner, name), make in zip(owners, originals, strict=True):
            setattr(owner, name, make)


def tiny_config(family: str = "bert", **overrides: Any) -> Any:
    """A transformers config of a tiny random model: 3 layers, hidden 64, 4 heads, vocabulary 120, 80 positions.

    DeBERTa v1 clamps distances at 32; "deberta-v2" is v3's kind (log buckets, shared projections, normed table).
    """
    import transformers

    classes = {"bert": "BertConfig", "roberta": "RobertaConfig", "xlm-roberta": "XLMRobertaConfig",
               "electra": "ElectraConfig", "camembert": "CamembertConfig", "deberta": "DebertaConfig",
               "deberta-v2": "DebertaV2Config", "modernbert": "ModernBertConfig"}
    relative: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False,
                                "type_vocab_size": 0}
    own: dict[str, dict[str, Any]] = {"electra": {"embedding_size": 32}, "deberta": relative | {"max_relative_positions": 32},
           "deberta-v2": relative | {"position_buckets": 16, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
           "modernbert": {"local_attention": 12, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}}
    settings = {"vocab_size": 120, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
                "intermediate_size": 128, "max_position_embeddings": 80, "type_vocab_size": 2, "initializer_range": 0.2,
                "pad_token_id": 1 if family in ("roberta", "xlm-roberta", "camembert") else 0}
    return getattr(transformers, classes[family])(**settings | own.get(family, {}) | overrides)


def tiny_model(family: str = "bert", head: str | None = None, seed: int = 0, **overrides: Any) -> Any:
    """A tiny random transformers model in eval mode with eager attention; head "SequenceClassification" etc., None = bare.

    Biases and LayerNorm parameters are randomised too: at their initial 0 and 1 they would hide a missing term.
    """
    import transformers

    torch.manual_seed(seed)
    config = tiny_config(family, **overrides)
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def prefix_cache(rows_PW: Tensor, config: Any, batch_size: int) -> Any:
    """past_key_values for a transformers encoder from prompt rows [P, 2LH] in the published layout, as PEFT makes them.

    Differentiable in rows_PW. config: the transformers config (layers, heads).
    """
    from transformers import DynamicCache, EncoderDecoderCache

    P, heads = rows_PW.shape[0], config.num_attention_heads
    shaped = rows_PW.view(P, config.num_hidden_layers, 2, heads, -1).permute(1, 2, 3, 0, 4)      # [L, 2, N, P, D]
    cache = DynamicCache()
    for layer in range(config.num_hidden_layers):
        cache.update(*(x[None].expand(batch_size, -1, -1, -1) for x in shaped[layer]), layer)
    return EncoderDecoderCache(cache, DynamicCache())


def padded_batch(lengths: list[int], vocab_size: int = 120, pad_id: int = 0, types: bool = False,
                 seed: int = 0) -> dict[str, Tensor]:
    """Random right-padded input_ids and attention_mask [B, S] (and token_type_ids), without the special low ids."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    mask = (torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, vocab_size, shape, generator=generator) * mask + pad_id * (1 - mask)
    batch = {"input_ids": ids, "attention_mask": mask}
    if types:
        batch["token_type_ids"] = torch.randint(0, 2, shape, generator=generator) * mask
    return batch


def with_prefix(model: Any, rows_PW: Tensor, batch: dict[str, Tensor], **arguments: Any) -> Any:
    """Run a transformers encoder (bare or the base of a head) with a prefix, as PEFT drives it."""
    B, P = batch["input_ids"].shape[0], rows_PW.shape[0]
    mask = torch.cat((batch["attention_mask"].new_ones(B, P), batch["attention_mask"]), 1)
    return model(**batch | {"attention_mask": mask}, past_key_values=prefix_cache(rows_PW, model.config, B), **arguments)
