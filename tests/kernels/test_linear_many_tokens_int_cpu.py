"""many_tokens_int: which tokens and parts of a weight it leaves to float32, and that each depends on itself alone.

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
from qlora_ext import _C, NF4Weight, Weight4bit

test_on = isas.test_on
OPS = torch.ops.qlora
FORWARD, DX = "linear_nf4", "linear_nf4_dx"
CASES = [(FORWARD, torch.bfloat16), (FORWARD, torch.float16), (DX, torch.bfloat16)]
M, SUMMED, OUTPUTS, RANK = 80, 1152, 640, 5  # several pieces of x and slices of dy
UNEVEN = [3, 17, 18, 40, 41, 69]  # the tokens of tokens() that integers cannot serve

pytestmark = pytest.mark.skipif(not _C.kernels(FORWARD)["many_tokens_int"], reason="the set has no such kernel")
each_case = pytest.mark.parametrize(("op", "dtype"), CASES, ids=lambda v: str(v))
Run = Callable[..., Tensor]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    assert "QLORA_CPU_KERNEL" in os.environ, "it must be there before the first call"

    def call(
        kernel: str, op: str, x: Tensor, w4: Weight4bit, rank: int = RANK, dropout: float = 0.2, has_bias: bool = True
    ) -> Tensor:
        monkeypatch.setenv("QLORA_CPU_KERNEL", kernel)
        g = torch.Generator().manual_seed(3)
        n, k = w4.shape
        bias, a, b = (torch.randn(shape, generator=g).to(x.dtype) for shape in ((n,), (rank, k), (n, rank)))
        adapter = (a if rank else None, b if rank else None, 0.01, dropout, 7, None)
        if op == DX:
            return OPS.linear_nf4_dx(x, *w4.operands(k, *adapter))
        return OPS.linear_nf4(x, *w4.operands(n, bias if has_bias else None, *adapter))

    return call


def matrix() -> Tensor:
    """[OUTPUTS, SUMMED]: W for the forward, and transposed for dX."""
    return torch.randn(OUTPUTS, SUMMED, generator=torch.Generator().manual_seed(1))


def quantized(op: str, w: Tensor) -> NF4Weight:
    return qlora_ext.quantize_nf4(w if op == FORWARD else w.T.contiguous(), double_quant=False)


def tokens(dtype: torch.dtype) -> Tensor:
    x = torch.randn(M, SUMMED, generator=torch.Generator().manual_seed(2))
    x[3, 5] = 1e4  # an outlier
    x[17, :600] = 0  # of a piece of x and of a chain of dy more than a quarter, but not all
    x[18, 64:70] = float("nan")
    x[40, SUMMED - 1] = float("inf")
    x[41, 400:700] *= 1e-4
    x[42] = 0
    x[43, :576] *= 1e-6  # dX: whole chains, which have steps of their own
    x[44, :576] = 0
    x[60] = x[60].sign()  # the sum of every chain of products is as large as it can be
    x[69, 0] = 3e4
    return x.to(dtype)


def check_columns(y: Tensor, x: Tensor, w: Tensor) -> None:
    """That each column of y = x @ w is as accurate as the same product of w in the dtype of x."""
    exact = x.double() @ w.double()
    formula = (x.double() @ w.to(x.dtype).double()).to(x.dtype)
    errors, of_formula = ((out.double() - exact).norm(dim=0) for out in (y, formula))
    assert (errors <= 1.05 * of_formula).all()


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


@each_case
def test_tokens_that_integers_cannot_serve_get_the_bits_of_float32(run: Run, op: str, dtype: torch.dtype) -> None:
    w4, x = quantized(op, matrix()), tokens(dtype)
    y, in_float = (run(kernel, op, x, w4) for kernel in ("many_tokens_int", "many_tokens_float"))
    assert same(y[UNEVEN], in_float[UNEVEN])
    differ = [i for i in range(M) if not same(y[i], in_float[i])]
    in_float = UNEVEN if op == DX else [*UNEVEN, 43, 44]
    assert sorted({*differ, *in_float, 42}) == list(range(M)), "integers serve all others"


@each_case
def test_a_token_depends_on_itself_alone(run: Run, op: str, dtype: torch.dtype) -> None:
    w4, x = quantized(op, matrix()), tokens(dtype)
    y = run("many_tokens_int", op, x, w4, RANK, 0.0)
    even = [i for i in range(M) if i not in (*UNEVEN, 43, 44)]
    for chosen in (torch.randperm(M).tolist(), even, UNEVEN + even[:62]):  # more than 64 tokens
        assert same(run("many_tokens_int", op, x[chosen], w4, RANK, 0.0), y[chosen])


@pytest.mark.parametrize("run_length", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_do_not_overflow(run: Run, dtype: torch.dtype, run_length: int) -> None:
    """The products of large values fill some chains, whatever columns a chain sums; the others have small ones."""
    is_large = torch.arange(SUMMED) // run_length % 2 == 0
    x = torch.where(is_large, 1.0, 1 / 15).repeat(3, 1).to(dtype)
    y = run("many_tokens_int", FORWARD, x, quantized(FORWARD, torch.ones(64, SUMMED)), 0)
    in_float = run("many_tokens_float", FORWARD, x, quantized(FORWARD, torch.ones(64, SUMMED)), 0)
    assert torch.allclose(y, in_float, rtol=2 * torch.finfo(dtype).eps)


@each_case
def test_outputs_that_depend_on_a_few_weights_get_the_bits_of_float32(run: Run, op: str, dtype: torch.dtype) -> None:
    w, x = matrix(), tokens(dtype)
    few = [0, 7, 8, 9, 63] if op == FORWARD else [0]
    for i in few:
        w[i] = 0
        w[i, i : i + 3] = 1.0
    w[150] = 0 if op == FORWARD else w[150]
    w4 = quantized(op, w)
    y, in_float = (run(kernel, op, x, w4) for kernel in ("many_tokens_int", "many_tokens_float"))
    assert same(y[:, few], in_float[:, few])
    assert not same(y[:, 70], in_float[:, 70])
    # An infinite scale and a NaN reach their own outputs.
    outputs = [100] if op == FORWARD else list(range(64, 128))
    others = [i for i in range(OUTPUTS) if i not in outputs]
    for value in (float("inf"), float("nan")):
        w4.absmax[100 * SUMMED // 64 if op == FORWARD else 1] = value
        infinite = run("many_tokens_int", op, x, w4)
        assert same(infinite[:, others], y[:, others])
        assert not infinite[:, outputs].isfinite().any()


def test_weight_rows_of_different_size(run: Run) -> None:
    """dX: a row that is much larger than the others of its chain leaves its columns to float32. One that is a few times
    as large does not."""
    dy = torch.randn(65, SUMMED, generator=torch.Generator().manual_seed(6)).bfloat16()
    for factor, served in ((100.0, False), (4.0, True)):
        w = matrix()
        w[:, 5::64] *= factor
        w4 = quantized(DX, w)
        y, in_float = (run(kernel, DX, dy, w4, 0) for kernel in ("many_tokens_int", "many_tokens_float"))
        assert torch.equal(y, in_float) != served
        check_columns(y, dy, w4.dequantize(torch.float32))


FORMS = {
    "blocks of 32": qlora_ext.Form("int4", "float16", 32),
    "nf4 of 32": qlora_ext.Form("nf4", "float32", 32),
    "q4_1": qlora_ext.Form("uint4", "float16", 32, offsets="float16"),
    "zero points": qlora_ext.Form("uint4", "float16", 256, offsets="zero_point8"),  # blocks begin in the middle of rows
}


@pytest.mark.parametrize("name", FORMS)
@each_case
def test_small_blocks_and_offsets(run: Run, op: str, dtype: torch.dtype, name: str) -> None:
    """Integers serve all of an ordinary weight, and whatever it cannot serve has the bits of float32."""
    w = matrix()
    w4 = qlora_ext.quantize(w if op == FORWARD else w.T.contiguous(), FORMS[name])
    x = tokens(dtype)
    calls = ("many_tokens_int", "many_tokens_float")
    y, in_float = (run(kernel, op, x, w4, 0) for kernel in calls)
    even = [i for i in range(60) if i not in (*UNEVEN, 42, 43, 44)]
    assert same(y[UNEVEN], in_float[UNEVEN])
    assert not any(same(y[i], in_float[i]) for i in even)
    decoded = w4.dequantize(torch.float32)
    check_columns(run(calls[0], op, x, w4, 0, has_bias=False)[even], x[even], decoded.T if op == FORWARD else decoded)


@each_case
def test_weights_that_nearly_cancel_their_offsets_get_the_bits_of_float32(
    run: Run, op: str, dtype: torch.dtype
) -> None:
    """All weights of an output are far smaller than the offsets and the values of which they are sums."""
    w = matrix()
    form = qlora_ext.Form("uint4", "float32", 32, offsets="float32")
    w4 = qlora_ext.quantize(w if op == FORWARD else w.T.contiguous(), form)
    n, k = w4.shape
    scales, offsets = (w4.tensors[name].view(n, k // 32) for name in ("absmax", "block_offsets"))
    rows, blocks = (slice(70, 72), slice(None)) if op == FORWARD else (slice(None), slice(2, 4))
    offsets[rows, blocks] = -8 * scales[rows, blocks]
    w4.packed.view(n, k // 32, 16)[rows, blocks] = 0x88
    x = tokens(dtype)
    y, in_float = (run(kernel, op, x, w4, 0) for kernel in ("many_tokens_int", "many_tokens_float"))
    outputs = rows if op == FORWARD else slice(64, 128)
    assert same(y[:, outputs], in_float[:, outputs])
    assert not same(y[:, 200:], in_float[:, 200:])
