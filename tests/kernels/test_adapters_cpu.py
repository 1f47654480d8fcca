"""Several adapters in one call, by every kernel: the rows have the bits of the call with their adapter alone."""

from __future__ import annotations

import pytest
import torch

import isas
from adapter_samples import batch, check_bits, dx_args
from qlora_ext import _C
from samples import DTYPES

test_on = isas.test_on


@pytest.mark.parametrize("m", [1, 5, 9, 40])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_rows_have_the_bits_of_their_adapter_alone(dtype: torch.dtype, m: int) -> None:
    check_bits(batch(m, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [4, 30])
@pytest.mark.parametrize("seeds", [None, [3, 4, 5, -6]])
def test_dropout_has_the_mask_of_the_call(seeds, m: int, dtype: torch.dtype) -> None:
    check_bits(batch(m, k=128, dtype=dtype, dropout_p=0.3, seeds=seeds))
    check_bits(batch(m, dtype=dtype, dropout_p=1.0, seeds=seeds))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [3, 27, 70])
@pytest.mark.parametrize(
    ("n", "k", "ranks", "options"),
    [
        (33, 72, (1, 17), {"block_size": 32}),
        (40, 35, (5, 300), {}),
        (130, 256, (16, 16, 16), {"code": "fp4", "double_quant": False}),
        (321, 320, (40, 2), {}),
        (200, 320, (8,) * 16, {}),
    ],
)
def test_tails_and_ranks(n, k, ranks, options, m, dtype) -> None:
    check_bits(batch(m, n, k, ranks, dtype, order="sorted" if m == 27 else "random", **options))


@pytest.mark.parametrize("kernel", [name for name, dtypes in _C.kernels("linear_nf4").items() if dtypes])
def test_every_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced, for the operators and numbers of tokens that it takes, with one thread and with two."""
    ran = 0
    threads = torch.get_num_threads()
    for name in _C.kernels("linear_nf4")[kernel]:
        for m in (12, 90):
            b = batch(
                m, 128, 192, (4, 0, 20), getattr(torch, name), dropout_p=0.2, order="sorted" if m == 90 else "random"
            )
            dy = torch.randn(m, 128).to(b.x.dtype)
            calls = b.together, lambda b=b, dy=dy: torch.ops.qlora.linear_nf4_dx(*dx_args(b, dy, None))
            ones = b.alone, lambda e, b=b, dy=dy: torch.ops.qlora.linear_nf4_dx(*dx_args(b, dy, e))
            for together, alone in zip(calls, ones, strict=True):
                monkeypatch.setenv("QLORA_CPU_KERNEL", kernel)
                try:
                    expected = b.of_alone(alone)
                except ValueError:  # the kernel does not take such a problem
                    continue
                for count in (1, 2):
                    torch.set_num_threads(count)
                    assert torch.equal(together(), expected)
                torch.set_num_threads(threads)
                ran += 1
    assert ran > 0


@pytest.mark.parametrize("m", [18, 200])
def test_tokens_and_weight_rows_that_integers_cannot_serve(m: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        b = batch(m, 320, 512, (4, 8, 0, 16), dtype)
        b.x[3, 5], b.x[4, 7], b.x[m - 2, 1] = 1e4, 3e4, 2e4
        b.x[7, :400] = 0
        check_bits(b)
