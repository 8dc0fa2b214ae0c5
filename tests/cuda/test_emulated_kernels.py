"""The CUDA C++ kernels, lane by lane on the CPU, against the fp64 reference: output, log-sum-exp, all gradients."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import emulated
import pytest
import torch
from attention_cases import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import Attention, attention_inputs, check_attention, mixed_prompts, run_attention

from ptv2_engine import _cuda
from ptv2_engine.errors import BackendError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU tests/gpu runs the kernels")
bf16, fp16 = torch.bfloat16, torch.float16


@st.composite
def cases(draw: st.DrawFn) -> Attention:
    D = draw(st.sampled_from(sorted(_cuda.MAX_STRIPS)))
    P = draw(st.sampled_from([0, 1, 5, 16, 20, 33, 64]))
    longest = (_cuda.MAX_STRIPS[D] - -(-P // 16)) * 16 + 40
    lengths = draw(st.lists(st.one_of(st.sampled_from([0, 1, 16, 17]), st.integers(0, longest)), min_size=1, max_size=4))
    case = Attention(tuple(lengths), P, N=draw(st.integers(1, 2)), D=D, dtype=draw(st.sampled_from([bf16, fp16])),
                     spare_rows=draw(st.sampled_from([0, 3])), dropout_p=draw(st.sampled_from([0.0, 0.2])),
                     prefix_dropout_p=draw(st.sampled_from([0.0, 0.3])) if P else 0.0)
    return mixed_prompts(case) if P and draw(st.booleans()) else case


@settings(max_examples=examples(15))
@given(cases())
def test_any_shape(package, case):
    """Ten thousand new ones: --hypothesis-profile=night -k any_shape."""
    check_attention(case, package)


@pytest.mark.parametrize("dtype", [bf16, fp16])
@pytest.mark.parametrize("D", sorted(_cuda.MAX_STRIPS))
def test_the_longest_rows_of_a_head_dim(package, order, D, dtype):
    check_attention(Attention((16 * _cuda.MAX_STRIPS[D] - 32, 33), 20, N=1, D=D, dtype=dtype), package)


@pytest.mark.parametrize("programs", [1, 4])
@pytest.mark.parametrize("case", [
    Attention((40, 7, 0, 64, 1, 33, 20, 20, 50), 20, N=2, D=64, dtype=bf16),
    Attention((40, 7, 0, 90, 33), 20, N=2, D=64, dtype=bf16, dropout_p=0.2),
    Attention((40, 7, 70, 33), 20, N=2, D=32, dtype=fp16, dropout_p=0.2, prefix_dropout_p=0.2),
    mixed_prompts(Attention((5, 70, 64, 33, 1), 36, N=2, D=64, dtype=bf16)),
    mixed_prompts(Attention((20, 5, 64), 9, N=1, D=80, dtype=bf16, prefix_dropout_p=0.3))])
def test_a_block_that_sweeps_several_sequences(package, order, monkeypatch, case, programs):
    monkeypatch.setattr(_cuda, "PROGRAMS", programs)
    check_attention(case, package)


def test_the_same_bits_whatever_the_order_and_whatever_memory_held(package, monkeypatch):
    case = mixed_prompts(Attention((40, 7, 120, 33), 20, N=2, D=64, dtype=bf16, dropout_p=0.2, prefix_dropout_p=0.2))
    inputs, runs = attention_inputs(case), []
    for seed, poison in (("1", float("nan")), ("2", 0.0), ("3", 1e30)):
        monkeypatch.setenv("PTV2_EMULATE_ORDER", seed)
        runs.append(run_attention(case, inputs, package, poison=poison))
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], other, strict=True))


def test_several_prompts_without_ids_means_prompt_0(package):
    check_attention(Attention((17, 5), 5, K=3, N=1, D=64, dtype=bf16), package)


@pytest.mark.parametrize("lengths", [(40, 20, 9), (90, 20, 9), (300, 9)])
def test_a_layer_without_a_prefix_may_come_with_the_prompts_lengths(package, lengths):
    ids = (1, 0, 1)[:len(lengths)]
    check_attention(Attention(lengths, 0, N=1, D=64, prompt_ids=ids, prompt_lengths=(5, 3), dtype=bf16), package)


@pytest.mark.parametrize("longest, P", [(224, 0), (225, 0), (256, 0), (240, 1), (192, 64), (176, 80)])
def test_rows_at_the_limits_of_one_sweep(package, longest, P):
    """The emulator has sm_80's shared memory."""
    check_attention(Attention((longest,), P, N=1, D=64, dtype=bf16), package, partly=False)


def test_tensors_elsewhere_are_refused():
    case = Attention((5,), 5, N=1, D=64, dtype=bf16)
    inputs = attention_inputs(case)
    q, k, v = inputs["qkv"].unbind(1)
    with pytest.raises(BackendError, match="prefix_attention: cu_seqlens is on meta and q on cpu; move it there."):
        offsets = inputs["cu_seqlens"].to("meta")
        _cuda.prefix_attention_fwd(q, k, v, *inputs["prefix"], offsets, 5, None, None, 0.1, 0.0, 0.0, None, 0)


def test_views_that_cp_async_cannot_read_are_copied(package):
    case = Attention((17, 5), 5, N=2, D=32, dtype=bf16)
    inputs = attention_inputs(case)
    wide = torch.full((22, 3, 2, 33), float("nan"), dtype=bf16)
    wide[..., 1:] = inputs["qkv"]
    odd = torch.full((1, 7, 2, 2, 32), float("nan"), dtype=bf16)
    prefix = [odd[:, 1:6, i].copy_(p) for i, p in enumerate(inputs["prefix"])]
    other = inputs | {"qkv": wide[..., 1:], "prefix": tuple(prefix)}
    for one, two in zip(run_attention(case, inputs, package), run_attention(case, other, package), strict=True):
        assert torch.equal(one, two)


def test_a_shape_that_no_instance_takes_is_an_error_and_has_a_reason(package):
    case = Attention((5,), 113, N=1, D=128, dtype=bf16)
    with pytest.raises(BackendError, match=r"prefix_attention_fwd: the CUDA kernels report 'invalid argument' .error 1."):
        run_attention(case, attention_inputs(case), package)
    assert _cuda.shape_reasons(128, 113, False) == ["113 prefix keys (has up to 112 for head dim 128)"]
    assert _cuda.shape_reasons(16, 5, False) == ["head dim 16 (has 32, 64, 80, 96, 128)"]
    assert _cuda.shape_reasons(64, 5, True) == ["queries that do not see every token"]
    assert not _cuda.shape_reasons(64, 240, False)


@pytest.mark.parametrize("programs", [2, 264])
@pytest.mark.parametrize("case", [
    Attention((260, 0, 70), 20, N=1, D=64, dtype=bf16, spare_rows=3), Attention((250,), 20, N=1, D=64, dtype=fp16, keep_out=True),
    Attention((150, 5), 200, N=1, D=32, dtype=bf16), Attention((129, 64), 0, N=1, D=128, dtype=bf16, keep_out=True),
    mixed_prompts(Attention((230, 0, 150), 70, N=1, D=32, dtype=fp16, dropout_p=0.2, prefix_dropout_p=0.2)),
    mixed_prompts(Attention((129, 70), 36, N=1, D=96, dtype=bf16, prefix_dropout_p=0.2))])
def test_rows_too_long_for_one_sweep(package, monkeypatch, case, programs):
    if programs == 2:                                             # the other end of what cp.async and the scheduler may do
        monkeypatch.setenv("PTV2_EMULATE_EAGER", "1")
        monkeypatch.setenv("PTV2_EMULATE_ORDER", "7")
    monkeypatch.setattr(_cuda, "PROGRAMS", programs)
    check_attention(case, package)


@pytest.mark.parametrize("D", _cuda.WIDE_HEAD_DIMS)
@pytest.mark.parametrize("changes", [{}, {"dtype": fp16, "dropout_p": 0.2, "prefix_dropout_p": 0.2}])
def test_the_forward_on_warpgroup_products(package, order, monkeypatch, D, changes):
    monkeypatch.setattr(_cuda, "takes_wide", lambda *_: True)
    check_attention(replace(Attention((140, 0, 17), 70, N=1, D=D, dtype=bf16, spare_rows=3), **changes), package)


# What an emulator is worth: each of these mistakes must be noticed.
MISTAKES = {
    "a barrier too few before dQ": ("sweep.h", "statistics.delta);\n      sync();", "statistics.delta);"),
    "a copy that is not waited for": ("sweep.h", "wait<0>();", "wait<1>();"),
    "keys of the next sequence over this one's": ("sweep.h", "fetch_keys(next, 1 - stage)",
                                                  "fetch_keys(next, stage)"),
    "warpgroup products of what was not published": ("prefix_attention_fwd_sm90.cu", "cuda::publish();", ""),
    "a descriptor one row off": ("prefix_attention_fwd_sm90.cu", "j * 16 * 128", "j * 8 * 128"),
    "the turns of the prefix with long rows": ("sweep.h", "meets && step.its_turn(token_strips)", "meets"),
    "queries of the sequence beside it": ("sweep.h", "statistics.b == keys.b", "true"),
    "places of another sequence's queries": ("sweep.h", "start = a.cu_seqlens[b]", "start = step.of.start"),
    "a prefix that lands on another": ("forward_short.h", "sync();  // before another", "// before another"),
    "packs that land on each other": ("forward_short.h", "fetch(step, 1 - stage)", "fetch(step, stage)"),
    "a pack's first keys for all its sequences": ("forward_short.h", "mine + TILE - owner.first * ROW<D>", "tiles + TILE"),
    "a prefetch before the barrier": ("sweep.h", "wait<0>();\n      sync();\n      Step next", "Step next"),
    "a forward that overwrites keys still read": ("forward_block.h", "sync();  // before the next copy", "// before"),
    "dropout bits of the neighbouring lane": ("tile.h", "of_word >> t >> g / 4 * 16", "of_word >> t >> g / 4 * 16 >> 4"),
    "prefix masks left out of the gradient": ("sweep.h", "if (ADD && a.prefix_threshold)", "if (false)"),
}


def only_one_head_dim(sources: Path) -> None:
    """Leaves D = 64: a third of the time to compile."""
    source = sources / "dispatch.h"
    source.write_text(re.sub(r" *case (32|80|96|128): .*\n", "", source.read_text()))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_noticed(name, tmp_path, monkeypatch):
    if reason := emulated.why_not():
        pytest.skip(reason)
    file, right, wrong = MISTAKES[name]
    sources = Path(shutil.copytree(emulated.CSRC / "cuda", tmp_path / "cuda"))
    only_one_head_dim(sources)
    text = (sources / file).read_text()
    assert right in text, "the mistake no longer fits the source"
    (sources / file).write_text(text.replace(right, wrong))
    package = emulated.as_package(emulated.compile_library(tmp_path / f"mistake_{list(MISTAKES).index(name)}.so", sources))
    monkeypatch.setattr(_cuda, "PROGRAMS", 1)
    monkeypatch.setattr(_cuda, "takes_wide", lambda D, longest, device: longest > 128)
    short = Attention((70, 33, 90, 20, 9), 20, N=1, D=64, dtype=bf16, dropout_p=0.2)
    with pytest.raises((AssertionError, BackendError)):           # in one of the orders: late copies hide what early ones show
        for case in (short, replace(short, prefix_dropout_p=0.2), replace(short, lengths=(250,)),
                     replace(short, lengths=(40, 20, 9, 33, 60, 64), prefix_dropout_p=0.2)):
            for order in ({"PTV2_EMULATE_ORDER": "1"}, {"PTV2_EMULATE_ORDER": "7", "PTV2_EMULATE_EAGER": "1"}):
                with monkeypatch.context() as context:
                    for variable, value in order.items():
                        context.setenv(variable, value)
                    check_attention(case, package)


def test_the_emulator_names_what_went_wrong(tmp_path, monkeypatch):
    if reason := emulated.why_not():
        pytest.skip(reason)
    sources = Path(shutil.copytree(emulated.CSRC / "cuda", tmp_path / "cuda"))
    only_one_head_dim(sources)
    forward = sources / "forward_block.h"
    forward.write_text(forward.read_text().replace("wait<1>();", "wait<1>();\n    if (lane() == 3) sync_warp();"))
    package = emulated.as_package(emulated.compile_library(tmp_path / "divergent.so", sources))
    case = Attention((70,), 5, N=1, D=64, dtype=bf16)
    with pytest.raises(BackendError, match="the lanes of a warp are at different instructions: sync syncwarp .block 0, 0, 0."):
        run_attention(case, attention_inputs(case), package)
