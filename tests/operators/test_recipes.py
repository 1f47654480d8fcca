"""Tensors are quantized to each format by the format's own recipe: to the bits of its library, or of an oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import qlora_ext
import reference
from forms import oracle
from qlora_ext import Form, formats, quantize
from qlora_ext.form import PRESETS
from qlora_ext.weight import Weight4bit

F32 = np.float32
EVERY = pytest.mark.parametrize("name", PRESETS)
WIDE = [name for name, form in PRESETS.items() if form.bits > 4]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], F32)


def weight(n: int = 24, k: int = 128, seed: int = 0) -> Tensor:
    """Rows of magnitudes from 2^-20 to 2^20, with zeros, a row of zeros and outliers."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * torch.logspace(-6, 6, n).unsqueeze(1)
    w[1] = 0
    w[2, ::3] = 0
    w[3, 5] *= 1000
    return w.clamp(-30000, 30000)


def codes_of(w4: Weight4bit) -> np.ndarray:
    return reference.unpack(w4.packed.numpy(), w4.shape.numel(), w4.form.bits)


def blocks_of(w: Tensor, size: int) -> np.ndarray:
    return w.float().reshape(-1, size).numpy()


def to_even(q: np.ndarray) -> np.ndarray:
    """The code of the E2M1 value nearest to each number: of a tie, the even code; beyond 6, that of 6."""
    distance = np.abs(np.minimum(np.abs(q), F32(6))[..., None] - E2M1)
    least = distance.min(-1, keepdims=True)
    even_first = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    code = even_first[np.argmax((distance == least)[..., even_first], -1)]
    return code + 8 * np.signbit(q)


@EVERY
def test_the_error_is_small_and_the_form_is_the_one_asked_for(name: str) -> None:
    w = torch.randn(32, 128) * 0.02
    w4 = quantize(w, name)
    assert w4.form == PRESETS[name]
    assert (w4.shape, w4.dtype) == (w.shape, w.dtype)
    limits = {4: 0.16, 5: 0.05, 6: 0.02, 8: 0.03 if name == "fp8" else 0.01}
    assert (w4.dequantize() - w).norm() < limits[w4.form.bits] * w.norm()
    assert np.array_equal(w4.dequantize().numpy(), oracle(w4))
    assert torch.equal(quantize(w, PRESETS[name]).packed, w4.packed)


SHAPES = {4: [(1,), (7,), (3, 33), (5, 16), (2, 3, 70), (0,), (0, 64)]}
WIDE_SHAPES = [(128,), (3, 256), (2, 3, 128), (0,), (0, 128)]


@pytest.mark.parametrize(
    ("name", "shape"), [(name, s) for name, form in PRESETS.items() for s in SHAPES.get(form.bits, WIDE_SHAPES)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_shape(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = torch.randn(shape).to(dtype)
    w4 = quantize(w, name)
    specs = PRESETS[name].tensors(shape)
    assert {key: (tuple(t.shape), t.dtype) for key, t in w4.tensors.items()} == specs
    assert w4.dtype == dtype
    if w.numel():
        assert (w4.dequantize(torch.float32) - w.float()).abs().max() < 0.35 * w.float().abs().max()
    meta = quantize(w.to("meta"), name)
    assert {key: (tuple(t.shape), t.dtype) for key, t in meta.tensors.items()} == specs


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("shape", [(), (7,), (3, 48), (128, 3)])
def test_rows_of_more_than_4_bits_are_whole_blocks(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^w: expected rows of a multiple of {PRESETS[name].row_unit} elements"):
        quantize(torch.zeros(shape), name)


@EVERY
def test_a_tensor_of_zeros_stays_zero(name: str) -> None:
    assert not quantize(torch.zeros(4, 128), name).dequantize().any()


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_ggml_formats_have_the_values_of_gguf(name: str) -> None:
    quants = pytest.importorskip("gguf.quants", reason="gguf is not installed")
    w, kind = weight(), quants.GGMLQuantizationType[name.upper()]
    w[5, :32] = torch.arange(32) - 15.5  # ties between codes of 8 bits with the scale 1
    w[5, 0] = -127
    assert np.array_equal(
        quantize(w, name).dequantize().numpy(), quants.dequantize(quants.quantize(w.numpy(), kind), kind)
    )


@pytest.mark.parametrize(("name", "kind"), [("q4_0", "Q4_0"), ("q4_1", "Q4_1")])
def test_ggml_formats_have_the_bits_of_gguf(name: str, kind: str) -> None:
    quants = pytest.importorskip("gguf.quants", reason="gguf is not installed")
    w = weight()
    file = quants.quantize(w.numpy(), quants.GGMLQuantizationType[kind])
    w4 = quantize(w, name)
    blocks = file.reshape(-1, 18 + 2 * (name == "q4_1"))
    halves = blocks[:, -16:]
    assert np.array_equal(codes_of(w4).reshape(-1, 32), np.concatenate([halves & 15, halves >> 4], 1))
    assert np.array_equal(w4.absmax.numpy().view(np.uint8).reshape(-1, 2), blocks[:, :2])
    if w4.block_offsets is not None:
        assert np.array_equal(w4.block_offsets.numpy().view(np.uint8).reshape(-1, 2), blocks[:, 2:4])
    decoded = quants.dequantize(file, quants.GGMLQuantizationType[kind])
    assert np.array_equal(w4.dequantize().numpy(), decoded)


def test_iq4_nl_has_the_scale_with_the_least_error_for_its_codes() -> None:
    w, values = weight(), np.array(formats.code_values("iq4_nl"), F32)
    w4 = quantize(w, "iq4_nl")
    codes, scales = codes_of(w4).reshape(-1, 32), w4.absmax.float().numpy()
    for block, found, scale in zip(blocks_of(w, 32), codes, scales, strict=True):
        largest = block[np.abs(block).argmax()]
        if largest == 0:
            assert scale == 0
            continue
        q = block * (F32(1) / (largest / values[0]))
        distance = np.abs(q[:, None] - values)
        assert (np.take_along_axis(distance, found[:, None].astype(int), 1)[:, 0] == distance.min(1)).all()
        chosen, x = values[found].astype(np.float64), block.astype(np.float64)
        best = (x * x * chosen * x).sum() / (x * x * chosen * chosen).sum()
        assert abs(scale - best) <= 2**-10 * abs(best) + 2**-25


def ggml_scale_and_depth(x: np.ndarray, last: int, steps: np.ndarray) -> tuple[np.float32, np.float32]:
    """The search of ggml's Q4_K and Q5_K for one block, in its order."""
    weights = np.sqrt((x * x).sum(dtype=F32) / F32(len(x))) + np.abs(x)
    low, high = min(x.min(), F32(0)), x.max()
    if high <= low:
        return F32(0), -low
    sum_w, sum_x = weights.sum(dtype=F32), (weights * x).sum(dtype=F32)

    def codes(largest: float) -> np.ndarray:
        return np.clip(np.rint(F32(largest) / (high - low) * (x - low)), 0, last).astype(F32)

    def error(scale: np.float32, least: np.float32, q: np.ndarray) -> np.float32:
        return (weights * (scale * q + least - x) ** 2).sum(dtype=F32)

    best = (high - low) / F32(last), low
    smallest = error(*best, codes(last))
    for step in steps:
        q = codes(last + step)
        sum_l, sum_l2 = (weights * q).sum(dtype=F32), (weights * q * q).sum(dtype=F32)
        sum_xl = (weights * q * x).sum(dtype=F32)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        if determinant > 0:
            scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
            least = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
            if least > 0:
                scale, least = sum_xl / sum_l2, F32(0)
            if error(scale, least, q) < smallest:
                best, smallest = (scale, least), error(scale, least, q)
    return best[0], -best[1]


@pytest.mark.parametrize(
    ("name", "last", "steps"), [("q4_k", 15, np.arange(21) / 10 - 1), ("q5_k", 31, np.arange(16) / 10 - 0.5)]
)
def test_q4_k_and_q5_k_are_those_of_ggml(name: str, last: int, steps: np.ndarray) -> None:
    w = weight(16, 512)
    w4 = quantize(w, name)
    blocks = blocks_of(w, 32)
    found = np.array([ggml_scale_and_depth(block, last, steps) for block in blocks], F32).reshape(-1, 8, 2)
    units = (found.max(1) / F32(63)).astype(np.float16)
    got = np.stack([w4.nested_absmax.numpy(), w4.offset_scale.numpy()], 1)
    assert (np.abs(got - units) <= 0.02 * units).all()
    assert (got == units).mean() > 0.9  # a sum in another order may find another of two nearly equal scales
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.nan_to_num(np.rint(found * (F32(63) / found.max(1, keepdims=True)))).reshape(-1, 2)
    got_codes = np.stack([w4.absmax.numpy(), w4.block_offsets.numpy()], 1)
    assert (got_codes == codes).mean() > 0.9
    scales, offsets = w4.decoded_scales().numpy()[:, None], w4.decoded_offsets().numpy()[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(scales == 0, 0, np.clip(np.rint((blocks - offsets) / scales), 0, last))
    assert np.array_equal(codes_of(w4).reshape(q.shape), q)
    w, affine = torch.randn(64, 256) * 0.02, name.replace("k", "1")
    assert (quantize(w, name).dequantize() - w).norm() < 0.97 * (quantize(w, affine).dequantize() - w).norm()


@pytest.mark.parametrize(("name", "least", "plain"), [("q6_k", -128, "int6"), ("iq4_xs", -32, "iq4_nl")])
def test_q6_k_and_iq4_xs_have_searched_scales_in_units_of_the_largest(name: str, least: int, plain: str) -> None:
    w = weight(16, 512)
    w[6, :256] = torch.randn(256)
    w4 = quantize(w, name)
    scale_codes = w4.scale_table[w4.absmax.long()].view(-1, w4.nested_block_size)
    zero = (w4.nested_absmax == 0)[:, None]
    assert (((scale_codes == least) | zero).sum(1) >= 1).all()  # one block has the largest scale
    assert ((scale_codes >= least) & (scale_codes < -least)).all()
    values, scales = np.array(formats.code_values(w4.code), F32), w4.decoded_scales().numpy()[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(scales == 0, 0, blocks_of(w, w4.block_size) / scales)
    found = values[codes_of(w4).reshape(q.shape)]
    nearest = np.abs(q[..., None] - values).min(-1)
    np.testing.assert_allclose(np.abs(q - found), nearest, rtol=1e-5, atol=1e-5)
    w = torch.randn(64, 256) * 0.02
    simple = quantize(w, Form(plain, "float32", w4.block_size))
    assert (quantize(w, name).dequantize() - w).norm() < 0.98 * (simple.dequantize() - w).norm()


def test_fp4_is_what_bitsandbytes_decodes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    w = weight()
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="fp4")
    w4 = quantize(w, Form("fp4", "float32"))
    assert torch.equal(w4.absmax, state.absmax)
    assert torch.equal(w4.dequantize(), functional.dequantize_4bit(packed, state))


def test_mxfp4_is_that_of_the_specification() -> None:
    w = weight()
    w[4, :32] = torch.tensor(
        [4, -5, 0.25, -0.25, 0.75, -0.75, 1.25, -1.25, 1.75, -1.75, 2.5, -2.5, 3.5, -3.5, 5, 7] * 2
    )
    w4 = quantize(w, "mxfp4")
    blocks, codes = blocks_of(w, 32), w4.absmax.numpy()
    for block, code in zip(blocks, codes, strict=True):
        largest = np.abs(block).max()
        assert code == (0 if largest == 0 else math.floor(math.log2(largest)) - 2 + 127)
    scaled = np.ldexp(blocks, 127 - codes.astype(int)[:, None])
    assert np.array_equal(codes_of(w4).reshape(blocks.shape), to_even(scaled))
    table = w4.scale_table.numpy()
    assert (table[1:255] == np.ldexp(F32(1), np.arange(1, 255) - 127)).all()


@pytest.mark.parametrize("exponent", [-126, -100, 100, 127])
def test_mxfp4_saturates_at_the_ends_of_its_scales(exponent: int) -> None:
    w = torch.ldexp(torch.tensor([1.75, -1.0] * 16), torch.tensor(exponent))
    w4 = quantize(w, "mxfp4")
    assert (w4.absmax == max(0, exponent - 2 + 127)).all()
    if exponent > -120:
        assert torch.equal(w4.dequantize(), torch.ldexp(torch.tensor([1.5, -1.0] * 16), torch.tensor(exponent)))


def test_nvfp4_is_that_of_compressed_tensors() -> None:
    w = weight().clamp(-100, 100)
    w4 = quantize(w, "nvfp4")
    blocks = torch.from_numpy(blocks_of(w, 16))
    factor = 448 * 6 / w.abs().max()
    scales = (factor * (blocks.abs().amax(1) / 6)).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = torch.where(scales.float() == 0, torch.tensor(0.125), scales.float())
    got = w4.absmax.view(torch.float8_e4m3fn).float()
    assert ((got - scales).abs() <= scales / 8).all()  # at most one step, where a product rounds differently
    assert (got == scales).float().mean() > 0.97
    assert torch.equal(w4.decoded_scales(), got / factor)
    codes = to_even((blocks / w4.decoded_scales()[:, None]).numpy())
    assert np.array_equal(codes_of(w4).reshape(codes.shape), codes)


@pytest.mark.parametrize(("name", "largest"), [("int4", 7.5), ("int8", 127.5)])
def test_integers_are_those_of_compressed_tensors(name: str, largest: float) -> None:
    w = weight()
    w4 = quantize(w, name)
    blocks = torch.from_numpy(blocks_of(w, w4.block_size))
    scales = (blocks.abs().amax(1) / largest).bfloat16()
    assert torch.equal(w4.absmax, scales)
    q = torch.where(scales[:, None] == 0, 0.0, blocks / scales.float()[:, None])
    low, high = int(-largest - 0.5), int(largest - 0.5)
    assert np.array_equal(codes_of(w4).reshape(blocks.shape), (q.round().clamp(low, high) - low).numpy())


@pytest.mark.parametrize(("code", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_fp8_is_what_torch_casts_to(code: str, dtype: torch.dtype) -> None:
    w = weight()
    w4 = quantize(w, Form(code, "float32", 128))
    scales = w.abs().amax(1, keepdim=True) / torch.finfo(dtype).max
    assert torch.equal(w4.absmax, scales[:, 0])
    assert torch.equal(w4.packed.view(dtype).float(), torch.where(scales == 0, 0, w / scales).to(dtype).float())


@pytest.mark.parametrize("scales", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("offsets", ["float32", "float16", "bfloat16", "zero_point8"])
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_offsets(scales: str, offsets: str, block_size: int, bits: int) -> None:
    w = torch.randn(8, 128) * 0.02 + 0.1
    w4 = quantize(w, Form(f"uint{bits}", scales, block_size, offsets=offsets))
    lost = (w4.dequantize() - w).norm() / (w - w.mean()).norm()
    limit = 0.35 if offsets == "zero_point8" else 0.13  # a zero point shifts by whole steps, and keeps 0
    assert lost < limit / 2 ** (bits - 4) + (0.05 if scales == "bfloat16" or offsets == "bfloat16" else 0)
    assert np.array_equal(w4.dequantize().numpy(), oracle(w4))
    if offsets == "zero_point8":
        w[:, ::2] *= -1
        w[0, 0] = 0
        w4 = quantize(w, w4.form)
        assert w4.dequantize()[0, 0] == 0
        assert (w4.dequantize() - w).norm() < (0.09 if bits == 4 else 0.05) * w.norm()


@pytest.mark.parametrize("scales", ["float32", "float16", "bfloat16", "nested8", "table8"])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("code", ["nf4", "int4", "e2m1", "iq4_nl", "int5", "int6", "int8", "e4m3", "e5m2"])
def test_any_code_with_any_scales(code: str, scales: str, block_size: int) -> None:
    w = torch.randn(16, 128)
    w4 = quantize(w, Form(code, scales, block_size))
    assert (w4.dequantize() - w).norm() < 0.2 * w.norm()


@EVERY
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_rejected_with_their_place(name: str, bad: float) -> None:
    w = torch.randn(4, 128)
    w[2, 40] = bad
    w[2, 41] = bad
    blocks = w.numel() // PRESETS[name].block_size
    with pytest.raises(
        ValueError, match=rf"^w: expected finite values, got {bad} at index \[2, 40\] \(1 of {blocks} blocks"
    ):
        quantize(w, name)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q4_k", "iq4_nl", "iq4_xs", "q5_0", "q5_1", "q5_k", "q6_k", "q8_0"])
def test_values_too_large_for_the_scales_are_rejected(name: str) -> None:
    with pytest.raises(ValueError, match=r"^w: expected values whose scales are finite in .*, got .* up to 1e\+2"):
        quantize(torch.linspace(-1e20, 1e20, 64), name)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("int3", "form: expected nf4, .*fp8 or a Form, got 'int3'"),
        (Form("uint4", "nested_table8", 32, 8), "form: there is no recipe to quantize to code=uint4"),
        (Form("int4", "float16", offsets="zero_point8"), "form: there is no recipe"),
        (Form("uint4", "nested8", offsets="float16"), "form: there is no recipe"),
    ],
)
def test_forms_without_a_recipe(form: str | Form, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(torch.randn(8, 64), form)


def test_large_tensors_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(64, 128)
    expected = {name: quantize(w, name).packed for name in PRESETS}
    monkeypatch.setattr(qlora_ext.encoders, "_CODES_AT_ONCE", 500)
    assert all(torch.equal(quantize(w, name).packed, packed) for name, packed in expected.items())


@EVERY
def test_in_a_compiled_graph(name: str) -> None:
    w = torch.randn(8, 128)
    torch._dynamo.reset()  # each format compiles the same function anew
    compiled = torch.compile(lambda w: quantize(w, name).dequantize(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(w), quantize(w, name).dequantize())


def test_a_layer_whose_rows_a_form_does_not_have_is_named_before_any_is_replaced() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.Linear(48, 32))
    with pytest.raises(ValueError, match=r"^1: shape: expected rows of a multiple of 32 elements .*, got \[32, 48\]"):
        qlora_ext.quantize_model(model, **PRESETS["q8_0"].keywords)
    assert type(model[0]) is torch.nn.Linear
    qlora_ext.quantize_model(model, keep=["1"], **PRESETS["q8_0"].keywords)
    assert model[0].form == PRESETS["q8_0"]


@EVERY
def test_modules_quantize_to_it(name: str) -> None:
    linear = torch.nn.Linear(128, 48)
    layer = qlora_ext.nn.Linear4bit.from_linear(linear, **PRESETS[name].keywords)
    assert torch.equal(layer.dequantize(), quantize(linear.weight, name).dequantize())
    model = qlora_ext.quantize_model(torch.nn.Sequential(torch.nn.Linear(128, 48)), **PRESETS[name].keywords)
    assert model[0].form == PRESETS[name]
