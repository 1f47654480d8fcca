"""The CPU kernels for few tokens, compared with the float64 oracle on every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import accuracy
import isas
import qlora_ext
import reference
from accuracy import assert_accurate
from operator_results import check_samples, dx, forward, gradient
from samples import DTYPES, linear_sample, to_f64

test_on = isas.test_on
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def case(m: int, n: int, k: int, dtype: torch.dtype = BF16, rank: int = 16, **options: Any) -> dict[str, Any]:
    return {"m": m, "n": n, "k": k, "dtype": dtype, "rank": rank, **options}


CASES = [
    *(case(m, 96, 320, dtype) for m in range(1, 17) for dtype in DTYPES),
    # K: full chunks, half chunks, short lanes, bytes that span rows; N: tails of a tile
    *(case(m, n, k) for m in (1, 3, 16) for n, k in ((33, 576), (48, 64), (257, 96), (40, 32), (64, 4096), (19, 2112))),
    *(
        case(m, n, k, dtype)
        for dtype in DTYPES
        for m in (1, 5, 16)
        for n, k in ((130, 100), (77, 333), (61, 1030), (150, 33), (70, 255), (90, 7), (1, 2049), (1, 192), (513, 1))
    ),
    *(case(m, n, k, F32) for m in (1, 3, 8) for n, k in ((130, 100), (77, 333), (61, 1030), (64, 4097))),
    *(
        case(2, 64, k, dtype, block_size=b)
        for dtype in DTYPES
        for b in reference.BLOCK_SIZES
        for k in (512, 1000, 4097)
    ),
    *(case(4, 80, k, dtype, double_quant=False) for dtype in DTYPES for k in (256, 300, 515)),
    *(case(m, 100, 384, dtype, r) for dtype in DTYPES for m in (1, 7) for r in (0, 1, 5, 64, 256)),
    *(case(3, 72, k, dtype, dropout_p=0.3) for dtype in DTYPES for k in (256, 131)),
    case(9, 31, 9000, F16, 0, bias=False),
    # dx: rows of W in several slabs, and columns in several ranges
    *(case(m, 1100, 640, dtype) for m in (1, 5, 16) for dtype in (BF16, F16)),
    *(case(16, 530, k, F16, dropout_p=0.3) for k in (17000, 17024)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()))
@pytest.mark.parametrize("results", [forward, dx])
def test_results(case: dict, results: Callable) -> None:
    s = linear_sample(**case)
    check_samples(results, lambda seed: (s, gradient(s)), 0)


@pytest.mark.parametrize("nested", [256, 96])
@pytest.mark.parametrize("m", [1, 7])
def test_nested_scales_are_those_of_the_format(m: int, nested: int) -> None:
    """Where the inner loop decodes nested scales, it computes the same bits as with the decoded scales. Rows that are
    summed in float32 lie among the others, and nested blocks begin within rows."""
    n, k = 150, 576
    w = torch.randn(n, k)
    w[70], w[133, 5:] = 0.0, 0.0
    weight = qlora_ext.quantize_nf4(w, nested_block_size=nested)
    absmax = torch.ops.qlora.dequantize_absmax(weight.absmax, weight.nested_absmax, weight.nested_offset, nested)
    x = torch.randn(m, k).to(torch.bfloat16)
    none = (n, None, None, None, 1.0, 0.0, 0, None)
    y = torch.ops.qlora.linear_nf4(x, *weight.operands(*none))
    assert torch.equal(y, torch.ops.qlora.linear_nf4(x, weight.packed, absmax, None, None, 64, 256, *none))


def test_dx_of_rows_of_very_different_size() -> None:
    """Large gradients with small rows of W and vice versa: neither determines how the other is rounded."""
    n, k, m = 32, 256, 2
    size = torch.where(torch.arange(n) % 2 == 0, 1e3, 1e-3)
    weight = qlora_ext.quantize_nf4(torch.randn(n, k) * size[:, None], double_quant=False)
    dy = (torch.randn(m, n) / size).to(torch.bfloat16)
    out = torch.ops.qlora.linear_nf4_dx(dy, *weight.operands(k, None, None, 1.0, 0.0, 0, None))
    w = to_f64(weight.dequantize())
    assert_accurate(out, accuracy.dx(to_f64(dy), w, None, None, 1.0, 0.0, 0, dy.dtype))
