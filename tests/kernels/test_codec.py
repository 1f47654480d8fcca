"""Encoding and decoding have the oracle's bits, on CUDA and on every instruction set of the CPU.

Each test here runs with the instruction set in use; `test_on` runs the whole file again, one process for each other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import isas
import reference
from codec_checks import (
    assert_bits,
    check_dequantize,
    check_quantize,
    check_quantize_absmax,
    free_memory,
    neighbourhoods,
    weights,
)
from qlora_ext import _C
from samples import DTYPES

OPS = torch.ops.qlora
BLOCK_SIZES = reference.BLOCK_SIZES
GOLDEN = Path(__file__).parents[1] / "data" / "bitsandbytes_nf4"
test_on, test_forced_instruction_set_runs = isas.test_on, isas.test_forced_instruction_set_runs
CHUNK = 16384  # the elements of a CTA on CUDA, several of the kernels' units


def on_devices(*names: str, cpu: Sequence[Any], cuda: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test by ``device`` and other names, with the rows for the CPU and those for CUDA."""
    rows = [("cuda", *row) for row in cuda] if isas.FORCED is None else []
    marked = [pytest.param(*row, marks=pytest.mark.cuda) for row in rows]
    return pytest.mark.parametrize(("device", *names), [*(("cpu", *row) for row in cpu), *marked])


each_device = on_devices(cpu=[()], cuda=[()])
each_code = on_devices("code", cpu=[(code,) for code in reference.CODES], cuda=[("nf4",)])


def numels(block: int, device: str = "cpu") -> list[int]:
    if device == "cuda":
        return [1, 2, 7, 33, block - 1, block, block + 1, 3 * block + 5, CHUNK - 2, CHUNK, 2 * CHUNK + 4097]
    around = [block * n + d for n in (1, 16, 17, 40) for d in (-1, 0, 1)]
    return sorted({1, 2, 3, 31, 32, 33, block // 2, 5 * block + 45, 3 * block + 32, 200 * 101 + 7, *around})


@pytest.mark.parametrize("code", reference.CODE_KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCK_SIZES)
@each_device
def test_every_length(device: str, block: int, dtype: torch.dtype, code: str) -> None:
    for numel in numels(block, device):
        w = weights(numel, dtype, device)
        packed, absmax = check_quantize(w, block, code)
        check_dequantize(packed, (absmax,), numel, block, code=code)
        for nested_block in (256, 32, 7):
            check_dequantize(packed, check_quantize_absmax(absmax, nested_block), numel, block, nested_block, code)


@each_device
def test_nothing(device: str) -> None:
    packed, absmax = check_quantize(torch.empty(0, 64, device=device), 64)
    codes, nested, offset = check_quantize_absmax(absmax, 256)
    assert packed.shape == (0, 32)
    assert codes.numel() == nested.numel() == 0
    assert offset == 0.0
    check_dequantize(packed, (absmax,), 0, 64)


@each_code
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_length(dtype: torch.dtype, device: str, code: str) -> None:
    for shape in [(1, 1), (3, 5), (7, 100), (33, 65), (64, 576), (2, 3, 34)]:
        w = weights(int(np.prod(shape)), dtype, device).reshape(shape)
        check_quantize(w, 64, code)
        check_quantize(w.transpose(0, -1), 64, code)


def test_out_of_cache_and_threads() -> None:
    """Large enough for non-temporal stores; the number of threads does not change the result."""
    numel = (9 << 20) + 77
    w = weights(numel, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            packed, absmax = OPS.quantize_nf4(w, 64)
            scales = OPS.quantize_absmax(absmax, 256)
            decoded = [OPS.dequantize_nf4(packed, *scales, 64, 256, [numel], dtype) for dtype in DTYPES]
            results.append([packed, absmax, *scales, *decoded])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_bits(a, b, "another number of threads")
    check_quantize(w, 64)
    check_dequantize(results[0][0], check_quantize_absmax(results[0][1], 256), numel, 64)


@each_code
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [16, 32, 64, 512])
def test_special_blocks(block: int, dtype: torch.dtype, device: str, code: str) -> None:
    base = torch.randn(400, block)
    base /= base.abs().amax(1, keepdim=True)
    for i in range(299):  # every power of two, including subnormal ones
        base[i] *= 2.0 ** max(i - 151, -126)
        base[i] *= 2.0 ** min(i - 151 + 126, 0)
    base[300] = 0.0
    base[301] = -0.0
    base[302] = torch.finfo(torch.float32).max
    base[303] = torch.finfo(torch.float32).tiny
    base[304], base[305] = 1.4e-45, -1.4e-45
    base[306], base[307] = 1e-38, 0.99e-38
    w = base.to(dtype)
    largest, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    w[308], w[309], w[310] = largest, -least, least
    w[311, 3] = -largest
    for i, position in enumerate((0, 1, 5, 15, block // 2, block - 1)):
        w[320 + i, position] = float("nan")
        w[330 + i, position] = float("inf")
        w[340 + i, position] = -float("inf")
    w[350] = float("nan")
    w = w.to(device)
    packed, absmax = check_quantize(w, block, code)
    assert torch.equal(absmax.isnan(), ~w.isfinite().all(1))
    least, zero = (int(reference.encode(np.float32([q]), reference.CODES[code])[0]) for q in (np.nan, 0.0))
    assert (packed[absmax.isnan()] == 17 * least).all()
    check_dequantize(packed, (absmax,), w.numel(), block, code=code)
    # An odd count that ends in a block that is not finite: the padding is still the code of zero.
    odd = w.reshape(-1)[: 321 * block - 1]
    packed, _ = check_quantize(odd, block, code)
    assert packed[-1] == 16 * least + zero
    # Nested scales of NaN, and of weights that are all finite.
    check_dequantize(*_nested(w[:300], block, code), code=code)
    check_dequantize(*_nested(w, block, code), code=code)


def _nested(w: torch.Tensor, block: int, code: str) -> tuple[torch.Tensor, tuple, int, int]:
    packed, absmax = check_quantize(w, block, code)
    return packed, check_quantize_absmax(absmax, 256), w.numel(), block


@each_code
def test_scales_no_quantizer_makes(device: str, code: str) -> None:
    """Any bytes are a valid packed weight, and any floats are valid scales."""
    packed = torch.arange(256, dtype=torch.uint8, device=device).repeat(64)
    numel = packed.numel() * 2
    patterns = np.random.default_rng(0).integers(0, 2**32, numel // 64, dtype=np.uint32)
    nan = (patterns & 0x7FFFFFFF) > 0x7F800000
    patterns[nan] = 0x7FC00000
    check_dequantize(packed, (torch.from_numpy(patterns.view(np.float32)).to(device),), numel, 64, code=code)
    codes = torch.arange(256, dtype=torch.uint8).repeat(2)
    for nested, offset in [(0.01, 0.03), (-2.0, 1.0), (1e-38, 1e-40), (3e38, 3e38), (float("nan"), 0.0)]:
        scales = tuple(t.to(device) for t in (codes, torch.full((2,), nested), torch.tensor(offset)))
        check_dequantize(packed, scales, numel, 64, code=code)


@each_code
@pytest.mark.parametrize("absmax", [1.0, 0.0371, 3.0517578e-05, 1.7e-37, 2.9e38])
def test_around_every_boundary(absmax: float, device: str, code: str) -> None:
    table = reference.CODES[code]
    values, _ = reference.ranked(table)
    most = reference.largest(table)
    points = np.concatenate([reference.midpoints(values), values[values != 0]])
    near = neighbourhoods(points, 400)
    near = near[np.abs(near) <= most]
    near = near[: near.size // 63 * 63].reshape(-1, 63)
    with np.errstate(under="ignore"):
        blocks = np.concatenate([np.full((near.shape[0], 1), most), near], axis=1) * np.float32(
            min(absmax, 2.7e38 / most)
        )
    check_quantize(torch.from_numpy(blocks).to(device), 64, code)
    check_quantize(torch.from_numpy(-blocks).to(device), 64, code)


@on_devices(
    *("limit", "code"),
    cpu=[(limit, code) for limit in (1.0, 0.125, 65504.0, 1e-4) for code in reference.CODE_KINDS],
    cuda=[(1.0, "nf4")],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_patterns(dtype: torch.dtype, device: str, limit: float, code: str) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).to(device)
    in_range = every[every.float().abs() <= limit]
    for block in (32, 4096):
        w = in_range[: in_range.numel() // (block - 1) * (block - 1)].reshape(-1, block - 1)
        check_quantize(torch.cat([torch.full_like(w[:, :1], limit), w], 1), block, code)
    check_quantize(every, 32, code)


@on_devices("ulps", cpu=[(300,)], cuda=[(100,)])
def test_around_every_scale_boundary(device: str, ulps: int) -> None:
    near = neighbourhoods(reference.midpoints(reference.DYNAMIC8), ulps)
    near = near[np.abs(near) <= 1.0]
    # With its mirror image, the mean is 0 and the largest magnitude 1, so that q is the value itself.
    values = np.concatenate([near, -near, [1.0, -1.0]]).astype(np.float32)
    codes, nested, offset = check_quantize_absmax(torch.from_numpy(values).to(device), values.size)
    assert offset == 0.0
    assert nested.item() == 1.0
    assert codes.unique().numel() == 256
    scale = torch.from_numpy(values * np.float32(0.0123)).to(device)
    check_quantize_absmax(scale, values.size)
    check_quantize_absmax(scale, 256)


@each_device
def test_the_mean_is_summed_in_order(device: str) -> None:
    for count in (1, 15, 16, 1023, 1025, 65535, 65536, 65537, 3 * 65536 + 1041):
        x = torch.exp(4 * torch.randn(count)) + 1e-3
        check_quantize_absmax(x.to(device), 256)


@each_device
def test_scales_that_are_not_finite(device: str) -> None:
    x = torch.rand(1000, device=device)
    for value in (float("nan"), float("inf")):
        x[777] = value
        codes, nested, offset = check_quantize_absmax(x, 256)
        assert not offset.isfinite()
        assert nested.isnan().all()
        assert not codes.any()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_floats(data: st.DataObject) -> None:
    block = data.draw(st.sampled_from(BLOCK_SIZES[:5]), "block")
    code = data.draw(st.sampled_from([*reference.CODES]), "code")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    limit = float(torch.finfo(dtype).max)
    width = 32 if dtype == torch.float32 else 16
    if dtype == torch.bfloat16:
        element = st.integers(0, 65535).map(lambda u: float(np.uint32(u << 16).view(np.float32)))
    else:
        element = st.floats(width=width) | st.floats(-1, 1, width=width) | st.sampled_from([limit, -limit])
    values = data.draw(st.lists(element, min_size=1, max_size=3 * block), "values")
    w = torch.tensor(values, dtype=torch.float32).to(dtype)
    packed, absmax = check_quantize(w, block, code)
    check_dequantize(packed, (absmax,), w.numel(), block, code=code)
    check_dequantize(packed, check_quantize_absmax(absmax, 32), w.numel(), block, 32, code)


def golden_cases() -> list[dict]:
    return json.loads(GOLDEN.with_suffix(".json").read_text())["cases"]


@pytest.mark.parametrize("case", golden_cases(), ids=lambda c: c["name"])
def test_golden(case: dict) -> None:
    """Golden data from bitsandbytes (tests/data)."""
    with np.load(GOLDEN.with_suffix(".npz")) as file:
        field = {k.split(".", 1)[1]: file[k] for k in file.files if k.startswith(case["name"] + ".")}
    if case["quant_type"] != "nf4":
        pytest.skip(f"{case['quant_type']} is not a format of this package")
    block, numel = case["blocksize"], int(np.prod(case["shape"]))
    if "w@bf16" in field:
        w = torch.from_numpy(field["w@bf16"]).view(torch.bfloat16)
    else:
        w = torch.from_numpy(field["w"])
    packed, absmax = check_quantize(w, block)
    assert_bits(packed, field["packed"].reshape(-1), "packed")
    if case["dq"]:
        scales = tuple(
            torch.from_numpy(np.atleast_1d(field[k]) if k != "offset" else field[k].reshape(()))
            for k in ("absmax_q", "nested_absmax", "offset")
        )
        theirs = reference.dequantize_absmax(*(s.numpy() for s in scales))
        ours = OPS.dequantize_absmax(*OPS.quantize_absmax(absmax, 256), 256).numpy()
        error = [np.abs(x - absmax.numpy()).mean() for x in (ours, theirs)]
        assert error[0] <= error[1]
    else:
        scales = (torch.from_numpy(field["absmax"]),)
        assert_bits(absmax, field["absmax"], "absmax")
    check_dequantize(packed, scales, numel, block)
    if "deq_f32" in field:
        nested = scales[1:] or (None, None)
        got = OPS.dequantize_nf4(packed, scales[0], *nested, block, 256, [numel], torch.float32)
        assert_bits(got, field["deq_f32"], "deq_f32")
        got = OPS.dequantize_nf4(packed, scales[0], *nested, block, 256, [numel], torch.bfloat16)
        assert_bits(got, field["deq_bf16@bf16"], "deq_bf16")


@pytest.mark.slow
@pytest.mark.skipif(isas.FORCED is not None, reason="once is enough: indices are the same on every instruction set")
@pytest.mark.skipif(free_memory() < 9 << 30, reason="needs 9 GB of free memory")
@each_device
def test_more_than_2_to_the_31_elements(device: str) -> None:
    numel = (1 << 31) + 4096 + 33
    w = torch.zeros(numel, dtype=torch.bfloat16, device=device)
    w[-8225:] = weights(8225, torch.bfloat16, device)
    packed, absmax = OPS.quantize_nf4(w, 64)
    start = (numel - 8225) // 64 * 64
    expected_packed, expected_absmax = reference.quantize_nf4(w[start:].float().cpu().numpy(), 64)
    assert_bits(packed[start // 2 :], expected_packed, "packed")
    assert_bits(absmax[start // 64 :], expected_absmax, "absmax")
    assert torch.all(packed[: start // 2] == 0x77)
    del w
    decoded = OPS.dequantize_nf4(packed, absmax, None, None, 64, 256, [numel], torch.bfloat16)
    expected = reference.dequantize_nf4(expected_packed, expected_absmax, numel - start, 64)
    assert_bits(decoded[start:], reference.bfloat16_bits(expected), "decoded")


@pytest.mark.parametrize("code", reference.CODE_KINDS)
@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_offsets(code: str, block: int) -> None:
    """A weight is round(round(value * scale) + offset), also where scales or offsets are not finite."""
    for numel in numels(block):
        rng = np.random.default_rng(numel)
        blocks = -(-numel // block)
        packed = rng.integers(0, 256, (numel + 1) // 2, dtype=np.uint8)
        absmax = np.abs(rng.standard_normal(blocks)).astype(np.float32)
        offsets = (rng.standard_normal(blocks) * rng.choice([0, 1e-3, 1, 1e3], blocks)).astype(np.float32)
        if blocks > 3:
            absmax[1], offsets[2], offsets[3] = np.inf, np.nan, -np.inf
        with np.errstate(invalid="ignore"):
            plain = reference.dequantize_nf4(packed, absmax, numel, block, reference.CODES[code])
            expected = plain + np.repeat(offsets, block)[:numel]
        got = _C.dequantize_nf4(packed, absmax, numel, block, code, offsets)
        number = ~np.isnan(expected)
        assert np.array_equal(np.isnan(got), ~number)
        assert_bits(got[number], expected[number], f"{numel} weights")
        assert_bits(_C.dequantize_nf4(packed, absmax, numel, block, code), plain, "without offsets")


def test_offsets_of_16_bit_scales_round_once() -> None:
    """Products of short values with 16-bit scales are exact, so decoders that fuse the two steps get the same bits:
    those of GGUF's Q4_1 and Q4_K, and of zero points."""
    rng = np.random.default_rng(0)
    numel, block = 64 * 512, 64
    packed = rng.integers(0, 256, numel // 2, dtype=np.uint8)
    for dtype in (np.float16, np.float32):  # float32: the bits of bfloat16
        scale, offset = (rng.standard_normal(numel // block).astype(dtype).astype(np.float32) for _ in range(2))
        if dtype is np.float32:
            scale, offset = ((t.view(np.uint32) & 0xFFFF0000).view(np.float32) for t in (scale, offset))
        values = reference.CODES["shuffled"][np.stack([packed >> 4, packed & 15], 1).reshape(-1)]
        scales, offsets = (np.repeat(t, block).astype(np.float64) for t in (scale, offset))
        once = (values * scales + offsets).astype(np.float32)
        assert_bits(_C.dequantize_nf4(packed, scale, numel, block, "shuffled", offset), once, str(dtype))


def test_offsets_are_checked() -> None:
    packed, absmax = np.zeros(64, np.uint8), np.ones(2, np.float32)
    with pytest.raises(ValueError, match="offsets: expected 2 elements, got 3"):
        _C.dequantize_nf4(packed, absmax, 128, 64, "nf4", np.zeros(3, np.float32))
