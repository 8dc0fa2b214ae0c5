"""What the tests of the C++ kernels share: an attention call of either op as one Case, run natively and by its reference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ptv2_engine
from ptv2_engine import _native
from ptv2_engine.ops.disentangled_attention import reference as disentangled_reference
from ptv2_engine.ops.prefix_attention import reference as prefix_reference
from ptv2_engine.testing import assert_error_within, cu_seqlens_of, random_prefix, random_qkv

DTYPES = [torch.float32, torch.bfloat16]
SEED = 2**61 + 12345  # both halves of the key matter


@contextmanager
def native_with_poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN inside, also what C++ allocates. Skips where there are no kernels."""
    if reason := _native.load():
        pytest.skip(reason)  # a run that must have the kernels says so: pytest --expect native
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Case:
    """One attention call with everything its backward needs; disentangled_attention's when it has tables."""

    qkv: Tensor
    prefix: tuple[Tensor, Tensor] | None
    lengths: list[int]
    dout: Tensor
    prompt_ids: Tensor | None = None
    prompt_lengths: Tensor | None = None
    dropout_p: float = 0.0
    prefix_dropout_p: float = 0.0
    site: int = 5
    ranges: tuple[Tensor, Tensor] | None = None                             # context_B, key_range_T2
    tables: tuple[Tensor | None, Tensor | None, Tensor] | None = None       # rel_k_RND, rel_q_RND, slots

    @property
    def scale(self) -> float:
        terms = 1 if self.tables is None else 1 + sum(table is not None for table in self.tables[:2])
        return (self.qkv.shape[-1] * terms) ** -0.5

    @property
    def tail(self) -> tuple:
        """The arguments behind the tensors, in the schemas' order."""
        plain = (cu_seqlens_of(self.lengths), max(self.lengths), self.prompt_ids, self.prompt_lengths, self.scale, self.dropout_p,
                 self.prefix_dropout_p, torch.tensor([SEED]), self.site)
        return plain if self.tables else (*plain, *(self.ranges or (None, None)))


def make_case(lengths: list[int], prompt_length: int, head_dim: int, dtype: torch.dtype, dropout: float = 0.0,
              num_heads: int = 2, num_prompts: int = 1) -> Case:
    prefix = random_prefix(num_prompts, prompt_length, num_heads, head_dim, dtype) if prompt_length else None
    case = Case(random_qkv(lengths, num_heads, head_dim, dtype), prefix, lengths,
                torch.randn(sum(lengths), num_heads, head_dim, generator=torch.Generator().manual_seed(9)).to(dtype),
                dropout_p=dropout, prefix_dropout_p=dropout)
    if num_prompts > 1:
        case.prompt_ids = torch.arange(len(lengths)).mul(7) % num_prompts
        case.prompt_lengths = torch.tensor([prompt_length, 0, *[max(prompt_length - 3, 0)] * (num_prompts - 2)])
    return case


def run_native(case: Case, need_tokens: bool = True, need_prefix: bool = True) -> dict[str, Tensor]:
    name = "disentangled_attention" if case.tables else "prefix_attention"
    tensors = (*case.qkv.unbind(1), *(case.prefix or (None, None)), *(case.tables or ()))
    out, lse = getattr(torch.ops.ptv2, f"{name}_fwd")(*tensors, *case.tail)
    dqkv, dpk, dpv = getattr(torch.ops.ptv2, f"{name}_bwd")(case.dout, *tensors, None, lse, *case.tail, need_tokens, need_prefix)
    return {"out": out, "dqkv": dqkv, "dprefix_k": dpk, "dprefix_v": dpv, "lse": lse}


def run_reference(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = [x.detach().to(dtype).requires_grad_() for x in (case.qkv, *(case.prefix or ()))]
    tensors = [*leaves[0].unbind(1), *(leaves[1:] or (None, None))]
    cu_seqlens, longest, ids, lengths, scale, p, prefix_p, seed, site = case.tail[:9]
    options = {"prompt_ids": ids, "prompt_lengths": lengths, "scale": scale, "dropout_p": p, "prefix_dropout_p": prefix_p,
               "seed": seed, "site": site}
    if case.tables:
        rel_k, rel_q = (table if table is None else table.to(dtype) for table in case.tables[:2])
        out = disentangled_reference(*tensors, rel_k, rel_q, case.tables[2], cu_seqlens, longest, **options)
    else:
        context, key_range = case.ranges or (None, None)
        out = prefix_reference(*tensors, cu_seqlens, longest, **options, context_B=context, key_range_T2=key_range)
    if not out.requires_grad:  # no tokens at all
        return {"out": out}
    grads = torch.autograd.grad(out, leaves, case.dout.to(dtype), allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    return dict(zip(("out", "dqkv", "dprefix_k", "dprefix_v"), (out, *grads), strict=False))


def check_attention(case: Case, actual: dict[str, Tensor]) -> None:
    exact, stock = run_reference(case, torch.float64), run_reference(case, case.qkv.dtype)
    for name in exact:
        assert_error_within(name, actual[name], exact[name], stock[name], roundings=4.0)


def check_only_what_is_needed(case: Case) -> None:
    """Without the tokens' gradients the prefix's are the same bits; without the prefix's the tokens' are."""
    both, prefix, tokens = run_native(case), run_native(case, need_tokens=False), run_native(case, need_prefix=False)
    assert prefix["dqkv"].shape == (0,) and tokens["dprefix_k"].shape == tokens["dprefix_v"].shape == (0,)
    assert torch.equal(both["dqkv"], tokens["dqkv"])
    assert torch.equal(both["dprefix_k"], prefix["dprefix_k"]) and torch.equal(both["dprefix_v"], prefix["dprefix_v"])


def check_same_bits_on_every_thread_count(case: Case) -> None:
    before, runs = torch.get_num_threads(), []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        runs.append(run_native(case))
    torch.set_num_threads(before)
    for other in runs[1:]:
        for name in other:
            assert torch.equal(runs[0][name], other[name]), name


def check_instruction_set(arch: str, file: str) -> None:
    """Run check_all() of a test file in a process that loaded the library of `arch`."""
    if arch not in _native.runnable_archs() or arch == _native.loaded_arch():
        pytest.skip(f"loaded already, not built or not for this CPU: {_native.runnable_archs()}")
    code = (f"import runpy, torch; from ptv2_engine import _native; assert _native.load({arch!r}) is None; "
            f"assert _native.loaded_arch() == {arch!r}; torch.use_deterministic_algorithms(True); "
            f"runpy.run_path({file!r})['check_all']()")
    environment = os.environ | {"PYTHONPATH": str(Path(ptv2_engine.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
