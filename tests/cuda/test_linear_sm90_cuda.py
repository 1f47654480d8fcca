"""The forward with Hopper's instructions, checked like the other kernels: every tail, rank, type, block size and scale
form, in both tiles and with split k."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
import torch
from torch import Tensor

import reference
from accuracy import assert_accurate, rounded
from own_process import run_file
from samples import LinearSample, linear_sample, relative_error, to_f64
from test_linear_dx_sm90_cuda import of_each_tile

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="the device is not of compute capability 9.0, which alone has wgmma",
    ),
]
OPS = torch.ops.qlora
HALF = [torch.bfloat16, torch.float16]

# (m, n, k) -> tile and splits on 132 multiprocessors, an H100's: all tails of tokens, of rows, of stages of 128 k.
SHAPES = {
    (64, 128, 128): (64, 1),
    (33, 56, 64): (64, 1),
    (65, 259, 320): (64, 3),
    (200, 1, 192): (64, 1),
    (127, 136, 832): (64, 7),
    (70, 40, 1984): (64, 8),
    (257, 5100, 64): (128, 1),
    (129, 8323, 192): (128, 1),
    (193, 4090, 960): (128, 2),
}


def run(s: LinearSample) -> Tensor:
    return OPS.linear_nf4(*s.args)


def check(s: LinearSample) -> Tensor:
    y = run(s)
    assert y.dtype == s.x.dtype
    assert_accurate(y, s.forward_accuracy())
    return y


@pytest.mark.parametrize(("m", "n", "k", "dtype"), of_each_tile(SHAPES))
def test_shapes(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    check(linear_sample(m, n, k, 16, dtype, "cuda", dropout_p=0.1))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rank", [None, 0, 1, 5, 12, 64, 130, 256])
@pytest.mark.parametrize(("m", "k"), [(40, 128), (40, 1088)])
def test_any_rank_with_dropout(m: int, k: int, rank: int | None, dtype: torch.dtype) -> None:
    check(linear_sample(m, 72, k, rank, dtype, "cuda", bias=rank is None, dropout_p=0.3))


def test_a_rank_of_several_stages_in_the_large_tile() -> None:
    check(linear_sample(257, 5100, 64, 150, torch.bfloat16, "cuda"))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [b for b in reference.BLOCK_SIZES if b >= 64])
def test_every_block_size(block_size: int, double_quant: bool) -> None:
    """Rows of 320 begin in the middle of the larger blocks, and end in the middle of a stage."""
    check(linear_sample(34, 150, 320, None, torch.bfloat16, "cuda", block_size=block_size, double_quant=double_quant))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_another_code(dtype: torch.dtype, double_quant: bool) -> None:
    check(linear_sample(40, 150, 320, 8, dtype, "cuda", double_quant=double_quant, code="shuffled"))


@pytest.mark.parametrize("nested_block_size", [1, 3, 100, 256])
def test_any_nested_block_size(nested_block_size: int) -> None:
    s = linear_sample(34, 70, 832, 4, torch.bfloat16, "cuda", double_quant=False)
    codes, nested_absmax, nested_offset = OPS.quantize_absmax(s.w4.absmax, nested_block_size)
    w = OPS.dequantize_absmax(codes, nested_absmax, nested_offset, nested_block_size)
    x, packed, _, _, _, block_size, _, *rest = s.args
    plain = OPS.linear_nf4(x, packed, w, None, None, block_size, 256, *rest)
    nested = OPS.linear_nf4(x, packed, codes, nested_absmax, nested_offset, block_size, nested_block_size, *rest)
    assert torch.equal(plain, nested)


@pytest.mark.parametrize(("k", "dtype"), [(576, HALF[0]), (5184, HALF[1])])
def test_the_same_bits_each_time(k: int, dtype: torch.dtype) -> None:
    s = linear_sample(66, 40, k, 40, dtype, "cuda", dropout_p=0.5)
    assert torch.equal(check(s), run(s))


def test_a_token_does_not_depend_on_the_others() -> None:
    """Except for the order of summation, which depends on the tile and the splits."""
    s = linear_sample(300, 5100, 64, 8, torch.bfloat16, "cuda")
    complete = run(s)
    s.x = s.x[130:].contiguous()
    assert relative_error(run(s), to_f64(complete[130:])) < torch.finfo(torch.bfloat16).eps


def test_a_block_that_is_nan_gives_nan() -> None:
    """NaN is in its row and in no other, as with decoding; the row before ends in the middle of a stage."""
    s = linear_sample(40, 40, 192, None, torch.bfloat16, "cuda", double_quant=False)
    s.w4.absmax[7 * 3] = float("nan")
    touched = np.isnan(s.decoded()).any(axis=1)
    assert touched.sum() == 1
    assert np.array_equal(np.isnan(to_f64(run(s))), np.broadcast_to(touched, (40, 40)))


@pytest.mark.parametrize("dtype", HALF)
def test_infinite_x_stays_in_its_token(dtype: torch.dtype) -> None:
    s = linear_sample(64, 40, 128, None, dtype, "cuda")
    expected = to_f64(run(s))
    s.x[2, 5] = float("inf")
    y = to_f64(run(s))
    assert not np.isfinite(y[2]).any()
    assert np.array_equal(np.delete(y, 2, 0), np.delete(expected, 2, 0))


@pytest.mark.parametrize("dtype", HALF)
def test_odd_operands(dtype: torch.dtype) -> None:
    """bias and LoRA's matrices are not aligned to 16 bytes."""
    s = linear_sample(40, 64, 128, 6, dtype, "cuda")
    expected = to_f64(run(s))
    for name in ("bias", "lora_a", "lora_b"):
        t = getattr(s, name)
        setattr(s, name, torch.empty(t.numel() + 1, dtype=dtype, device="cuda")[1:].view_as(t).copy_(t))
        assert relative_error(run(s), expected) < 4 * torch.finfo(dtype).eps


def test_codes_have_little_more_than_half_the_error_of_rounded_weights() -> None:
    """bfloat16. Both outputs are rounded in the same way, and this error is subtracted from both squares. A factor that
    halved the error (a quarter of its square) would not keep the codes of -1 and 1 exact."""
    s = linear_sample(64, 256, 512, None, torch.bfloat16, "cuda", bias=False)
    expected = s.forward_accuracy()
    rounding = relative_error(rounded(expected.exact, s.x.dtype), expected.exact) ** 2
    error = relative_error(run(s), expected.exact) ** 2 - rounding
    plain = relative_error(expected.formula, expected.exact) ** 2 - rounding
    assert plain > 0
    assert error <= plain / 3, (error, plain)


def test_two_streams_at_once() -> None:
    samples = [linear_sample(m, 136, 1088, 8, torch.bfloat16, "cuda", seed=m) for m in (34, 100)]
    expected = [run(s) for s in samples]
    streams = [torch.cuda.Stream() for _ in samples]
    torch.cuda.synchronize()
    results = []
    for s, stream in zip(samples, streams, strict=True):
        with torch.cuda.stream(stream):
            results.append(run(s))
    torch.cuda.synchronize()
    assert all(torch.equal(y, e) for y, e in zip(results, expected, strict=True))


def test_a_captured_graph_replays() -> None:
    s = linear_sample(40, 136, 1088, 8, torch.bfloat16, "cuda", dropout_p=0.5)
    expected = run(s)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(s)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


def run_shapes() -> None:
    """In a separate process, for the output of QLORA_PRINT_KERNELS."""
    for m, n, k in SHAPES:
        run(linear_sample(m, n, k, None, torch.bfloat16, "cuda"))
    run(linear_sample(32, 72, 128, None, torch.bfloat16, "cuda"))
    run(linear_sample(64, 72, 128, None, torch.float32, "cuda"))
    run(linear_sample(64, 72, 96, None, torch.bfloat16, "cuda"))
    run(linear_sample(64, 72, 128, None, torch.bfloat16, "cuda", block_size=32))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).multi_processor_count != 132,
    reason="tiles and splits of a device with another number of multiprocessors",
)
def test_the_hopper_kernel_was_used() -> None:
    environment = {**os.environ, "QLORA_PRINT_KERNELS": "1", "CUDASIM_CHECK": ""}  # test_shapes checks these
    result = run_file(__file__, environment=environment)
    line = r"^qlora: linear_nf4 cuda m=(\d+) n=(\d+) k=(\d+) .* -> (.*)$"
    ran = [(*map(int, sizes), kernel) for *sizes, kernel in re.findall(line, result.stderr, flags=re.M)]
    expected = [
        (*s, f"sm90 tokens={tokens} rows=128 splits={splits} multicast=1") for s, (tokens, splits) in SHAPES.items()
    ]
    assert ran[: len(SHAPES)] == expected
    assert [kernel.split()[0] for *_, kernel in ran[len(SHAPES) :]] == ["tensor_cores", "exact", "ragged", "ragged"]


if __name__ == "__main__":
    run_shapes()
