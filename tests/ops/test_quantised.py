"""Frozen weights in 8 and 4 bits: errors against what each format promises, sizes, chunks, fake tensors, zeros."""

from __future__ import annotations

import pytest
import torch
from ptv2_engine.kernels.nf4 import LEVELS
from torch._subclasses.fake_tensor import FakeTensorMode

from ptv2_engine import ops
from ptv2_engine.errors import InputError
from ptv2_engine.ops import quantised
from ptv2_engine.ops.quantised import KINDS, Quantised, dequantise, quantise

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def weight_of(rows, columns, dtype=torch.float32):
    """Rows of very different sizes, as a trained matrix has them."""
    return (torch.randn(rows, columns) * torch.logspace(-4, 1, rows)[:, None]).to(dtype)


def exact_values(q):
    """The fp64 values of codes times scales, decoded in another way than the op's."""
    if q.kind == "nf4":
        nibbles = [n for byte in q.codes.tolist() for n in (byte // 16, byte % 16)]
        values = torch.tensor([LEVELS[n] for n in nibbles], dtype=torch.float64).view(-1, 64)
    elif q.kind == "fp8":
        bits = q.codes.view(torch.uint8).to(torch.int64)
        sign, exponent, mantissa = 1 - 2 * (bits >> 7), bits >> 3 & 15, (bits & 7).double()
        values = sign * torch.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * torch.exp2(exponent.double() - 7))
    else:
        values = q.codes.double()
    return (values * q.scales.double()[:, None]).view(q.shape)


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_is_off_by_half_a_scale(dtype):
    weight = weight_of(33, 200, dtype)
    q = quantise(weight, "int8")
    assert torch.equal(q.scales, weight.float().abs().amax(1) / 127)
    assert q.codes.abs().amax(1).eq(127).all() and q.codes.dtype == torch.int8
    error = (exact_values(q) - weight.double()).abs()
    assert (error <= q.scales.double()[:, None] * 0.5001).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_fp8_is_off_by_a_sixteenth_or_half_a_subnormal_step(dtype):
    weight = weight_of(33, 200, dtype)
    weight[:, :20] *= 1e-5
    q = quantise(weight, "fp8")
    error, bound = (exact_values(q) - weight.double()).abs(), weight.double().abs() * 2**-4
    assert (error <= torch.maximum(bound, q.scales.double()[:, None] * 2**-10) * 1.0001).all()
    assert (error[:, 20:] > 0).any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_nf4_takes_the_nearest_level(dtype):
    weight = weight_of(7, 320, dtype)
    q = quantise(weight, "nf4")
    blocks = weight.double().view(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    assert torch.equal(q.scales.double(), absmax[:, 0].float().double())
    nearest = (blocks[..., None] - absmax[..., None] * torch.tensor(LEVELS, dtype=torch.float64)).abs().amin(-1)
    error = (exact_values(q).view(-1, 64) - blocks).abs()
    assert (error <= nearest + absmax * 2e-7).all()      # the quotient is rounded to fp32 before it is compared


def test_levels_are_the_published_ones_and_the_first_weight_has_the_high_nibble():
    published = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
                 -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
                 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
    q = quantise(torch.tensor(published).repeat(4)[None], "nf4")
    assert q.codes.tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 4
    assert torch.equal(dequantise(q, torch.float32)[0, :16], torch.tensor(published))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_dequantise_rounds_the_exact_product(kind, dtype, backend):
    if backend == "native" and ops.backend_for("dequantise", dtype=dtype).backend != "native":
        pytest.skip(f"no native kernel for {dtype}")
    q = quantise(weight_of(9, 192), kind)
    with ops.use_backend(backend):
        actual = dequantise(q, dtype)
    assert actual.shape == (9, 192) and actual.dtype == dtype and actual.is_contiguous()
    assert torch.equal(actual, exact_values(q).float().to(dtype))


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("fp8", 8), ("nf4", 4.5)])
def test_bytes(kind, bits):
    assert quantise(torch.randn(512, 1024), kind).nbytes() == pytest.approx(512 * 1024 * bits / 8, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("chunk", "shape"), [(1, (64, 5)), (1, (10, 32)), (700, (10, 256)), (1000, (13, 320))])
def test_chunks_change_nothing(kind, chunk, shape, monkeypatch):
    weight = weight_of(*shape)
    whole = quantise(weight, kind)
    monkeypatch.setattr(quantised, "_CHUNK", chunk)
    parts = quantise(weight, kind)
    assert torch.equal(whole.codes.view(torch.uint8), parts.codes.view(torch.uint8)) and torch.equal(whole.scales, parts.scales)


@pytest.mark.parametrize("kind", KINDS)
def test_transient_memory(kind):
    """What is alive at once beside the result, counted through every op of a chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Peak(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.alive, self.peak = {}, 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in (out,) if isinstance(out, torch.Tensor) else ():
                storage = t.untyped_storage()
                self.alive[storage._cdata] = (torch.multiprocessing.reductions.StorageWeakRef(storage), storage.nbytes())
            self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
            self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
            return out

    weight = torch.randn(4096, 2048, dtype=torch.bfloat16)
    with Peak() as counted:
        q = quantise(weight, kind)
    assert counted.peak - q.nbytes() - weight.nbytes <= 64 * 2**20
    assert counted.peak > q.nbytes() + weight.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_left_alone_and_need_not_be_contiguous(kind):
    weight = torch.nn.Parameter(weight_of(64, 24).t())
    before = weight.detach().clone()
    q, plain = quantise(weight, kind), quantise(before.contiguous(), kind)
    assert torch.equal(weight, before) and not q.scales.requires_grad
    assert torch.equal(dequantise(q, torch.float32), dequantise(plain, torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind):
    weight = torch.randn(4, 128)
    weight[1], weight[3, :64] = 0.0, 0.0
    for scale in (1.0, 1e-44, 1e-39, 1e38):     # subnormal and nearly infinite weights give no NaN either
        out = dequantise(quantise(weight.clamp(-3, 3) * scale, kind), torch.float32)
        assert torch.isfinite(out).all() and (out[1] == 0).all() and (out[3, :64] == 0).all(), scale
    assert (dequantise(quantise(torch.zeros(4, 64), kind), torch.bfloat16) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_fake_tensors(kind):
    real = quantise(torch.randn(96, 64), kind)
    with FakeTensorMode():
        for dtype in FLOATS[:3]:
            fake = quantise(torch.empty(96, 64, dtype=dtype), kind)
            assert [(t.shape, t.dtype) for t in fake[1:3]] == [(t.shape, t.dtype) for t in real[1:3]]
            out = dequantise(fake, dtype)
            assert out.shape == (96, 64) and out.dtype == dtype
    assert quantise(torch.empty(96, 64, device="meta"), kind).nbytes() == real.nbytes()


@pytest.mark.parametrize("kind", KINDS)
def test_schema(kind):
    q = quantise(torch.randn(6, 64), kind)
    if ops.backend_for("dequantise").backend != "native":
        pytest.skip("no native kernels")
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.ptv2.dequantise.default, (q.codes, q.scales, kind, 6, 64, dtype),
                              test_utils=("test_schema", "test_faketensor")[kind == "fp8":])     # torch cannot compare fp8


def test_words_of_errors():
    weight = torch.randn(6, 64)
    with pytest.raises(InputError, match="kind 'int4' does not exist; choose one of int8, fp8, nf4"):
        quantise(weight, "int4")
    with pytest.raises(InputError, match=r"\(6,\) float32 cpu must be a float matrix"):
        quantise(weight[:, 0], "int8")
    with pytest.raises(InputError, match="must be a float matrix"):
        quantise(weight.int(), "int8")
    with pytest.raises(InputError, match=r'blocks of 64, but 5 x 10 = 50 is not a multiple of it; choose kind "int8"'):
        quantise(torch.randn(5, 10), "nf4")
    q = quantise(weight, "fp8")
    with pytest.raises(InputError, match=r"\(6, 64\) bfloat16 cpu .* not those of fp8 6 x 64; Module.to"):
        dequantise(q._replace(codes=q.codes.bfloat16()), torch.bfloat16)
    with pytest.raises(InputError, match="not those of nf4 6 x 64"):
        dequantise(Quantised("nf4", q.codes, q.scales, q.shape), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_that_of_bitsandbytes(dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = weight_of(64, 320, dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours, theirs = quantise(weight, "nf4"), packed.view(-1)
    assert torch.equal(ours.scales, state.absmax.float().view(-1))
    # a quotient on the edge between two levels may fall on either side
    assert (ours.codes != theirs).float().mean() < 1e-3
    q = ours._replace(codes=theirs)
    expected = functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(dequantise(q, dtype), expected, rtol=torch.finfo(dtype).eps, atol=0)
