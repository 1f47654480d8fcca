"""Weights of every code, with scales and offsets in every form, on CUDA, decoded to an oracle's bits and multiplied."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import accuracy
from accuracy import assert_accurate
from codec_checks import assert_bits
from forms import WIDE_FORMS, oracle, random_weight
from operator_results import check_samples, dx, forward
from qlora_ext import _C, formats
from qlora_ext.form import Form
from qlora_ext.weight import Weight4bit
from samples import DTYPES, LinearSample, rows, to_f64

pytestmark = pytest.mark.cuda
OPS = torch.ops.qlora
MADE_UP = formats.code_name([0.375 * i * (-1) ** i for i in range(16)])
CODES = (*_C.codes(), "shuffled", MADE_UP)
BF16, FP16 = torch.bfloat16, torch.float16


# Each form once, and the pairs that checkpoints have: Q4_1, GPTQ and AWQ, and Q4_K.
FORMS = [(scales, "no") for scales in formats.SCALE_FORMS] + [("float32", offsets) for offsets in formats.OFFSET_FORMS]
FORMS += [("float16", "float16"), ("float16", "zero_point8"), ("nested_table8", "scaled8"), ("nested8", "bfloat16")]


def weight(
    shape: tuple[int, ...],
    code: str,
    scales: str,
    offsets: str = "no",
    block: int = 64,
    nested_block: int = 256,
    seed: int = 0,
) -> Weight4bit:
    """Random codes under random scales, on the CPU. Values of a table that no scale has are NaN, as two are of FP8."""
    form = Form(code, scales, block, nested_block, None if offsets == "no" else offsets)
    w4 = random_weight(form, shape, seed)
    if w4.scale_table is not None:
        assert int(w4.absmax.max()) < 64
        w4.scale_table[64:] = float("nan")
    return w4


def decoded(w4: Weight4bit) -> Tensor:
    return torch.from_numpy(oracle(w4))


@pytest.mark.parametrize("code", CODES, ids=lambda code: code[:8])
@pytest.mark.parametrize(("scales", "offsets"), FORMS)
def test_decoded_bits(scales: str, offsets: str, code: str) -> None:
    for block, nested_block, numel in [(16, 8, 5003), (32, 7, 4096), (64, 256, 20_000), (512, 4, 6000), (4096, 1, 33)]:
        w4 = weight((1, numel), code, scales, offsets, block, nested_block)
        on_card, expected = w4.to("cuda"), decoded(w4)
        for dtype in DTYPES:
            assert_bits(on_card.dequantize(dtype), expected.to(dtype), f"blocks of {block} to {dtype}")


@pytest.mark.parametrize("code", formats.WIDE_CODES)
@pytest.mark.parametrize(("scales", "offsets"), FORMS)
def test_decoded_bits_of_wide_codes(scales: str, offsets: str, code: str) -> None:
    """Of every code, with negative scales, in chunks and what is left of them, and at any address."""
    shapes = {(16, 8): (3, 1120), (32, 7): (1, 544), (128, 256): (2, 1152), (4096, 1): (1, 4096)}
    for (block, nested_block), shape in shapes.items():
        w4 = weight(shape, code, scales, offsets, block, nested_block)
        if w4.absmax.is_floating_point():
            w4.absmax.view(-1)[::2].neg_()
        if w4.form.bits == 8:
            w4.packed.view(-1)[:256] = torch.arange(256)
        on_card, expected = w4.to("cuda"), decoded(w4)
        for dtype in DTYPES:
            assert_bits(on_card.dequantize(dtype), expected.to(dtype), f"blocks of {block} to {dtype}")
    shifted = torch.empty(w4.packed.numel() + 1, dtype=torch.uint8, device="cuda")[1:].copy_(w4.packed.view(-1))
    tensors = (on_card.absmax, on_card.nested_absmax, on_card.nested_offset, block, nested_block, shape)
    rest = (on_card.scale_table, on_card.block_offsets, on_card.offset_scale)
    bits = OPS.dequantize_nf4(shifted, *tensors, torch.float32, code, *rest)
    assert_bits(bits, expected, "one byte further")


@pytest.mark.parametrize("code", ["uint4", "int4", "e2m1", MADE_UP], ids=lambda code: code[:8])
@pytest.mark.parametrize("scales", formats.SCALE_FORMS)
def test_zero_points_are_subtracted_before_scaling(scales: str, code: str) -> None:
    """The difference is multiplied by the scale in one rounding, also by a negative one, which gives -0."""
    for block, numel, largest in [(16, 5003, 15), (64, 20_000, 255), (512, 6000, 15)]:
        w4 = weight((1, numel), code, scales, "zero_point8", block)
        w4.block_offsets.copy_(torch.randint(0, largest + 1, w4.block_offsets.shape))
        if w4.absmax.is_floating_point():
            w4.absmax[::2].neg_()
        for dtype in DTYPES:
            assert_bits(w4.to("cuda").dequantize(dtype), decoded(w4).to(dtype), f"blocks of {block} to {dtype}")


def normal(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to("cuda", dtype)


def scaled_to(w4: Weight4bit) -> float:
    """The factor for operands of LoRA that makes its product as large as the weight's."""
    return float(decoded(w4).square().mean().sqrt()) / 0.05


def check(w4: Weight4bit, m: int, dtype: torch.dtype) -> None:
    """The forward and dX, with LoRA."""
    (n, k), g = w4.shape, torch.Generator().manual_seed(1)
    a = (torch.randn(4, k, generator=g) * k**-0.5).to("cuda", dtype)
    b = (torch.randn(n, 4, generator=g) * 0.2).to("cuda", dtype)
    s = LinearSample(normal((m, k), dtype), w4.to("cuda"), None, a, b, scaled_to(w4), 0.0, 0)
    for results in (forward, dx):
        check_samples(results, lambda seed: (s, normal((m, n), dtype)), 0)


# (m, n, k, block): few tokens, many, tails of every size, blocks that span rows, small blocks, shapes without tensor
# cores, and the library.
SHAPES = [(3, 200, 320, 64), (9, 136, 192, 128), (40, 152, 320, 64), (20, 72, 128, 32), (5, 72, 192, 16)]
SHAPES += [(5, 72, 96, 32), (7, 33, 48, 16), (4, 31, 45, 32), (70, 40, 64, 64)]


@pytest.mark.parametrize(("m", "n", "k", "block"), SHAPES)
@pytest.mark.parametrize(("scales", "offsets"), FORMS)
def test_forms(scales: str, offsets: str, m: int, n: int, k: int, block: int) -> None:
    for dtype in (BF16, torch.float32):
        w4 = weight((n, k), "fp4", scales, offsets, block, nested_block=8)
        check(w4, m, dtype)


@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("code", CODES, ids=lambda code: code[:8])
def test_codes(code: str, m: int) -> None:
    for dtype in (BF16, FP16):
        for block, scales, offsets in [(64, "float16", "no"), (32, "table8", "no"), (32, "float16", "zero_point8")]:
            w4 = weight((136, 256), code, scales, offsets, block)
            check(w4, m, dtype)


@pytest.mark.parametrize("m", [1, 4, 7, 16, 33, 70])
@pytest.mark.parametrize("scales", ["float16", "float32", "nested8"])
@pytest.mark.parametrize("code", ["uint4", "int4"])
def test_zero_points(code: str, scales: str, m: int) -> None:
    """Ragged tiles of rows, tokens and splits, and zero points beyond those of any format."""
    for dtype in (BF16, FP16):
        for n, k, block in [(136, 640, 64), (72, 1088, 64), (200, 256, 128)]:
            w4 = weight((n, k), code, scales, "zero_point8", block)
            if n == 72:
                w4.block_offsets.copy_(torch.randint(0, 256, w4.block_offsets.shape))
            check(w4, m, dtype)


@pytest.mark.parametrize("m", [1, 6, 16, 40, 70])
@pytest.mark.parametrize("block", [32, 64])
def test_weights_whose_value_is_the_zero_point_are_zero(block: int, m: int) -> None:
    n, k = 72, 192
    for code, lowest in (("uint4", 0), ("int4", 8)):
        for value in (1, 5, 7):
            w4 = weight((n, k), code, "float32", "zero_point8", block)
            w4.absmax.fill_(0.1)
            w4.packed.fill_(17 * (value + lowest))
            w4.block_offsets.fill_(value)
            on_card = w4.to("cuda")
            assert not on_card.dequantize().any()
            no_lora = (None, None, 1.0, 0.0, 0, None)
            for dtype in DTYPES:
                x, dy = (torch.full((m, size), 1e4, dtype=dtype, device="cuda") for size in (k, n))
                y = OPS.linear_nf4(x, *on_card.operands(n, None, *no_lora))
                dx = OPS.linear_nf4_dx(dy, *on_card.operands(k, *no_lora))
                assert not y.any()
                assert not dx.any()


def test_encoding_with_a_made_up_code_is_rejected() -> None:
    with pytest.raises(ValueError, match="code: .*CPU"):
        OPS.quantize_nf4(torch.ones(64).cuda(), 64, MADE_UP)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("code", ["e2m1", "int4", "uint4", "iq4_nl"])
@pytest.mark.parametrize("m", [16, 64])
def test_exact_values_stay_exact(m: int, code: str, dtype: torch.dtype) -> None:
    """Every value of these codes times a power of two is a number of the 16-bit types, and so is a product with 1."""
    n = 128
    packed = torch.arange(16, dtype=torch.uint8).repeat(n * 64 // 16)
    packed = (packed[0::2] << 4 | packed[1::2]).contiguous()
    w4 = Weight4bit(packed, torch.full((n,), 2.0**-9), shape=(n, 64), dtype=torch.float32, code=code)
    on_card, w = w4.to("cuda"), decoded(w4)
    x = torch.eye(64).to("cuda", dtype)[:m]
    y = OPS.linear_nf4(x, *on_card.operands(n, None, None, None, 1.0, 0.0, 0, None))
    assert torch.equal(y.float().cpu(), w.T[:m])
    dy = torch.eye(n).to("cuda", dtype)[:m]
    dx = OPS.linear_nf4_dx(dy, *on_card.operands(64, None, None, 1.0, 0.0, 0, None))
    assert torch.equal(dx.float().cpu(), w[:m])


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize(("block", "scales", "offsets"), [(64, s, o) for s, o in FORMS] + [(16, "table8", "float16")])
def test_experts(block: int, scales: str, offsets: str, dtype: torch.dtype) -> None:
    """Each expert has its own tables. Rows after the last offset are zeros."""
    weights = [weight((72, 128), "int4", scales, offsets, block, 8, seed) for seed in range(5)]
    if scales.endswith("table8"):
        for e, w4 in enumerate(weights):
            w4.scale_table.mul_(e + 1)
    check_experts(weights, dtype)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("name", WIDE_FORMS)
def test_experts_of_wide_codes(name: str, dtype: torch.dtype) -> None:
    check_experts([random_weight(WIDE_FORMS[name], (72, 128), seed) for seed in range(5)], dtype)


def check_experts(weights: list[Weight4bit], dtype: torch.dtype) -> None:
    (n, k), counts = weights[0].shape, [0, 5, 0, 17, 2]
    stack = Weight4bit.stack(weights).to("cuda")
    ends = torch.tensor(counts).cumsum(0).cuda()
    x, dy = normal((sum(counts) + 3, k), dtype), normal((sum(counts) + 3, n), dtype)
    no_lora = (None, None, 1.0, 0.0, 0, None)
    y = OPS.grouped_linear_nf4(x, ends, *stack.operands(n, None, *no_lora))
    dx = OPS.grouped_linear_nf4_dx(dy, ends, *stack.operands(k, *no_lora))
    begin = 0
    for w4, count in zip(weights, counts, strict=True):
        own, w = slice(begin, begin + count), to_f64(decoded(w4))
        if count:
            assert_accurate(y[own], accuracy.forward(rows(x[own]), w, None, None, None, 1.0, 0.0, 0, dtype))
            assert_accurate(dx[own], accuracy.dx(rows(dy[own]), w, None, None, 1.0, 0.0, 0, dtype))
        begin += count
    assert not y[begin:].any()
    assert not dx[begin:].any()
