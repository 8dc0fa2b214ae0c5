"""The CUDA library as nvcc built it: code for every architecture, no spills, tensor cores in use; and when it is called."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from ptv2_engine import _cuda, build_info, ops
from ptv2_engine.errors import BackendError
from ptv2_engine.ops import _dispatch

TABLE = Path(__file__).parent.parent.parent / "docs" / "compiled-cuda.md"


@pytest.fixture
def resources():
    """The module that looks into the library."""
    if not _cuda.LIBRARY.exists():
        assert shutil.which("nvcc") is None, f"nvcc is here, but: {build_info.recorded().get('cuda')}"
        pytest.skip("no nvcc")
    pytest.importorskip("triton")
    import resources

    return resources


def test_every_kernel_is_there_for_every_architecture_and_spills_nothing(resources):
    usage = resources.usage()
    archs = {arch for arch, _ in usage}
    assert archs == set(build_info.recorded()["cuda"]["archs"]) == {"sm_80", "sm_90a"}
    kernels = {arch: {name for other, name in usage if other == arch} for arch in archs}
    assert len(kernels["sm_80"]) == 59                                       # 20 forward, 10 dq, 28 sweeps, 1 sum of partials
    wide = {f"wide_forward_kernel<{element}, {D}>" for element in ("Bf16", "Fp16") for D in _cuda.WIDE_HEAD_DIMS}
    assert kernels["sm_90a"] == kernels["sm_80"] | wide
    assert not [key for key, used in usage.items() if used["STACK"] or used.get("LOCAL") or used["REG"] > 255]


def test_the_committed_table_is_of_these_kernels(resources):
    if build_info.recorded()["cuda"]["nvcc"] not in TABLE.read_text():
        pytest.skip("made by another nvcc")
    assert TABLE.read_text() == resources.markdown(), "python tests/cuda/resources.py --markdown docs/compiled-cuda.md"


def test_the_products_run_on_tensor_cores(resources):
    """mma, ldmatrix and cp.async by their names in machine code; warpgroup products in the wide forward."""
    found = resources.instructions("sm_90a")
    assert len(found) == 63
    for name, words in found.items():
        product = "HGMMA" if name.startswith("wide_forward") else "HMMA.16816.F32"
        assert name == "reduce_kernel" or {product, "LDSM", "LDGSTS"} <= words, name


def test_both_sides_agree_on_the_arguments(resources):
    assert _cuda.library.__wrapped__().ptv2_cuda_arguments_size() == ctypes.sizeof(_cuda.Arguments)


def test_the_backend_says_why_it_does_not_run(monkeypatch):
    monkeypatch.delenv("PTV2_CUDA", raising=False)
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    assert _dispatch.cuda_reasons(cuda, bf16, op="prefix_attention")[0].startswith("switched off: never run on a GPU")
    assert _dispatch.cuda_reasons(cuda, bf16, op="add_norm") == ["no CUDA C++ kernel of add_norm"]
    assert _dispatch.cuda_reasons(torch.device("cpu"), bf16, op="prefix_attention") == ["tensors are on cpu"]
    monkeypatch.setenv("PTV2_CUDA", "1")
    monkeypatch.setattr(_cuda, "unavailable", lambda device: None)
    assert _dispatch.cuda_reasons(cuda, torch.float32, op="prefix_attention") == ["dtype float32 (has bfloat16, float16)"]
    assert _dispatch.cuda_reasons(cuda, bf16, op="prefix_attention") == []
    assert ops.choose("prefix_attention", cuda, bf16).backend == "cuda"
    assert ops.choose("prefix_attention", cuda, bf16, {"cuda": ["too long"]}).backend == "triton"
    with ops.use_backend("cuda"), pytest.raises(BackendError, match="add_norm: backend 'cuda' was asked for but .* no CUDA C"):
        ops.choose("add_norm", cuda, bf16)


def test_without_a_library_or_a_device_the_reason_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(_cuda, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setattr(build_info, "recorded", lambda: {"cuda": {"reason": "no nvcc found at install"}})
    assert _cuda.unavailable.__wrapped__() == "not built (no nvcc found at install)"
    (tmp_path / "none.so").touch()
    if not torch.cuda.is_available():
        assert _cuda.unavailable.__wrapped__() == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert _cuda.unavailable.__wrapped__() == "compute capability 10.0 (has 8.0, 9.0)"


def test_an_old_driver_is_named_before_a_launch(monkeypatch, resources):
    class Library:
        ptv2_cuda_runtime_version = staticmethod(_cuda.library.__wrapped__().ptv2_cuda_runtime_version)
        driver = 0

        @classmethod
        def ptv2_cuda_driver_version(cls):
            return cls.driver

    built = Library.ptv2_cuda_runtime_version()
    assert built >= 12000
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_cuda, "library", lambda: Library)
    old = f"the driver is for CUDA 11, the kernels were built with CUDA {built // 1000}"
    for driver, reason in ((11080, old), (built, None)):
        Library.driver = driver
        assert _cuda.unavailable.__wrapped__() == reason
