"""many_tokens_int: which tokens and weight rows it leaves to float32, and that each is computed by its own values alone.

QLORA_CPU_KERNEL, which conftest.py sets for the whole run, is read by every call.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import isas
import qlora_ext
from qlora_ext import _C
from qlora_ext import NF4Weight

test_on = isas.test_on
OPS = torch.ops.qlora
HALF = [torch.bfloat16, torch.float16]
M, N, K, RANK = 70, 200, 1152, 5  # three pieces of x

pytestmark = pytest.mark.skipif(not _C.kernels("linear_nf4")["many_tokens_int"], reason="the set has no such kernel")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    assert "QLORA_CPU_KERNEL" in os.environ, "it must be there before the first call"

    def call(kernel: str, x: Tensor, w4: NF4Weight, rank: int = RANK) -> Tensor:
        monkeypatch.setenv("QLORA_CPU_KERNEL", kernel)
        g = torch.Generator().manual_seed(3)
        n, k = w4.shape
        draw = [torch.randn(shape, generator=g).to(x.dtype) for shape in ((n,), (rank, k), (n, rank))]
        bias, a, b = draw[0], *(draw[1:] if rank else (None, None))
        return OPS.linear_nf4(x, *w4.packed_args(), n, bias, a, b, 0.01, 0.2, 7)

    return call


def weight(n: int = N, k: int = K) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1))


def tokens(dtype: torch.dtype) -> tuple[Tensor, list[int]]:
    """x, and the tokens that integers cannot serve."""
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(2))
    x[3, 5] = 1e4  # an outlier
    x[17, : K // 2] = 0
    x[18] *= 1e-30 if dtype == torch.bfloat16 else 1.0
    x[18, 64:70] = float("nan")
    x[40, 1151] = float("inf")
    x[41, 400:700] *= 1e-4
    x[42] = 0  # served
    x[60] = x[60].sign()  # served: all sums over a chain are as large as they can be
    x[69, 0] = 3e4
    return x.to(dtype), [3, 17, 18, 40, 41, 69]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_tokens_that_integers_cannot_serve_get_the_bits_of_float32(run: Callable, dtype: torch.dtype) -> None:
    w4 = qlora_ext.quantize_nf4(weight())
    x, uneven = tokens(dtype)
    y, in_float = run("many_tokens_int", x, w4), run("many_tokens_float", x, w4)
    differ = [i for i in range(M) if not torch.equal(y[i].nan_to_num(), in_float[i].nan_to_num())]
    assert not set(uneven) & set(differ)
    assert len(differ) >= M - len(uneven) - 1, "integers serve all others; one is zero"


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_token_depends_on_itself_alone(run: Callable, dtype: torch.dtype) -> None:
    w4 = qlora_ext.quantize_nf4(weight())
    x, uneven = tokens(dtype)
    y = run("many_tokens_int", x, w4, 0)
    order = torch.randperm(M, generator=torch.Generator().manual_seed(4))
    assert torch.equal(run("many_tokens_int", x[order], w4, 0).nan_to_num(), y[order].nan_to_num())
    even = [i for i in range(M) if i not in uneven]
    assert torch.equal(run("many_tokens_int", x[even], w4, 0), y[even])
    assert torch.equal(run("many_tokens_int", x[uneven + even[:20]], w4, 0).nan_to_num(), y[uneven + even[:20]].nan_to_num())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rows_that_depend_on_a_few_weights_get_the_bits_of_float32(run: Callable, dtype: torch.dtype) -> None:
    w = weight()
    rows = [0, 7, 8, 9, 100, N - 1]
    for row in rows:
        w[row] = 0
        w[row, row : row + 3] = 1.0
    w[50] = 0  # served
    x, _ = tokens(dtype)
    w4 = qlora_ext.quantize_nf4(w)
    y, in_float = run("many_tokens_int", x, w4), run("many_tokens_float", x, w4)
    assert torch.equal(y[:, rows].nan_to_num(), in_float[:, rows].nan_to_num())
    assert not torch.equal(y[:, 10].nan_to_num(), in_float[:, 10].nan_to_num())
    infinite = w4.packed_args()[1]  # of row 33; no other row changes
    assert infinite.dtype == torch.float32
    infinite[33 * K // 64] = float("inf")
    changed = run("many_tokens_int", x, w4)
    others = [n for n in range(N) if n != 33]
    assert torch.equal(changed[:, others].nan_to_num(), y[:, others].nan_to_num())
    assert not changed[:, 33].isfinite().any()

