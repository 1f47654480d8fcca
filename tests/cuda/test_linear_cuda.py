"""The forward on CUDA, compared with the oracle for every shape, rank, type, block size and scale form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import reference
from accuracy import assert_accurate, rounded
from samples import DTYPES, LinearSample, linear_sample, relative_error, to_f64

pytestmark = pytest.mark.cuda
OPS = torch.ops.qlora
HALF = [torch.bfloat16, torch.float16]
MANY = 200  # tokens: several tiles of the tensor cores, below the crossover to the library

# (m, n, k). The first are for the tensor cores, k % 64 == 0, with tails of every other size: of 8, 16, 32, 64
# tokens, of 128 rows, of stages of 128 k. Errors of very few outputs vary by chance, so if n is 1, m is not.
REGULAR = [(1, 200, 192), (7, 129, 320), (8, 128, 128), (60, 1, 128), (16, 72, 448), (31, 259, 64), (33, 130, 192)]
REGULAR += [(63, 56, 320), (64, 136, 64)]
RAGGED = [(5, 7, 33), (40, 131, 101), (3, 50, 1), (60, 1, 257), (9, 66, 700), (33, 65, 96), (1, 129, 8)]


def run(s: LinearSample) -> Tensor:
    return OPS.linear_nf4(*s.args)


def check(s: LinearSample) -> Tensor:
    y = run(s)
    assert y.dtype == s.x.dtype
    assert y.is_cuda
    assert_accurate(y, s.forward_accuracy())
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), REGULAR + RAGGED)
def test_shapes(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    check(linear_sample(m, n, k, rank=16, dtype=dtype, device="cuda"))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("m", "n", "k"), [(65, 64, 576), (MANY, 140, 64)])
def test_many_tokens(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    check(linear_sample(m, n, k, rank=16, dtype=dtype, device="cuda"))


@pytest.mark.parametrize(("dtype", "k"), [(torch.float32, 64), (torch.bfloat16, 33), (torch.bfloat16, 64)])
def test_library(k: int, dtype: torch.dtype) -> None:
    """Above every crossover. torch's GEMM accumulates into the output, in its own order."""
    s = linear_sample(1100, 24, k, rank=4, dtype=dtype, device="cuda", dropout_p=0.2)
    assert relative_error(run(s), s.expected()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [None, 0, 1, 5, 64, 256])
@pytest.mark.parametrize(("m", "n", "k"), [(17, 72, 128), (17, 71, 95)])
def test_any_rank_with_dropout(m: int, n: int, k: int, rank: int | None, dtype: torch.dtype) -> None:
    check(linear_sample(m, n, k, rank=rank, dtype=dtype, device="cuda", bias=rank is None, dropout_p=0.3))


@pytest.mark.parametrize("m", [4, 12, 24, 64])
@pytest.mark.parametrize("p", [0.1, 1.0])
def test_dropout_in_every_tile(m: int, p: float) -> None:
    check(linear_sample(m, 136, 320, rank=16, dtype=torch.bfloat16, device="cuda", dropout_p=p))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", reference.BLOCK_SIZES)
@pytest.mark.parametrize(
    ("n", "k", "dtype"), [(40, 320, torch.bfloat16), (39, 323, torch.bfloat16), (40, 320, torch.float32)]
)
def test_every_block_size(n: int, k: int, dtype: torch.dtype, block_size: int, double_quant: bool) -> None:
    check(linear_sample(9, n, k, None, dtype, "cuda", block_size=block_size, double_quant=double_quant))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(3, 129, 320), (8, 40, 128), (16, 72, 448), (31, 70, 64), (64, 136, 64), (9, 66, 700)]
)
def test_another_code(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    check(linear_sample(m, n, k, rank=16, dtype=dtype, device="cuda", code="shuffled"))


@pytest.mark.parametrize("nested_block_size", [1, 100, 256])
def test_any_nested_block_size(nested_block_size: int) -> None:
    s = linear_sample(3, 70, 320, 4, torch.bfloat16, "cuda", double_quant=False)
    codes, nested_absmax, nested_offset = OPS.quantize_absmax(s.w4.absmax, nested_block_size)
    w = OPS.dequantize_absmax(codes, nested_absmax, nested_offset, nested_block_size)
    x, packed, _, _, _, block_size, _, *rest = s.args
    plain = OPS.linear_nf4(x, packed, w, None, None, block_size, 256, *rest)
    nested = OPS.linear_nf4(x, packed, codes, nested_absmax, nested_offset, block_size, nested_block_size, *rest)
    assert torch.equal(plain, nested)


@pytest.mark.parametrize(("m", "dtype"), [(2, HALF[0]), (12, HALF[1]), (64, HALF[0]), (64, HALF[1])])
def test_a_long_sum_is_split_and_deterministic(m: int, dtype: torch.dtype) -> None:
    """k is large enough for several CTAs per tile, and for several stages of scales."""
    for rank, k in ((None, 2112), (40, 2112), (8, 5184)):
        s = linear_sample(m, 40, k, rank, dtype, "cuda", dropout_p=0.5)
        assert torch.equal(check(s), run(s))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_tensors(dtype: torch.dtype) -> None:
    """Contiguous views that are not aligned to 16 bytes."""
    s = linear_sample(6, 64, 128, 6, dtype, "cuda")
    expected = to_f64(run(s))
    for name in ("x", "bias", "lora_a", "lora_b"):
        t = getattr(s, name)
        moved = torch.empty(t.numel() + 1, dtype=dtype, device="cuda")[1:].view_as(t).copy_(t)
        assert moved.data_ptr() % 16 != 0
        setattr(s, name, moved)
        assert relative_error(run(s), expected) < 4 * torch.finfo(dtype).eps


def test_unaligned_packed_weight() -> None:
    s = linear_sample(6, 64, 128, 6, torch.bfloat16, "cuda")
    x, packed, *rest = s.args
    moved = torch.empty(packed.numel() + 1, dtype=torch.uint8, device="cuda")[1:].view_as(packed).copy_(packed)
    assert relative_error(OPS.linear_nf4(x, moved, *rest), to_f64(run(s))) < 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3), ()])
def test_leading_dimensions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    s = linear_sample(shape, 40, 128, 4, dtype, "cuda")
    y = run(s)
    assert y.shape == (*shape, 40)
    if y.numel():
        assert relative_error(y, s.expected()) < 4 * torch.finfo(dtype).eps


def test_non_contiguous_x() -> None:
    s = linear_sample(6, 40, 128, 4, torch.bfloat16, "cuda")
    expected = run(s)
    s.x = s.x.t().contiguous().t()
    assert not s.x.is_contiguous()
    assert torch.equal(run(s), expected)


@pytest.mark.parametrize(("m", "k"), [(3, 128), (3, 95), (40, 128)])
def test_a_block_that_is_nan_gives_nan(m: int, k: int) -> None:
    """NaN is in its row and in no other, as with decoding."""
    s = linear_sample(m, 40, k, None, torch.bfloat16, "cuda", double_quant=False)
    s.w4.absmax[(7 * k) // 64] = float("nan")
    touched = np.isnan(s.decoded()).any(axis=1)
    assert np.array_equal(np.isnan(to_f64(run(s))), np.broadcast_to(touched, (m, 40)))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("m", [8, 64])
def test_infinite_x_stays_in_its_token(m: int, dtype: torch.dtype) -> None:
    s = linear_sample(m, 40, 128, None, dtype, "cuda")
    expected = to_f64(run(s))
    s.x[2, 5] = float("inf")
    y = to_f64(run(s))
    assert not np.isfinite(y[2]).any()
    assert np.array_equal(np.delete(y, 2, 0), np.delete(expected, 2, 0))


@pytest.mark.parametrize("m", [16, 64])
def test_codes_have_little_more_than_half_the_error_of_rounded_weights(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16. Both outputs are rounded in the same way, and this error is subtracted from both squares. A factor that
    halved the error (a quarter of its square) would not keep the codes of -1 and 1 exact."""
    # A library, which some cards choose at 64 tokens, multiplies by the rounded weights.
    few = 8 if torch.cuda.get_device_capability()[0] >= 10 else 16
    monkeypatch.setenv("QLORA_CUDA_KERNEL", "few_tokens" if m <= few else "tensor_cores")
    s = linear_sample(m, 256, 512, None, torch.bfloat16, "cuda", bias=False)
    expected = s.forward_accuracy()
    rounding = relative_error(rounded(expected.exact, s.x.dtype), expected.exact) ** 2
    error = relative_error(run(s), expected.exact) ** 2 - rounding
    plain = relative_error(expected.formula, expected.exact) ** 2 - rounding
    assert plain > 0
    assert error <= plain / 3, (error, plain)


def test_two_streams_at_once() -> None:
    samples = [linear_sample(m, 136, 1088, 8, torch.bfloat16, "cuda", seed=m) for m in (2, 20)]
    expected = [run(s) for s in samples]
    streams = [torch.cuda.Stream() for _ in samples]
    torch.cuda.synchronize()
    results = []
    for _ in range(2):
        for s, stream in zip(samples, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(s))
    torch.cuda.synchronize()
    for i, y in enumerate(results):
        assert torch.equal(y, expected[i % 2])
