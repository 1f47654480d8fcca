"""Scales for given importances and codes under given scales have the oracle's bits on every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import isas
import reference
from codec_checks import assert_bits
from encoding_samples import feedback_of, moments, weight
from samples import DTYPES

OPS = torch.ops.qlora
test_on, test_forced_instruction_set_runs = isas.test_on, isas.test_forced_instruction_set_runs

SHAPES = [(1, 64), (3, 64), (16, 192), (17, 96), (5, 100), (2, 1), (33, 31), (4, 7), (2, 1024)]


def check_search(w: torch.Tensor, block: int, code: str) -> None:
    importance = torch.rand(w.shape[1]) ** 4
    importance[::3] = 0
    expected = reference.search_absmax_nf4(w.float().numpy(), importance.numpy(), block, reference.CODES[code])
    assert_bits(OPS.search_absmax_nf4(w, importance, block, code), expected, "absmax")


def scales(w: torch.Tensor, block: int, code: str) -> torch.Tensor:
    """Scales larger and smaller than the blocks' magnitudes, negative and zero."""
    absmax = OPS.quantize_nf4(w, block, code)[1] * torch.linspace(0.3, 1.3, -(-w.numel() // block))
    absmax[0] *= -1
    absmax[-1] = 0 if absmax.numel() > 1 else absmax[-1]
    return absmax


def check_encode(w: torch.Tensor, block: int, code: str) -> None:
    absmax = scales(w, block, code)
    expected = reference.encode_nf4(w.float().numpy(), absmax.numpy(), block, reference.CODES[code])
    assert_bits(OPS.encode_nf4(w, absmax, block, None, None, code), expected, "codes")


def check_stochastic(w: torch.Tensor, block: int, code: str) -> None:
    absmax, table = scales(w, block, code), reference.CODES[code]
    for seed in (0, -1, 2**40 + 5, -(2**62) + 3):
        expected = reference.encode_nf4_stochastic(w.float().numpy(), absmax.numpy(), block, seed, table=table)
        assert_bits(OPS.encode_nf4_stochastic(w, absmax, block, seed, code), expected, f"codes of seed {seed}")


def check_feedback(w: torch.Tensor, block: int, code: str) -> None:
    absmax, (feedback, order) = OPS.quantize_nf4(w, block, code)[1] * 0.9, feedback_of(moments(w.shape[1]))
    given = (t.float().numpy() for t in (w, absmax, feedback))
    expected = reference.encode_with_feedback(*given, order.numpy(), block, reference.CODES[code])
    packed = OPS.encode_nf4(w, absmax, block, feedback, order, code)
    assert np.array_equal(reference.unpack(packed.numpy(), w.numel()).reshape(w.shape), expected)


each_check = pytest.mark.parametrize("check", [check_search, check_encode, check_stochastic, check_feedback])


@pytest.mark.parametrize("code", reference.CODE_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [16, 32, 64, 512])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@each_check
def test_the_oracles_bits(check: Callable, n: int, k: int, block: int, dtype: torch.dtype, code: str) -> None:
    check(weight(n, k, dtype), block, code)


@pytest.mark.parametrize("code", [code for code in reference.CODES if code not in reference.CODE_KINDS])
@each_check
def test_the_oracles_bits_of_other_codes(check: Callable, code: str) -> None:
    for n, k in ((17, 96), (5, 100), (33, 31), (2, 1)):
        for block in (16, 64):
            check(weight(n, k), block, code)


def test_scales_lower_the_weighted_error() -> None:
    w, importance = weight(64, 512), torch.rand(512) ** 8
    errors = []
    for absmax in (OPS.quantize_nf4(w, 64)[1], OPS.search_absmax_nf4(w, importance, 64)):
        packed = OPS.encode_nf4(w, absmax, 64)
        decoded = OPS.dequantize_nf4(packed, absmax, None, None, 64, 256, [64, 512], torch.float32)
        errors.append((((decoded - w) ** 2) * importance).sum().item())
    assert errors[1] < 0.9 * errors[0]


def test_scales_of_nothing_and_of_no_number() -> None:
    w = torch.zeros(2, 128)
    w[1, 3], w[1, 100] = float("inf"), 1.0
    absmax = OPS.search_absmax_nf4(w, torch.ones(128), 64)
    assert absmax[:2].tolist() == [0.0, 0.0]
    assert absmax[2].isnan()
    assert absmax[3] == 1.0
    assert (
        OPS.search_absmax_nf4(torch.ones(1, 64), torch.zeros(64), 64).item() == 1.0
    )  # all importances are 0, which gives plain scales


@pytest.mark.parametrize("code", reference.CODES)
@pytest.mark.parametrize("scale", [1.0, -2.0, 0.0, 1e-39, float("inf"), float("nan")])
def test_codes_of_weights_that_are_not_finite(scale: float, code: str) -> None:
    table = reference.CODES[code]
    w = weight(6, 64)
    w[0, 3], w[1, 4], w[2, 5] = float("nan"), float("inf"), -float("inf")
    absmax = torch.full((6,), scale)
    with np.errstate(invalid="ignore"):
        expected = reference.encode_nf4(w.numpy(), absmax.numpy(), 64, table)
    assert_bits(OPS.encode_nf4(w, absmax, 64, code=code), expected, "codes")
    feedback, order = feedback_of(moments(64))
    with np.errstate(invalid="ignore"):
        codes = reference.encode_with_feedback(w.numpy(), absmax.numpy(), feedback.numpy(), order.numpy(), 64, table)
    packed = OPS.encode_nf4(w, absmax, 64, feedback, order, code)
    assert np.array_equal(reference.unpack(packed.numpy(), w.numel()).reshape(6, 64), codes)


def test_the_padding_of_an_odd_number_is_the_code_of_zero() -> None:
    w = torch.full((1, 33), -3.0)
    for scale in (1.0, float("nan")):
        absmax = torch.full((3,), scale)
        assert OPS.encode_nf4(w, absmax, 16, None, None, "int4")[-1] & 15 == 8
        assert OPS.encode_nf4_stochastic(w, absmax, 16, 0, "int4")[-1] & 15 == 8


@pytest.mark.parametrize("code", reference.CODES)
def test_plain_scales_give_plain_codes(code: str) -> None:
    w = weight(7, 100)
    packed, absmax = OPS.quantize_nf4(w, 64, code)
    assert torch.equal(OPS.encode_nf4(w, absmax, 64, code=code), packed)


def test_feedback_lowers_the_error_of_outputs() -> None:
    w = weight(48, 256)
    correlated = torch.randn(1000, 24) @ torch.randn(24, 256) + 0.3 * torch.randn(1000, 256)
    h = correlated.T @ correlated / 1000
    x = torch.linalg.cholesky(h)
    absmax = OPS.quantize_nf4(w, 64)[1]
    errors = []
    for extra in ((), feedback_of(h)):
        packed = OPS.encode_nf4(w, absmax, 64, *extra)
        decoded = OPS.dequantize_nf4(packed, absmax, None, None, 64, 256, [48, 256], torch.float32)
        errors.append(((decoded - w) @ x).norm().item())
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int) -> None:
    w, importance, (feedback, order) = weight(70, 320), torch.rand(320), feedback_of(moments(320))
    before = torch.get_num_threads()
    results = []
    for count in (before, threads):
        torch.set_num_threads(count)
        absmax = OPS.search_absmax_nf4(w, importance, 64)
        results.append((absmax, OPS.encode_nf4(w, absmax, 64), OPS.encode_nf4(w, absmax, 64, feedback, order)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_invalid_arguments_are_rejected() -> None:
    w, absmax = weight(4, 64), torch.ones(4)
    feedback, order = torch.eye(64), torch.arange(64)
    refused = [
        (lambda: OPS.search_absmax_nf4(w, torch.ones(63), 64), "importance: expected shape"),
        (lambda: OPS.search_absmax_nf4(w, torch.ones(64).double(), 64), "importance: expected Float"),
        (lambda: OPS.search_absmax_nf4(w, torch.ones(64).index_fill(0, torch.tensor([7]), -0.5), 64), "got -0.5 at 7"),
        (lambda: OPS.search_absmax_nf4(w, torch.full((64,), torch.nan), 64), "importance: expected finite .* at 0"),
        (lambda: OPS.search_absmax_nf4(w, torch.full((64,), torch.inf), 64), "importance: expected finite .* got inf"),
        (lambda: OPS.encode_nf4(w, torch.ones(3), 64), "absmax: expected 4 elements"),
        (lambda: OPS.encode_nf4(w, absmax, 64, feedback, None), "order: expected with feedback"),
        (lambda: OPS.encode_nf4(w, absmax, 64, None, order), "feedback: expected with order"),
        (lambda: OPS.encode_nf4(w, absmax, 64, feedback[:63], order), "feedback: expected shape"),
        (lambda: OPS.encode_nf4(w, absmax, 64, feedback, order + 1), "order: expected each column"),
        (lambda: OPS.encode_nf4(w, absmax, 64, feedback, order * 0), "order: expected each column"),
        (lambda: OPS.encode_nf4(w, absmax, 64, -feedback, order), "feedback: expected a positive diagonal"),
        (lambda: OPS.encode_nf4(w.reshape(-1), absmax, 64, feedback, order), "w: expected shape"),
    ]
    for call, text in refused:
        with pytest.raises(ValueError, match=text):
            call()


@pytest.mark.parametrize("code", reference.CODES)
def test_stochastic_rounding_keeps_exact_values(code: str) -> None:
    w4 = OPS.quantize_nf4(weight(64, 512), 64, code)
    decoded = OPS.dequantize_nf4(*w4, None, None, 64, 256, [64, 512], torch.float32, code)
    for seed in range(3):
        assert torch.equal(OPS.encode_nf4_stochastic(decoded, w4[1], 64, seed, code), w4[0])


def test_stochastic_rounding_is_right_on_the_average() -> None:
    w = weight(64, 512)
    absmax = OPS.quantize_nf4(w, 64)[1]
    total = torch.zeros_like(w)
    for seed in range(200):
        packed = OPS.encode_nf4_stochastic(w, absmax, 64, seed)
        total += OPS.dequantize_nf4(packed, absmax, None, None, 64, 256, [64, 512], torch.float32)
    step = absmax.repeat_interleave(64).reshape(64, 512) * 0.31  # the widest gap between two values
    assert ((total / 200 - w).abs() < 5 * 0.5 * step / 200**0.5).all()
    other = OPS.encode_nf4_stochastic(w, absmax, 64, 1)
    assert not torch.equal(OPS.encode_nf4_stochastic(w, absmax, 64, 0), other)


def test_all_64_bits_of_a_seed_count() -> None:
    w = torch.randn(256, 256)
    absmax = OPS.quantize_nf4(w, 64)[1]
    folded = ((3 << 32) + 7, 7 + 3 * 0xC2B2AE3D)  # one random number for both halves
    errors = []
    for seed in (*folded, 0, 1, 1 << 32, 2 << 32, -1):
        packed = OPS.encode_nf4_stochastic(w, absmax, 64, seed)
        errors.append(
            (OPS.dequantize_nf4(packed, absmax, None, None, 64, 256, [256, 256], torch.float32) - w).flatten()
        )
    assert (torch.corrcoef(torch.stack(errors)) - torch.eye(len(errors))).abs().max() < 0.03


def test_stochastic_codes_of_no_number_and_the_arguments_that_are_refused() -> None:
    w = torch.full((1, 64), float("nan"))
    assert (OPS.encode_nf4_stochastic(w, torch.ones(1), 64, 0) == 0).all()
    assert OPS.encode_nf4_stochastic(torch.zeros(0, 64), torch.zeros(0), 64, 0).shape == (0, 32)
    with pytest.raises(ValueError, match="absmax: expected 1 element"):
        OPS.encode_nf4_stochastic(torch.zeros(1, 64), torch.ones(2), 64, 0)
    with pytest.raises(ValueError, match="block_size: expected a power of two"):
        OPS.encode_nf4_stochastic(torch.zeros(1, 64), torch.ones(1), 48, 0)
