"""The accuracy rules on simulated results: correct results pass for any order of summation, and defects fail."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import accuracy
from accuracy import rounded
from samples import DTYPES

M, N, K = 48, 300, 1024
HALF = [torch.bfloat16, torch.float16]


def operands(dtype: torch.dtype, k: int = K) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [M, K], w [N, K] with float32's digits, bias [N]."""
    g = np.random.default_rng(k)
    x, bias = rounded(g.standard_normal((M, k)), dtype), rounded(g.standard_normal(N), dtype)
    return x, rounded(0.05 * g.standard_normal((N, k)), torch.float32), bias


def expected(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, dtype: torch.dtype) -> accuracy.Expected:
    return accuracy.forward(x, w, bias, None, None, 1.0, 0.0, 0, dtype)


def sum32(x: np.ndarray, w: np.ndarray, piece: int, kept: torch.dtype = torch.float32) -> np.ndarray:
    """x wᵀ in float32: sums the terms of each piece sequentially, then the pieces, with partial sums in a dtype."""
    x32, w32 = x.astype(np.float32), w.astype(np.float32)
    out = np.zeros((len(x), len(w)), np.float32)
    for k0 in range(0, x.shape[1], piece):
        part = np.zeros_like(out)
        for k in range(k0, min(k0 + piece, x.shape[1])):
            part = rounded(part + x32[:, k, None] * w32[None, :, k], kept).astype(np.float32)
        out = rounded(out + part, kept).astype(np.float32)
    return out.astype(np.float64)


def truncated(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    bits = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}[dtype]
    return (x.astype(np.float32).view(np.int32) >> bits << bits).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "piece"), [(1, 1), (7, 7), (64, 64), (1024, 32), (1024, 64)])
def test_a_faithful_result_passes(k: int, piece: int, dtype: torch.dtype) -> None:
    x, w, bias = operands(dtype, k)
    y = rounded(sum32(x, rounded(w, dtype), piece) + bias, dtype)
    assert expected(x, w, bias, dtype).failures(y) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_scale_may_be_applied_to_the_sum_of_a_block(dtype: torch.dtype) -> None:
    """Weights without rounding, which is more accurate than the formula."""
    x, w, bias = operands(dtype)
    assert expected(x, w, bias, dtype).failures(rounded(sum32(x, w, 64) + bias, dtype)) == []


# Each is a kernel with one mistake: (x, w, bias, dtype) -> y.
Kernel = Callable[[np.ndarray, np.ndarray, np.ndarray, torch.dtype], np.ndarray]


def drops_the_last_product(x, w, bias, dtype) -> np.ndarray:
    return rounded(sum32(x[:, :-1], rounded(w, dtype)[:, :-1], 64) + bias, dtype)


def has_one_wrong_code(x, w, bias, dtype) -> np.ndarray:
    w = w.copy()
    w[7, 100] += 0.02
    return rounded(sum32(x, rounded(w, dtype), 64) + bias, dtype)


def forgets_a_bias(x, w, bias, dtype) -> np.ndarray:
    bias = bias.copy()
    bias[np.abs(bias).argmin()] = 0.0
    bias[3] = 0.0
    return rounded(sum32(x, rounded(w, dtype), 64) + bias, dtype)


def rounds_x_shorter(x, w, bias, dtype) -> np.ndarray:
    """Truncates float32 and float16 to bfloat16, and bfloat16 by one bit."""
    x = rounded(x, torch.bfloat16)
    if dtype == torch.bfloat16:
        scale = 2.0 ** (np.floor(np.log2(np.abs(x) + 1e-30)) - 6)
        x = np.round(x / scale) * scale
    return rounded(sum32(x, rounded(w, dtype), 64) + bias, dtype)


def keeps_its_sums_in_bfloat16(x, w, bias, dtype) -> np.ndarray:
    return rounded(sum32(x, rounded(w, dtype), 64, torch.bfloat16) + bias, dtype)


def truncates_the_result(x, w, bias, dtype) -> np.ndarray:
    y = sum32(x, rounded(w, dtype), 64) + bias
    return truncated(y, dtype) if dtype != torch.float32 else truncated(y, torch.float16)


def truncates_the_weight(x, w, bias, dtype) -> np.ndarray:
    w = truncated(w, dtype) if dtype != torch.float32 else truncated(w, torch.float16)
    return rounded(sum32(x, w, 64) + bias, dtype)


def scales_one_block_wrong(x, w, bias, dtype) -> np.ndarray:
    """Changes one scale by a step of a nested scale."""
    w = w.copy()
    w[5, 64:128] *= 1.02
    return rounded(sum32(x, rounded(w, dtype), 64) + bias, dtype)


def swaps_two_tokens_products(x, w, bias, dtype) -> np.ndarray:
    x = x.copy()
    x[[3, 4], 9] = x[[4, 3], 9]
    return rounded(sum32(x, rounded(w, dtype), 64) + bias, dtype)


DEFECTS: list[Kernel] = [
    drops_the_last_product,
    has_one_wrong_code,
    forgets_a_bias,
    rounds_x_shorter,
    keeps_its_sums_in_bfloat16,
    truncates_the_result,
    truncates_the_weight,
    scales_one_block_wrong,
    swaps_two_tokens_products,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", DEFECTS)
def test_a_defect_fails(kernel: Kernel, dtype: torch.dtype) -> None:
    x, w, bias = operands(dtype)
    assert expected(x, w, bias, dtype).failures(kernel(x, w, bias, dtype)) != []


@pytest.mark.parametrize("outlier", [1e3, 1e4, 6e4])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_tokens_of_15_bits_fail_next_to_an_outlier_and_pass_without(dtype: torch.dtype, outlier: float) -> None:
    """x as int16 with one scale per token: as accurate as 16-bit products unless one channel is large."""
    x, w, bias = operands(dtype)
    w[:, 11] *= 1e-3
    for size in (1.0, outlier):
        x[:, 11] = rounded(np.full(M, size), dtype)
        step = np.abs(x).max(axis=1, keepdims=True) / 16383
        y = rounded(sum32(np.round(x / step) * step, w, 64) + bias, dtype)
        assert (expected(x, w, bias, dtype).failures(y) == []) == (size == 1.0)


def test_zero_weights_add_nothing() -> None:
    x, w, _ = operands(torch.bfloat16)
    w[:, :] = 0.0
    e = expected(x, w, None, torch.bfloat16)
    assert e.failures(np.zeros((M, N))) == []
    y = np.zeros((M, N))
    y[3, 4] = 1e-30
    assert len(e.failures(y)) > 0


def test_subnormal_numbers_are_no_zeros() -> None:
    x, w, _ = operands(torch.bfloat16)
    x = rounded(x * 1e-39, torch.bfloat16)
    e = expected(x, w * 20, None, torch.bfloat16)
    assert e.failures(rounded(e.exact, torch.bfloat16)) == []
    assert e.failures(np.zeros((M, N))) != []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_results_fail(value: float) -> None:
    x, w, bias = operands(torch.float32)
    e = expected(x, w, bias, torch.float32)
    y = e.formula.copy()
    y[40, 299] = value
    assert e.failures(y)[0].startswith("1 of 14400 entries")
