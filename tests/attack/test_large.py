"""More than 2^31 elements: in a stack of experts, in one weight, and through quantize and dequantize.

Each needs up to 7 GB of memory.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import qlora_ext
import reference
from samples import relative_error, to_f64

pytestmark = pytest.mark.campaign
OPS = torch.ops.qlora
N, K, EXPERTS = 8192, 8192, 33  # 2^26 elements each
BLOCK = 64


@pytest.fixture(scope="module")
def stack() -> tuple[Tensor, Tensor]:
    """packed [E, N, K/2] and absmax [E, blocks]: 1.1 GB of random codes, and scales that differ between blocks."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (EXPERTS, N, K // 2), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(EXPERTS, N * K // BLOCK, generator=generator)
    assert packed.numel() * 2 > 2**31
    return packed, absmax


def decoded(packed: Tensor, absmax: Tensor, first: int, rows: int) -> np.ndarray:
    """float64 [rows, K]: rows of W from ``first`` on, where W is the concatenation of all experts' rows."""
    codes = packed.view(-1, K // 2)[first : first + rows].numpy()
    scales = absmax.view(-1, K // BLOCK)[first : first + rows].reshape(-1).numpy()
    return reference.dequantize_nf4(codes, scales, rows * K, BLOCK).reshape(rows, K).astype(np.float64)


def test_the_last_experts_of_a_large_stack(stack: tuple[Tensor, Tensor]) -> None:
    packed, absmax = stack
    rows = 3
    offsets = torch.tensor([0] * (EXPERTS - 2) + [rows, 2 * rows])
    x, dy = torch.randn(2 * rows, K), torch.randn(2 * rows, N)
    y = OPS.grouped_linear_nf4(x, offsets, packed, absmax, None, None, BLOCK, 256, N, None, None, None, 1.0)
    dx = OPS.grouped_linear_nf4_dx(dy, offsets, packed, absmax, None, None, BLOCK, 256, K, None, None, 1.0)
    for i, expert in enumerate((EXPERTS - 2, EXPERTS - 1)):
        part, of_expert = slice(i * rows, (i + 1) * rows), expert * N
        for first in (0, N - 64):
            w = decoded(packed, absmax, of_expert + first, 64)
            assert relative_error(y[part, first : first + 64], to_f64(x[part]) @ w.T) < 1e-5
        w = np.concatenate([decoded(packed, absmax, of_expert + first, 1024) for first in range(0, N, 1024)])
        assert relative_error(dx[part], to_f64(dy[part]) @ w) < 1e-5


@pytest.mark.parametrize("tokens", [1, 70])
def test_one_large_weight(stack: tuple[Tensor, Tensor], tokens: int) -> None:
    packed, absmax = stack[0].view(-1, K // 2), stack[1].view(-1)
    n = EXPERTS * N
    x = torch.randn(tokens, K)
    y = OPS.linear_nf4(x, packed, absmax, None, None, BLOCK, 256, n, None, None, None, 1.0, 0.0, 0)
    for first in (0, 2**31 // K - 32, n - 64):
        expected = to_f64(x) @ decoded(*stack, first, 64).T
        assert relative_error(y[:, first : first + 64], expected) < 1e-5


def test_dx_of_a_large_weight(stack: tuple[Tensor, Tensor]) -> None:
    """dy is zero except for the last rows of W; only these are decoded by the oracle."""
    packed, absmax = stack[0].view(-1, K // 2), stack[1].view(-1)
    n = EXPERTS * N
    dy = torch.zeros(2, n)
    dy[:, -64:] = torch.randn(2, 64)
    dx = OPS.linear_nf4_dx(dy, packed, absmax, None, None, BLOCK, 256, K, None, None, 1.0, 0.0, 0)
    assert relative_error(dx, to_f64(dy[:, -64:]) @ decoded(*stack, n - 64, 64)) < 1e-5


CHUNK = 1 << 26
NUMEL = (1 << 31) + CHUNK + 4099  # the last block is short and odd


def chunk(i: int) -> Tensor:
    """Elements from i * CHUNK on; all chunks differ."""
    generator = torch.Generator().manual_seed(i)
    count = min(CHUNK, NUMEL - i * CHUNK)
    return torch.randn(1 << 20, generator=generator).repeat(-(-count // (1 << 20)))[:count].bfloat16() * (1 + i % 7)


def test_quantize_and_dequantize_a_large_tensor() -> None:
    w = torch.empty(NUMEL, dtype=torch.bfloat16)
    chunks = -(-NUMEL // CHUNK)
    for i in range(chunks):
        w[i * CHUNK : (i + 1) * CHUNK] = chunk(i)
    packed, absmax = OPS.quantize_nf4(w, BLOCK)
    del w
    complete = OPS.dequantize_nf4(packed, absmax, None, None, BLOCK, 256, [NUMEL], torch.bfloat16)
    for i in range(chunks):
        part = chunk(i)
        codes, scales = OPS.quantize_nf4(part, BLOCK)
        codes = codes.view(-1)
        begin = i * CHUNK
        assert torch.equal(packed[begin // 2 :][: codes.numel()], codes)
        assert torch.equal(absmax[begin // BLOCK :][: scales.numel()], scales)
        w4 = qlora_ext.NF4Weight(codes, scales, shape=part.shape, dtype=torch.bfloat16, block_size=BLOCK)
        assert torch.equal(complete[begin:][: part.numel()], w4.dequantize())
        head = part[:8192].float().numpy()  # the full last chunk
        expected, expected_scales = reference.quantize_nf4(head, BLOCK)
        assert np.array_equal(codes[: len(expected)].numpy(), expected)
        assert np.array_equal(scales[: len(expected_scales)].numpy(), expected_scales)
        values = reference.dequantize_nf4(expected, expected_scales, head.size, BLOCK)
        assert torch.equal(complete[begin:][: head.size], torch.from_numpy(values).bfloat16())
