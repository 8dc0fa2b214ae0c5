"""Which backend runs, and the words of the errors."""

from __future__ import annotations

import pytest
import torch

from ptv2_engine import ops
from ptv2_engine.errors import BackendError, InputError
from ptv2_engine.testing import cu_seqlens_of, random_prefix, random_qkv


def test_unknown_backend_is_named():
    with pytest.raises(BackendError, match=r"backend 'cudnn' does not exist; choose one of native, cuda, triton, reference"), \
            ops.use_backend("cudnn"):
        pass


def test_a_backend_that_was_asked_for_never_falls_back():
    x = torch.randn(3, 8, dtype=torch.float64)
    with (
        ops.use_backend("native"),
        pytest.raises(BackendError, match=r"add_norm: backend 'native'.*float64 \(has float32, bfloat16\)"),
    ):
        ops.add_norm(x, x, x[0], x[0], 1e-5)


def test_fp64_runs_on_the_reference_and_says_why():
    choice = ops.backend_for("prefix_attention", "cpu", torch.float64)
    assert choice.backend == "reference"
    assert any("float64" in reason for reason in choice.reasons["native"])


def test_odd_head_dim_is_a_reason():
    choice = ops.backend_for("prefix_attention", "cpu", torch.float32, head_dim=20)
    assert any("head dim 20" in reason for reason in choice.reasons["native"])


def test_use_backend_nests_and_restores():
    with ops.use_backend("reference"):
        with ops.use_backend("native"):
            pass
        assert ops.backend_for("add_norm").backend == "reference"


@pytest.mark.parametrize("change, words", [
    ({"cu_seqlens": torch.tensor([0, 4])}, "must be int32"),
    ({"prefix_v_KPND": None}, "only one of prefix_k and prefix_v"),
    ({"prefix_k_KPND": torch.zeros(1, 3, 2, 4), "prefix_v_KPND": torch.zeros(1, 3, 2, 4)}, r"must be \[K, P, 2, 8\]"),
    ({"dropout_p": 1.0}, r"drop probability 1.0 is outside \[0, 1\)"),
    ({"k_TND": torch.zeros(5, 2, 8)}, "must share one shape"),
])
def test_bad_attention_inputs_get_one_sentence(change, words):
    q, k, v = random_qkv([4], 2, 8).unbind(1)
    pk, pv = random_prefix(1, 3, 2, 8)
    arguments = {"q_TND": q, "k_TND": k, "v_TND": v, "prefix_k_KPND": pk, "prefix_v_KPND": pv,
                 "cu_seqlens": cu_seqlens_of([4]), "max_seqlen": 4}
    with pytest.raises(InputError, match=words):
        ops.prefix_attention(**arguments | change)
