"""Weights of every form on the CPU, on every instruction set: decoding bit for bit, products by the accuracy rules."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

import forms
import isas
import reference
from codec_checks import assert_bits
from grouped_samples import assert_like_single_experts, grouped_sample
from operator_results import check_samples, dx, forward, gradient
from qlora_ext import _C, formats
from qlora_ext.form import Form
from qlora_ext.merging.codes import with_update
from qlora_ext.weight import Weight4bit, weight_of
from samples import DTYPES, LinearSample, linear_sample

OPS = torch.ops.qlora
test_on, test_forced_instruction_set_runs = isas.test_on, isas.test_forced_instruction_set_runs

MADE_UP = formats.code_name([0.3, -1.7, 2.0, 0.0, 5.5, -0.01, 1e-3, 4.0, -3.0, 0.7, 1.1, -5.0, 2.2, 3.3, -0.4, -2.5])
CODES = [*reference.CODES, MADE_UP]
# Of each format, and codes that are not integers.
FORMS = {
    **forms.FORMS,
    "made up": Form(MADE_UP, "float16", 32),
    "made up, offsets": Form(MADE_UP, "float16", 32, offsets="float16"),
}
WIDE_FORMS = forms.WIDE_FORMS
TENSORS = ("nested_absmax", "nested_offset", "scale_table", "block_offsets", "offset_scale")


def any_weight(form: Form, n: int, k: int, seed: int = 0) -> Weight4bit:
    """Random codes, and scales and offsets of any sign and of very different sizes, also 0."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor | None] = dict.fromkeys(TENSORS)
    for name, spec in form.tensors((n, k)).items():
        if spec.dtype == torch.uint8:
            t = torch.randint(256, spec.shape, generator=generator)
        else:
            t = torch.randn(spec.shape, generator=generator) * 2.0 ** torch.randint(
                -9, 9, spec.shape, generator=generator
            )
            t *= torch.rand(spec.shape, generator=generator) > 0.1
        tensors[name] = t.to(spec.dtype)
    return weight_of(form, **tensors, shape=torch.Size((n, k)), dtype=torch.float32)


@pytest.mark.parametrize("scales", formats.SCALE_FORMS)
@pytest.mark.parametrize("block", reference.BLOCK_SIZES)
def test_every_form_decodes_to_the_oracles_bits(block: int, scales: str) -> None:
    for code in CODES:
        for offsets in (None, *formats.OFFSET_FORMS):
            # Nested blocks of 5 blocks: one begins within every run of scales that is decoded together.
            w4 = any_weight(Form(code, scales, block, 5, offsets), 3, 11 * min(block, 256) + 37)
            decoded = forms.oracle(w4).reshape(-1)
            for dtype, expected in zip(
                DTYPES, (decoded, reference.bfloat16_bits(decoded), reference.float16_bits(decoded)), strict=True
            ):
                assert_bits(w4.dequantize(dtype), expected, f"{code[:20]} with {offsets} offsets, to {dtype}")


@pytest.mark.parametrize("scales", formats.SCALE_FORMS)
@pytest.mark.parametrize("block", reference.BLOCK_SIZES)
def test_every_form_of_wide_codes_decodes_to_the_oracles_bits(block: int, scales: str) -> None:
    for code, values in reference.WIDE_CODES.items():
        for offsets in (None, *formats.OFFSET_FORMS):
            w4 = any_weight(Form(code, scales, block, 5, offsets), 3, max(block, 32) * (1 if block > 512 else 3))
            if code in ("e4m3", "e5m2"):  # every code
                w4.packed.view(-1)[:256] = torch.arange(256)[: w4.numel()]
            decoded = forms.oracle(w4).reshape(-1)
            assert_bits(w4.dequantize(torch.float32), decoded, f"{code} with {offsets} offsets")
            assert_bits(w4.dequantize(torch.float16), reference.float16_bits(decoded), f"{code}, {offsets}, float16")
            assert len(values) == 1 << w4.form.bits


@pytest.mark.parametrize("nested_block", [5, 8])
@pytest.mark.parametrize("scales", formats.SCALE_FORMS)
def test_many_scales_at_once_decode_to_the_same_bits(
    scales: str, nested_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of unit vectors are columns of the weight. Their kernel reads the scales of 16 rows at once."""
    monkeypatch.setenv("QLORA_CPU_KERNEL", "few_tokens_float")
    n, k = 60, 33 * 32
    columns = torch.arange(0, k, 7)
    x = torch.zeros(len(columns), k)
    x[torch.arange(len(columns)), columns] = 1.0
    linear = ["linear table"] if scales == "nested_table8" else []
    for offsets in (None, *formats.OFFSET_FORMS, *linear):
        w4 = any_weight(Form("uint4", scales, 32, nested_block, None if offsets in linear else offsets), n, k)
        if offsets in linear:
            w4.scale_table.copy_(torch.arange(256) * torch.tensor(-0.3))
        y = OPS.linear_nf4(x, *w4.operands(n, None, None, None, 1.0, 0.0, 0, None))
        expected = w4.dequantize(torch.float32)
        if offsets == formats.ZERO_POINT8:  # the kernel adds -round(zero point * scale)
            codes = torch.stack([w4.packed >> 4, w4.packed & 15], -1).view(-1, 32)
            expected = codes * w4.decoded_scales()[:, None] + w4.decoded_offsets()[:, None]
        assert torch.equal(y, expected.view(n, k)[:, columns].T), offsets


def sample(form: Form, m: int, n: int, k: int, dtype: torch.dtype, seed: int = 0, rank: int | None = 3) -> LinearSample:
    s = linear_sample(m, n, k, rank, dtype, block_size=form.block_size, seed=seed)
    s.w4 = forms.random_weight(form, (n, k), seed, dtype)
    return s


def check(form: Form, case: tuple[int, int, int], dtype: torch.dtype, results: Callable) -> None:
    def make(seed: int) -> tuple[LinearSample, torch.Tensor]:
        s = sample(form, *case, dtype, seed)
        return s, gradient(s, seed + 1000)

    check_samples(results, make)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_products_of_every_format(name: str, dtype: torch.dtype) -> None:
    for case in ((1, 512, 320), (3, 150, 333), (17, 40, 192), (65, 130, 100)):
        check(FORMS[name], case, dtype, forward)
        check(FORMS[name], case, dtype, dx)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WIDE_FORMS)
def test_products_of_wide_codes(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kernel that takes them, and of the chosen ones. Rows end with, and within, a group of 64."""
    form = WIDE_FORMS[name]
    for kernel in ("", "few_tokens_float", "many_tokens_float"):
        for m, n, k in ((1, 510, 384), (3, 150, 640), (6, 37, 128), (65, 130, 256), (5, 41, 96), (30, 41, 160)):
            if k % form.block_size:
                continue
            for op, results in (("linear_nf4", forward), ("linear_nf4_dx", dx)):
                if kernel and str(dtype)[6:] not in _C.kernels(op).get(kernel, []):
                    continue
                if kernel == "few_tokens_float" and (m > 64 or (dtype == torch.float32 and op != "linear_nf4")):
                    continue
                monkeypatch.setenv("QLORA_CPU_KERNEL", kernel)
                check(form, (m, n, k), dtype, results)


@pytest.mark.parametrize("kernel", ["few_tokens_int", "few_tokens_bf16", "many_tokens_int", "many_tokens_int8"])
def test_kernels_for_4_bits_refuse_wide_codes(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CPU_KERNEL", kernel)
    s = sample(WIDE_FORMS["q8_0"], 2, 256, 256, torch.bfloat16)
    with pytest.raises(ValueError, match=f"^QLORA_CPU_KERNEL: {kernel} of .* does not take"):
        OPS.linear_nf4(*s.args)


@pytest.mark.parametrize("kernel", ["few_tokens_float", "many_tokens_float"])
@pytest.mark.parametrize(
    "form", [WIDE_FORMS["q8_0"], Form("int5", "float32", 32), Form("e5m2", "bfloat16", 16)], ids=str
)
def test_rows_of_wide_codes_do_not_read_the_next_row(form: Form, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 96 end within a group of 64."""
    monkeypatch.setenv("QLORA_CPU_KERNEL", kernel)
    n, k = 9, 96
    w4 = forms.random_weight(form, (n, k))
    w4.absmax.view(n, -1)[1::2] = torch.inf
    x = torch.rand(3, k).bfloat16()
    y = OPS.linear_nf4(x, *w4.operands(n, None, None, None, 1.0, 0.0, 0, None))
    expected = x.float() @ w4.dequantize(torch.float32)[::2].T
    torch.testing.assert_close(y[:, ::2].float(), expected, rtol=0.02, atol=0.02)


def test_rows_of_wide_codes_are_whole_blocks_and_units() -> None:
    x, scales = torch.randn(2, 48), torch.ones(12)
    with pytest.raises(
        ValueError, match="^packed: expected rows of a multiple of 32 elements in int5 with blocks of 16"
    ):
        OPS.linear_nf4(
            x, torch.zeros(4, 30, dtype=torch.uint8), scales, None, None, 16, 256, 4, None, None, None, 1.0, 0.0, 0,
            code="int5",
        )  # fmt: skip
    with pytest.raises(
        ValueError, match="^packed: expected rows of a multiple of 64 elements in int8 with blocks of 64"
    ):
        OPS.linear_nf4(
            x, torch.zeros(4, 48, dtype=torch.uint8), scales, None, None, 64, 256, 4, None, None, None, 1.0, 0.0, 0,
            code="int8",
        )  # fmt: skip
    with pytest.raises(ValueError, match="^code: expected a code of 4 bits, got e4m3"):
        OPS.quantize_nf4(torch.randn(4, 64), 64, "e4m3")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.offsets is not None])
def test_products_of_long_rows_with_offsets(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several segments of x, of whole blocks (K = 2176) and of parts of blocks."""
    monkeypatch.setenv("QLORA_CPU_KERNEL", "few_tokens_int" if "made up" not in name else "")
    for case in ((1, 300, 2176), (19, 70, 2176), (5, 90, 1100), (3, 90, 1101)):
        check(FORMS[name], case, dtype, forward)


def kernels(op: str) -> list[tuple[str, str]]:
    return [(op, kernel) for kernel, dtypes in _C.kernels(op).items() if dtypes and kernel != "float64"]


@pytest.mark.parametrize(("op", "kernel"), [*kernels("linear_nf4"), *kernels("linear_nf4_dx")])
@pytest.mark.parametrize("name", FORMS)
def test_products_of_every_kernel(name: str, op: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CPU_KERNEL", kernel)
    form, served = FORMS[name], 0
    for dtype in DTYPES:
        if str(dtype)[6:] not in _C.kernels(op)[kernel]:
            continue
        for case in ((2, 320, 256), (5, 135, 328)):
            with contextlib.suppress(ValueError):  # the kernel does not take the form
                check(form, case, dtype, forward if op == "linear_nf4" else dx)
                served += 1
    integers = kernel == "few_tokens_int"
    refuses = (
        (kernel == "many_tokens_int" and (form.block_size < 32 or form.code == MADE_UP))
        or (form.offsets is not None and kernel == "few_tokens_bf16")
        or (integers and form.code == MADE_UP)
        or (integers and op == "linear_nf4_dx" and (form.offsets is not None or form.block_size < 64))
    )
    assert bool(served) != refuses


INFINITE = {  # what is infinite -> formats
    "scale": ["nf4 alone", "int4", "q4_1", "float32 offsets"],
    "offset": ["q4_1", "bfloat16 offsets"],
    "end of a row": ["float32 offsets"],
    "begin of a row": ["float32 offsets"],
}


def infinite_weight(form: Form, what: str, n: int, k: int) -> Weight4bit:
    """Positive weights. The block with the end of the third and the beginning of the fourth row has an infinite scale
    or offset, or a scale that is too large for the weights of one of these rows."""
    w4 = forms.random_weight(form, (n, k))
    codes = torch.randint(9, 16, (n * k + 1,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes[n * k] = 0
    row, block = 3 * k, (3 * k - 1) // form.block_size
    if what in ("scale", "offset"):
        w4.tensors["absmax" if what == "scale" else "block_offsets"][block] = torch.inf
    else:
        w4.absmax[block] = 1e38
        codes[block * form.block_size : row] = 15 if what == "end of a row" else 2
        codes[row : (block + 1) * form.block_size] = 15 if what == "begin of a row" else 2
    w4.packed.view(-1).copy_((codes[:-1:2] * 16 + codes[1::2])[: w4.packed.numel()])
    return w4


@pytest.mark.parametrize(("op", "kernel"), [*kernels("linear_nf4"), *kernels("linear_nf4_dx")])
@pytest.mark.parametrize("k", [131, 132, 134, 136])
@pytest.mark.parametrize("what", INFINITE)
def test_padding_is_not_multiplied_by_infinite_weights(
    what: str, k: int, op: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_CPU_KERNEL", kernel)
    n, g = 21, torch.Generator().manual_seed(1)
    for name in INFINITE[what]:
        w4 = infinite_weight(FORMS[name], what, n, k)
        w = w4.dequantize(torch.float32).double()
        assert w.isinf().any()
        assert (w > 0).all()
        for dtype, m in itertools.product(DTYPES, (1, 6, 40)):
            x = (torch.rand(m, k if op == "linear_nf4" else n, generator=g) * 0.01 + 0.005).to(dtype)
            with contextlib.suppress(ValueError):  # the kernel does not take the type, the form or the shape
                if op == "linear_nf4":
                    y = OPS.linear_nf4(x, *w4.operands(n, None, None, None, 1.0, 0.0, 0, None))
                    expected = (x.double() @ w.T).to(dtype)
                else:
                    y = OPS.linear_nf4_dx(x, *w4.operands(k, None, None, 1.0, 0.0, 0, None))
                    expected = (x.double() @ w).to(dtype)
                # A product of an infinite weight may be finite where its scale is.
                exempt = expected.isinf() & torch.tensor("of a row" in what)
                assert torch.allclose(y[~exempt], expected[~exempt], rtol=0.02), f"{name}, {dtype}, {m} tokens"


def test_float64_is_exact() -> None:
    for form in (*FORMS.values(), *WIDE_FORMS.values()):
        s = sample(form, 3, 5, 128, torch.float64, rank=None)
        s.x, s.bias = s.x.double(), None
        np.testing.assert_allclose(OPS.linear_nf4(*s.args).numpy(), s.expected(), rtol=1e-12, atol=1e-12)


def error(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> float:
    """The error of a product of float16, over that of rounding the exact result."""
    exact = x.double() @ w.double().T
    return float((y.double() - exact).norm() / (exact.half().double() - exact).norm())


@pytest.mark.parametrize("largest", [1, 5, 7, 9, 12, 15])
@pytest.mark.parametrize("form", [Form("int4", "bfloat16", 32), Form("uint4", "float16", 32, offsets="zero_point8")])
def test_exact_weights_and_one_large_input(form: Form, largest: float) -> None:
    """Products of float16 with weights that are exact in it leave only the rounding of the output."""
    g = torch.Generator().manual_seed(0)
    shape = torch.Size((512, 1024))
    blocks = shape.numel() // 32
    tensors = {"absmax": torch.full((blocks,), 2.0**-7).to(form.tensors(shape)["absmax"].dtype)}
    if form.offsets:
        tensors["block_offsets"] = torch.full((blocks,), 8, dtype=torch.uint8)
    packed = torch.randint(256, (512, 512), generator=g, dtype=torch.uint8)
    fields = {name: tensors.get(name) for name in TENSORS} | {"packed": packed, "absmax": tensors["absmax"]}
    w4 = weight_of(form, **fields, shape=shape, dtype=torch.float32)
    x = torch.randn(4, 1024, generator=g).sign() * (1 + torch.rand(4, 1024, generator=g) / 10)
    x[:, 5] = largest
    x = x.half()
    y = OPS.linear_nf4(x, *w4.operands(512, None, None, None, 1.0, 0.0, 0, None))
    assert error(y, x, w4.dequantize(torch.float32)) <= 1.05


def test_offsets_that_cancel_values_far_from_zero() -> None:
    code, g = formats.code_name([8176.0 + i for i in range(16)]), torch.Generator().manual_seed(0)
    packed = torch.randint(0, 2, (64, 512), generator=g, dtype=torch.uint8) * 17
    scales, offsets = torch.full((2048,), 2.0**-8).half(), torch.full((2048,), -8176 * 2.0**-8)
    options = {"dtype": torch.float32, "block_size": 32, "code": code, "block_offsets": offsets}
    w4 = Weight4bit(packed, scales, shape=(64, 1024), **options)
    x = torch.randn(4, 1024, generator=g).half()
    y = OPS.linear_nf4(x, *w4.operands(64, None, None, None, 1.0, 0.0, 0, None))
    assert error(y, x, w4.dequantize(torch.float32)) <= 1.05


@pytest.mark.parametrize("m", [1, 5, 70])
def test_a_weight_that_decodes_to_zero_is_zero_in_a_product(m: int) -> None:
    """Scaling and adding the offset are two roundings in products too, so that they cancel where they do decoded."""
    for code in (7, 11, 13):
        packed = torch.full((8, 16), 17 * code, dtype=torch.uint8)
        scales, zero_points = torch.full((8,), 0.1), torch.full((8,), code, dtype=torch.uint8)
        options = {"dtype": torch.float32, "block_size": 32, "code": "uint4", "block_offsets": zero_points}
        w4 = Weight4bit(packed, scales, shape=(8, 32), **options)
        assert not w4.dequantize().any()
        for dtype in DTYPES:
            x = torch.full((m, 32), 1e4, dtype=dtype)
            y = OPS.linear_nf4(x, *w4.operands(8, None, None, None, 1.0, 0.0, 0, None))
            dx = OPS.linear_nf4_dx(x[:, :8].contiguous(), *w4.operands(32, None, None, 1.0, 0.0, 0, None))
            assert not y.any()
            assert not dx.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 4, 40])
@pytest.mark.parametrize("name", ["zero points", "offsets", "e2m1", "negative scales"])
def test_an_identity_weight_returns_its_input(name: str, m: int, dtype: torch.dtype) -> None:
    """Weights of 0 add nothing, also where they are the difference of a value and an offset."""
    k, block = 256, 32
    form, zero, one, scale = {
        "zero points": (Form("uint4", "float16", block, offsets="zero_point8"), 7, 8, 1.0),
        "offsets": (Form("uint4", "float16", block, offsets="float16"), 11, 12, 1.0),
        "e2m1": (Form("e2m1", "float16", block), 0, 2, 1.0),
        "negative scales": (Form("int4", "float16", block), 8, 7, -1.0),
    }[name]
    codes = torch.full((k, k), zero).fill_diagonal_(one)
    packed = (codes[:, 0::2] * 16 + codes[:, 1::2]).to(torch.uint8)
    blocks = k * k // block
    tensors: dict[str, torch.Tensor | None] = dict.fromkeys(TENSORS)
    tensors |= {"packed": packed, "absmax": torch.full((blocks,), scale, dtype=torch.float16)}
    if form.offsets == "zero_point8":
        tensors["block_offsets"] = torch.full((blocks,), zero, dtype=torch.uint8)
    elif form.offsets:
        tensors["block_offsets"] = torch.full((blocks,), -float(zero), dtype=torch.float16)
    w4 = weight_of(form, **tensors, shape=torch.Size((k, k)), dtype=dtype)
    assert torch.equal(w4.dequantize(torch.float32), torch.eye(k))
    x = (torch.randn(m, k) * 10.0 ** torch.randint(-3, 3, (m, k))).to(dtype)
    x[:, 5] = 0
    y = OPS.linear_nf4(x, *w4.operands(k, None, None, None, 1.0, 0.0, 0, None))
    assert torch.equal(y, x)
    zeros = torch.full_like(packed, 17 * zero)
    y = OPS.linear_nf4(x, *w4.replace(packed=zeros).operands(k, None, None, None, 1.0, 0.0, 0, None))
    assert not y.any()


@pytest.mark.parametrize("name", ["mxfp4", "q4_k", "awq", "made up", *WIDE_FORMS])
def test_experts_of_every_form(name: str) -> None:
    form = (FORMS | WIDE_FORMS)[name]
    assert_like_single_experts(grouped_sample([2, 0, 3], k=256, dtype=torch.bfloat16, form=form))


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.offsets is not None])
def test_an_update_is_merged_under_scales_and_offsets(name: str) -> None:
    """Codes move to a neighbouring value, on the average by the update; the scales and offsets stay."""
    w4 = forms.random_weight(FORMS[name], (48, 256))
    w, update = w4.dequantize(torch.float32), torch.full((48, 256), 1e-3)
    merged = with_update(w4, w + update)
    for tensor in ("absmax", "block_offsets"):
        assert torch.equal(merged.tensors[tensor], w4.tensors[tensor])
    moved = merged.dequantize(torch.float32) - w
    blocks = w.reshape(-1, w4.block_size)
    inside = (blocks + 1e-3 <= blocks.amax(1, keepdim=True)).reshape(w.shape)  # what its block can hold
    assert moved[inside].mean() == pytest.approx(1e-3, rel=0.2)
    # Rounding w - offset may move a code where the scale is far smaller than the offset.
    assert (with_update(w4, w).packed == w4.packed).double().mean() > 0.999


def test_names_of_made_up_codes() -> None:
    digits = MADE_UP[2:]
    values = reference.F32([0.3, -1.7, 2.0])
    assert np.array_equal(_C.code_values(MADE_UP)[:3], values)
    assert np.array_equal(_C.code_values("0x" + digits.upper()), _C.code_values(MADE_UP))
    for name in ("0x", "0x" + digits[1:], "0x" + digits + "0", "0X" + digits, "0x" + "g" + digits[1:], digits):
        with pytest.raises(ValueError, match="^code: expected nf4, .*, or 0x and the 128 hexadecimal digits of 16 flo"):
            _C.code_values(name)
    for word in ("7f800000", "ff800000", "7fc00000"):
        with pytest.raises(ValueError, match="^code: expected 16 finite float32 values, got"):
            _C.code_values("0x" + word + digits[8:])
    with pytest.raises(ValueError, match="^code: expected a value other than 0, got 16 zeros"):
        _C.code_values("0x" + "00000000" * 15 + "80000000")
    for value in (2.0**-61, 2.0**61):
        with pytest.raises(
            ValueError, match=r"^code: expected values with a largest magnitude from 2\^-60 to 2\^60, got"
        ):
            _C.code_values(formats.code_name([value] * 16))
    packed, absmax = torch.zeros(32, dtype=torch.uint8), torch.ones(1)
    with pytest.raises(ValueError, match="^code: expected 16 finite"):
        OPS.dequantize_nf4(packed, absmax, None, None, 64, 256, [64], torch.float32, "0x" + "7f800000" * 16)


def test_a_name_with_the_values_of_a_listed_code_is_that_code() -> None:
    w, x = torch.randn(48, 128), torch.randn(3, 128).bfloat16()
    for code, values in reference.CODES.items():
        name = "0x" + values.astype(">f4").tobytes().hex()
        packed, absmax = OPS.quantize_nf4(w, 64, code)
        assert torch.equal(OPS.quantize_nf4(w, 64, name)[0], packed)
        y, by_name = (
            OPS.linear_nf4(x, packed, absmax, None, None, 64, 256, 48, None, None, None, 1.0, 0.0, 0, None, c)
            for c in (code, name)
        )
        assert torch.equal(y, by_name)


def test_made_up_codes_are_limited_and_interned_once_by_any_thread() -> None:
    program = """
import struct, threading
from qlora_ext import _C
name = lambda i: "0x" + struct.pack(">16f", *([1.0] * 15), 2.0 + i).hex()
def intern():
    for i in range(4096):
        assert _C.code_values(name(i))[15] == 2.0 + i
threads = [threading.Thread(target=intern) for _ in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
try:
    _C.code_values(name(4096))
except ValueError as error:
    print(error)
assert _C.code_values(name(7))[15] == 9.0
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert run.stdout.strip() == "code: expected at most 4096 made-up codes in a process, got another"
