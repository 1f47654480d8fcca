"""dx, da and db on CUDA, compared with the oracle for every shape, rank, type, block size and scale form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qlora_ext
import reference
from accuracy import assert_accurate, concatenate, total
from samples import DTYPES, LinearSample, linear_sample, rows

pytestmark = pytest.mark.cuda
OPS = torch.ops.qlora
HALF = [torch.bfloat16, torch.float16]

# (m, n, k). The first are for the fast path: k % 32 == 0 and n % 8 == 0, with tails in every dimension.
REGULAR = [
    (1, 64, 256),
    (7, 72, 96),
    (16, 200, 288),
    (31, 520, 64),
    (63, 136, 320),
    (64, 1032, 32),
    (65, 64, 576),
    (300, 40, 64),
]
RAGGED = [(5, 7, 33), (40, 131, 101), (3, 50, 1), (3, 1, 257), (9, 66, 700), (33, 65, 96), (1, 129, 8)]


def gradient(s: LinearSample) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*s.x.shape[:-1], s.w4.shape[0], generator=generator).to(s.x.device, s.x.dtype)


def run_dx(s: LinearSample, dy: Tensor) -> Tensor:
    return OPS.linear_nf4_dx(*s.dx_args(dy))


def check_dx(*samples: LinearSample) -> Tensor:
    """Checks all samples together; their results are returned in order."""
    results = []
    for s in samples:
        dy = gradient(s)
        dx = run_dx(s, dy)
        assert dx.dtype == dy.dtype
        assert dx.shape == s.x.shape
        results.append((dx, s.dx_accuracy(dy)))
    parts, expected = zip(*results, strict=True)
    dx = torch.cat(parts)
    assert_accurate(dx, concatenate(expected))
    return dx


def check_dlora(s: LinearSample) -> None:
    dy = gradient(s)
    for got, expected in zip(OPS.linear_nf4_dlora(dy, s.x, *s.lora_args), s.dlora_accuracy(dy), strict=True):
        assert_accurate(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), REGULAR + RAGGED)
def test_dx(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    seeds = range(-(-200 // (m * k)))  # errors of a few outputs vary by chance
    check_dx(*(linear_sample(m, n, k, rank=16, dtype=dtype, device="cuda", seed=seed) for seed in seeds))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [None, 0, 1, 5, 64, 256])
@pytest.mark.parametrize(("m", "n", "k"), [(17, 72, 96), (17, 71, 95)])
def test_dx_of_any_rank_with_dropout(m: int, n: int, k: int, rank: int | None, dtype: torch.dtype) -> None:
    check_dx(linear_sample(m, n, k, rank=rank, dtype=dtype, device="cuda", dropout_p=0.3))


@pytest.mark.parametrize("m", [4, 12, 24, 64])
@pytest.mark.parametrize("p", [0.1, 1.0])
def test_dx_dropout_in_every_tile(m: int, p: float) -> None:
    check_dx(linear_sample(m, 192, 320, rank=16, dtype=torch.bfloat16, device="cuda", dropout_p=p))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", reference.BLOCK_SIZES)
@pytest.mark.parametrize(
    ("n", "k", "dtype"), [(40, 352, torch.bfloat16), (39, 323, torch.bfloat16), (40, 352, torch.float32)]
)
def test_dx_of_every_block_size(n: int, k: int, dtype: torch.dtype, block_size: int, double_quant: bool) -> None:
    check_dx(linear_sample(9, n, k, None, dtype, "cuda", block_size=block_size, double_quant=double_quant))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(7, 72, 96), (31, 200, 64), (40, 131, 101)])
def test_dx_of_another_code(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    check_dx(linear_sample(m, n, k, rank=16, dtype=dtype, device="cuda", code="shuffled"))


@pytest.mark.parametrize(("m", "dtype"), [(2, HALF[0]), (64, HALF[0]), (64, HALF[1])])
def test_dx_splits_its_sum(m: int, dtype: torch.dtype) -> None:
    """n is large enough for several CTAs per tile."""
    for rank in (None, 8):
        s = linear_sample(m, 2056, 64, rank, dtype, "cuda", dropout_p=0.5)
        assert torch.equal(check_dx(s), run_dx(s, gradient(s)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dx_of_unaligned_tensors(dtype: torch.dtype) -> None:
    """Contiguous views that are not aligned to 16 bytes."""
    s = linear_sample(6, 64, 96, 4, dtype, "cuda")
    dy = gradient(s)
    expected = run_dx(s, dy)
    moved = torch.empty(dy.numel() + 1, dtype=dtype, device="cuda")[1:].view_as(dy).copy_(dy)
    assert moved.data_ptr() % 16 != 0
    torch.testing.assert_close(run_dx(s, moved), expected, rtol=2.0**-7, atol=2.0**-7 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 64, 96), (16, 40, 72), (65, 136, 320), (300, 64, 8), (19, 33, 67), (3, 1, 1)]
)
def test_dlora(m: int, n: int, k: int, p: float, dtype: torch.dtype) -> None:
    check_dlora(linear_sample(m, n, k, 16, dtype, "cuda", dropout_p=p))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 20, 32, 64, 256])
def test_dlora_of_any_rank(rank: int, dtype: torch.dtype) -> None:
    check_dlora(linear_sample(37, 72, 67, rank, dtype, "cuda", dropout_p=0.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dlora_splits_its_sum(dtype: torch.dtype) -> None:
    """Enough tokens for several CTAs per tile."""
    s = linear_sample(2100, 24, 40, 4, dtype, "cuda", dropout_p=0.2)
    check_dlora(s)
    dy = gradient(s)
    first, second = (OPS.linear_nf4_dlora(dy, s.x, *s.lora_args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"rank": None}, {"dropout_p": 0.4}, {"rank": 1, "double_quant": False}], ids=str
)
def test_backward_of_the_layer(options: dict, dtype: torch.dtype) -> None:
    s = linear_sample((2, 9), 72, 96, dtype=dtype, device="cuda", requires_grad=True, **options)
    y = qlora_ext.autograd.LinearNF4Function.apply(*s.args)
    dy = gradient(s)
    y.backward(dy)
    assert_accurate(s.x.grad, s.dx_accuracy(dy))
    assert_accurate(s.bias.grad, total(rows(dy), dtype))
    if s.lora_a is not None:
        for got, expected in zip((s.lora_a.grad, s.lora_b.grad), s.dlora_accuracy(dy), strict=True):
            assert_accurate(got, expected)


@pytest.mark.parametrize("lead", [(0,), (2, 0, 3)])
def test_no_tokens(lead: tuple[int, ...]) -> None:
    s = linear_sample(lead, 48, 64, 4, torch.bfloat16, "cuda")
    dy = gradient(s)
    assert run_dx(s, dy).shape == s.x.shape
    for grad, like in zip(OPS.linear_nf4_dlora(dy, s.x, *s.lora_args), (s.lora_a, s.lora_b), strict=True):
        assert grad.shape == like.shape
        assert not grad.any()


def test_on_another_stream() -> None:
    s = linear_sample(5, 2056, 64, 4, torch.bfloat16, "cuda", dropout_p=0.5)
    dy = gradient(s)
    expected = run_dx(s, dy)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = run_dx(s, dy)
    stream.synchronize()
    assert torch.equal(got, expected)
