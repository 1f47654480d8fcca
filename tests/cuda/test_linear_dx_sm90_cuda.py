"""The gradient of x with Hopper's instructions, checked like the other kernels: every tail, rank, type, block size and
scale form, in each tile and with a split sum over rows."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
import torch

import reference
from own_process import run_file
from samples import linear_sample, to_f64
from test_linear_dx_cuda import check_dx, gradient, run_dx

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="the device is not of compute capability 9.0, which alone has wgmma",
    ),
]
HALF = [torch.bfloat16, torch.float16]

# (m, n, k) -> tile and splits on 132 multiprocessors, an H100's: all tails of tokens, of stages of 64 rows, of columns.
SHAPES = {
    (64, 128, 128): (64, 1),
    (33, 56, 64): (64, 1),
    (65, 264, 320): (64, 5),
    (200, 8, 192): (64, 1),
    (70, 1000, 64): (64, 8),
    (129, 72, 8448): (128, 1),
    (257, 136, 8384): (256, 1),
    (193, 520, 4160): (256, 3),
    (290, 456, 4032): (128, 1),
}


def of_each_tile(shapes: dict[tuple[int, int, int], tuple[int, int]]) -> list:
    """(m, n, k, dtype): both types in the smallest tile; one type per shape, alternating, in the larger tiles."""
    small = [(*shape, dtype) for shape, (tile, _) in shapes.items() if tile == 64 for dtype in HALF]
    return small + [(*shape, HALF[i % 2]) for i, (shape, (tile, _)) in enumerate(shapes.items()) if tile > 64]


@pytest.mark.parametrize(("m", "n", "k", "dtype"), of_each_tile(SHAPES))
def test_shapes(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    check_dx(linear_sample(m, n, k, 16, dtype, "cuda"))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rank", [None, 0, 1, 5, 12, 64, 130])
@pytest.mark.parametrize(("m", "n"), [(40, 72), (40, 1032)])
def test_any_rank_with_dropout(m: int, n: int, rank: int | None, dtype: torch.dtype) -> None:
    check_dx(linear_sample(m, n, 192, rank, dtype, "cuda", dropout_p=0.3))


@pytest.mark.parametrize(("m", "n", "k", "p", "dtype"), [(129, 72, 8448, 0.1, HALF[0]), (257, 136, 8384, 0.1, HALF[1])])
def test_dropout_in_the_larger_tiles(m: int, n: int, k: int, p: float, dtype: torch.dtype) -> None:
    check_dx(linear_sample(m, n, k, 16, dtype, "cuda", dropout_p=p))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [b for b in reference.BLOCK_SIZES if b >= 64])
def test_every_block_size(block_size: int, double_quant: bool) -> None:
    """Rows of 320 begin in the middle of the larger blocks."""
    check_dx(linear_sample(34, 72, 320, None, torch.bfloat16, "cuda", block_size=block_size, double_quant=double_quant))


@pytest.mark.parametrize("dtype", HALF)
def test_another_code(dtype: torch.dtype) -> None:
    check_dx(linear_sample(40, 72, 320, 8, dtype, "cuda", code="shuffled"))


@pytest.mark.parametrize(("n", "dtype"), [(264, HALF[0]), (2056, HALF[1])])
def test_the_same_bits_each_time(n: int, dtype: torch.dtype) -> None:
    s = linear_sample(66, n, 64, 40, dtype, "cuda", dropout_p=0.5)
    assert torch.equal(check_dx(s), run_dx(s, gradient(s)))


def test_a_block_that_is_nan_gives_nan() -> None:
    """NaN is in its columns and in no others, as with decoding."""
    s = linear_sample(40, 72, 192, None, torch.bfloat16, "cuda", double_quant=False)
    s.w4.absmax[7 * 3 + 1] = float("nan")
    touched = np.isnan(s.decoded()).any(axis=0)
    assert touched.sum() == 64
    assert np.array_equal(np.isnan(to_f64(run_dx(s, gradient(s)))), np.broadcast_to(touched, (40, 192)))


@pytest.mark.parametrize("dtype", HALF)
def test_infinite_dy_stays_in_its_token(dtype: torch.dtype) -> None:
    s = linear_sample(64, 72, 128, None, dtype, "cuda")
    dy = gradient(s)
    expected = to_f64(run_dx(s, dy))
    dy[2, 5] = float("inf")
    dx = to_f64(run_dx(s, dy))
    assert not np.isfinite(dx[2]).any()
    assert np.array_equal(np.delete(dx, 2, 0), np.delete(expected, 2, 0))


def test_a_seed_on_the_device_draws_the_same_mask() -> None:
    s = linear_sample(40, 72, 128, 4, torch.bfloat16, "cuda", dropout_p=0.5)
    dy = gradient(s)
    *lora, seed = s.lora_args
    on_device = torch.tensor(seed, device="cuda")
    dx = torch.ops.qlora.linear_nf4_dx(dy, *s.w4.operands(128, *lora, 0, on_device))
    assert torch.equal(dx, run_dx(s, dy))


def test_a_captured_graph_replays() -> None:
    s = linear_sample(40, 1032, 64, 4, torch.bfloat16, "cuda", dropout_p=0.5)
    dy = gradient(s)
    expected = run_dx(s, dy)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dx = run_dx(s, dy)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(dx, expected)


def run_shapes() -> None:
    """In a separate process, for the output of QLORA_PRINT_KERNELS."""
    others = [(32, 72, 128, torch.bfloat16), (64, 72, 128, torch.float32), (64, 72, 96, torch.bfloat16)]
    others += [(64, 71, 128, torch.bfloat16)]
    for m, n, k, dtype in [*((*shape, torch.bfloat16) for shape in SHAPES), *others]:
        s = linear_sample(m, n, k, None, dtype, "cuda")
        run_dx(s, gradient(s))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).multi_processor_count != 132,
    reason="tiles and splits of a device with another number of multiprocessors",
)
def test_the_hopper_kernel_was_used() -> None:
    environment = {**os.environ, "QLORA_PRINT_KERNELS": "1", "CUDASIM_CHECK": ""}  # test_shapes checks these
    result = run_file(__file__, environment=environment)
    line = r"^qlora: linear_nf4_dx cuda m=(\d+) n=(\d+) k=(\d+) .* -> (.*)$"
    ran = [(*map(int, sizes), kernel) for *sizes, kernel in re.findall(line, result.stderr, flags=re.M)]
    expected = [
        (*s, f"sm90 tokens={tokens} columns=128 splits={splits} multicast=1") for s, (tokens, splits) in SHAPES.items()
    ]
    assert ran[: len(SHAPES)] == expected
    assert [kernel.split()[0] for *_, kernel in ran[len(SHAPES) :]] == [
        "tensor_cores",
        "exact",
        "tensor_cores",
        "ragged",
    ]


if __name__ == "__main__":
    run_shapes()
