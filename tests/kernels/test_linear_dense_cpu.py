"""The products of a dense 16-bit weight in float32, compared with float64 on every instruction set."""

from __future__ import annotations

import pytest
import torch

import isas
from accuracy import Expected, assert_accurate, given, sums
from samples import rows

test_on, test_forced_instruction_set_runs = isas.test_on, isas.test_forced_instruction_set_runs
OPS = torch.ops.qlora
SHAPES = [  # m, n, k
    (0, 48, 64),
    (1, 1, 1),
    (1, 130, 333),
    (1, 300, 2240),
    (2, 17, 640),
    (4, 77, 1030),
    (5, 65, 200),
    (3, 0, 5),
    (3, 5, 0),
    (9, 5, 0),
    (17, 33, 63),
    (33, 100, 7),
    (65, 48, 577),
    (300, 1, 130),
    (40, 300, 1100),
    (530, 770, 72),
    (257, 1000, 600),  # the largest blocks of the output
]


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, weight, bias, dy. Some values are 10^4 times the others."""
    g = torch.Generator().manual_seed(m + n + k)
    x, weight, bias, dy = (torch.randn(*shape, generator=g) for shape in ((m, k), (n, k), (n,), (m, n)))
    for t in (x, dy):
        t.view(-1)[::97] *= 1e4
    return x, weight.to(dtype), bias, dy


def forward_accuracy(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Expected:
    added = 0.0 if bias is None else bias.double().numpy()
    return sums([(given(rows(x)), given(rows(weight).T), 1.0)], added, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_products(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = shape
    x, weight, bias, dy = operands(m, n, k, dtype)
    for b in (bias, None):
        y = OPS.linear_dense(x, weight, b)
        assert y.dtype == torch.float32
        assert y.shape == (m, n)
        if y.numel():
            assert_accurate(y, forward_accuracy(x, weight, b))
    dx = OPS.linear_dense_dx(dy, weight)
    assert dx.dtype == torch.float32
    assert dx.shape == (m, k)
    if dx.numel():
        assert_accurate(dx, sums([(given(rows(dy)), given(rows(weight)), 1.0)], 0.0, torch.float32))


@pytest.mark.parametrize("m", [1, 4, 5, 80, 300])
def test_threads_do_not_change_a_bit(m: int) -> None:
    x, weight, bias, dy = operands(m, 500, 330, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = OPS.linear_dense(x, weight, bias), OPS.linear_dense_dx(dy, weight)
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(OPS.linear_dense(x, weight, bias), one[0])
            assert torch.equal(OPS.linear_dense_dx(dy, weight), one[1])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("m", [3, 40])
def test_infinity_and_nan_stay_in_their_tokens(m: int) -> None:
    x, weight, _, dy = operands(m, 50, 100, torch.bfloat16)
    y, dx = OPS.linear_dense(x, weight), OPS.linear_dense_dx(dy, weight)
    x[1, 99], dy[2, 49] = float("inf"), float("nan")
    bad_y, bad_dx = OPS.linear_dense(x, weight), OPS.linear_dense_dx(dy, weight)
    assert not bad_y[1].isfinite().any()
    assert bad_dx[2].isnan().all()
    tokens = torch.arange(m)
    assert torch.equal(bad_y[tokens != 1], y[tokens != 1])
    assert torch.equal(bad_dx[tokens != 2], dx[tokens != 2])


def test_any_strides_and_leading_dimensions_of_x() -> None:
    x, weight, bias, _ = operands(6, 20, 30, torch.bfloat16)
    expected = OPS.linear_dense(x, weight, bias)
    assert torch.equal(OPS.linear_dense(x.T.contiguous().T, weight, bias), expected)
    assert torch.equal(OPS.linear_dense(x.view(2, 3, 30), weight, bias).view(6, 20), expected)
    assert OPS.linear_dense(x[0], weight).shape == (20,)


def test_wrong_arguments_are_named() -> None:
    x, weight, bias, dy = operands(6, 20, 30, torch.bfloat16)
    for call, message in (
        (lambda: OPS.linear_dense(x.bfloat16(), weight), "x: expected Float, got BFloat16"),
        (lambda: OPS.linear_dense(x, weight.float()), "weight: expected bfloat16 or float16, got Float"),
        (lambda: OPS.linear_dense(x, weight[0]), r"weight: expected shape \[out_features, in_features\], got \[30\]"),
        (lambda: OPS.linear_dense(x, weight.T), "weight: expected a contiguous tensor"),
        (lambda: OPS.linear_dense(x[:, 1:], weight), r"x: expected 30 as the last dimension .* got shape \[6, 29\]"),
        (lambda: OPS.linear_dense(x, weight, bias[1:]), r"bias: expected shape \[20\]"),
        (lambda: OPS.linear_dense(x, weight, bias.bfloat16()), "bias: expected the dtype of x"),
        (lambda: OPS.linear_dense_dx(x, weight), r"dy: expected 20 as the last dimension .* got shape \[6, 30\]"),
        (lambda: OPS.linear_dense_dx(dy.double(), weight), "dy: expected Float, got Double"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_gradients_of_x_and_bias() -> None:
    x, weight, bias, dy = operands(6, 20, 30, torch.bfloat16)
    x.requires_grad_()
    bias.requires_grad_()
    OPS.linear_dense(x, weight, bias).backward(dy)
    assert torch.equal(x.grad, OPS.linear_dense_dx(dy, weight))
    torch.testing.assert_close(bias.grad, dy.sum(0))
    with pytest.raises(ValueError, match="weight: expected a frozen weight"):
        OPS.linear_dense(x, weight.requires_grad_())
