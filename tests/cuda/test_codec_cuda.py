"""Encoding and decoding on CUDA have the oracle's bits."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import reference
from samples import DTYPES

pytestmark = pytest.mark.cuda

OPS = torch.ops.qlora
BLOCK_SIZES = reference.BLOCK_SIZES
CHUNK = 16384  # the elements of a CTA, several of the kernels' units


def bits(x: torch.Tensor | np.ndarray) -> np.ndarray:
    """Flat bit patterns (bfloat16 as uint16). All NaNs are equal, because payloads are not part of the format."""
    t = torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x.detach().cpu()
    t = t.reshape(-1).contiguous()
    if t.is_floating_point():
        t = torch.where(t.isnan(), torch.full_like(t, float("nan")), t)
    return t.view({1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[t.element_size()]).numpy()


def assert_bits(got: torch.Tensor, expected: torch.Tensor | np.ndarray, what: str) -> None:
    assert got.is_cuda, what
    a, b = bits(got), bits(expected)
    assert a.shape == b.shape, what
    wrong = np.flatnonzero(a != b)
    if wrong.size:
        i = wrong[0]
        pytest.fail(f"{what}: {wrong.size} of {a.size} differ, the first at {i}: {a[i]:#x}, expected {b[i]:#x}")


def check_quantize(w: torch.Tensor, block: int, code: str = "nf4") -> tuple[torch.Tensor, torch.Tensor]:
    packed, absmax = OPS.quantize_nf4(w, block, code)
    table = reference.CODES[code]
    expected_packed, expected_absmax = reference.quantize_nf4(w.float().cpu().numpy(), block, table)
    assert_bits(absmax, expected_absmax, "absmax")
    assert_bits(packed, expected_packed, "packed")
    return packed, absmax


def check_quantize_absmax(absmax: torch.Tensor, nested_block: int) -> tuple[torch.Tensor, ...]:
    codes, nested, offset = OPS.quantize_absmax(absmax, nested_block)
    expected = reference.quantize_absmax(absmax.cpu().numpy(), nested_block)
    assert_bits(offset, np.array(expected[2]), "nested_offset")
    assert_bits(nested, expected[1], "nested_absmax")
    assert_bits(codes, expected[0], "codes")
    return codes, nested, offset


def check_dequantize(
    packed: torch.Tensor, scales: tuple, numel: int, block: int, nested_block: int = 256, code: str = "nf4"
) -> None:
    table = reference.CODES[code]
    arrays = [s.cpu().numpy() for s in scales]
    with np.errstate(invalid="ignore", over="ignore"):
        absmax = arrays[0] if len(arrays) == 1 else reference.dequantize_absmax(*arrays, nested_block)
        expected = torch.from_numpy(reference.dequantize_nf4(packed.cpu().numpy(), absmax, numel, block, table))
    if len(scales) > 1:
        assert_bits(OPS.dequantize_absmax(*scales, nested_block), absmax, "dequantize_absmax")
    nested = scales[1:] or (None, None)
    for dtype in DTYPES:
        got = OPS.dequantize_nf4(packed, scales[0], *nested, block, nested_block, [numel], dtype, code)
        assert_bits(got, expected.to(dtype), f"dequantize_nf4 to {dtype}")


def weights(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal, with a different scale in each block."""
    scale = torch.exp(0.5 * torch.randn(numel // 32 + 1)).repeat_interleave(32)[:numel]
    return (torch.randn(numel) * scale).to("cuda", dtype)


@pytest.mark.parametrize("code", reference.CODE_KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_every_length(block: int, dtype: torch.dtype, code: str) -> None:
    for numel in (1, 2, 7, 33, block - 1, block, block + 1, 3 * block + 5, CHUNK - 2, CHUNK, 2 * CHUNK + 4097):
        w = weights(numel, dtype)
        packed, absmax = check_quantize(w, block, code)
        check_dequantize(packed, (absmax,), numel, block, code=code)
        for nested_block in (256, 32, 7):
            check_dequantize(packed, check_quantize_absmax(absmax, nested_block), numel, block, nested_block, code)


def test_nothing() -> None:
    packed, absmax = check_quantize(torch.empty(0, 64, device="cuda"), 64)
    codes, nested, offset = check_quantize_absmax(absmax, 256)
    assert packed.shape == (0, 32)
    assert codes.numel() == nested.numel() == 0
    assert offset.item() == 0.0
    check_dequantize(packed, (absmax,), 0, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_length_and_any_strides(dtype: torch.dtype) -> None:
    for shape in [(1, 1), (3, 5), (7, 100), (33, 65), (64, 576), (2, 3, 34)]:
        w = weights(int(np.prod(shape)), dtype).reshape(shape)
        check_quantize(w, 64)
        check_quantize(w.transpose(0, -1), 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_data_at_any_address(dtype: torch.dtype) -> None:
    """A view may start at an address that is not aligned for vector loads."""
    numel = CHUNK + 100
    w = weights(numel + 3, dtype)[3:]
    packed, absmax = check_quantize(w, 64)
    shifted = torch.cat([packed[:1], packed])[1:]
    assert shifted.data_ptr() % 4 == 1
    check_dequantize(shifted, check_quantize_absmax(absmax, 256), numel, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [32, 64, 512, 4096])
def test_special_blocks(block: int, dtype: torch.dtype) -> None:
    w = torch.randn(40, block)
    w /= w.abs().amax(1, keepdim=True)
    w[0], w[1] = 0.0, -0.0
    w[2], w[3] = torch.finfo(torch.float32).tiny, 1.4e-45
    w[4] *= 1e-38  # absmax just above and below the smallest divisor
    w[5] *= 0.99e-38
    w[6] *= 3e-42
    w = w.to(dtype)
    w[7] = torch.finfo(dtype).max
    w[8] = -torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for i, position in enumerate((0, 1, 5, 16, 30, block - 1)):
        w[10 + i, position] = float("nan")
        w[20 + i, position] = float("inf")
        w[30 + i, position] = -float("inf")
    w = w.cuda()
    packed, absmax = check_quantize(w, block)
    assert torch.equal(absmax.isnan(), ~w.isfinite().all(1))
    assert not packed[absmax.isnan()].any()
    check_dequantize(packed, (absmax,), w.numel(), block)
    # An odd count that ends in a block that is not finite: the padding is still code 7.
    packed, _ = check_quantize(w.reshape(-1)[: 12 * block - 1], block)
    assert packed[-1].item() & 15 == 7
    # Nested scales of NaN, and of weights that are all finite.
    for part in (w, w[:9]):
        packed, absmax = check_quantize(part, block)
        check_dequantize(packed, check_quantize_absmax(absmax, 256), part.numel(), block)


@pytest.mark.parametrize("absmax", [1.0, 0.0371, 3.0517578e-05, 1.7e-37, 2.9e38])
def test_around_every_nf4_boundary(absmax: float) -> None:
    points = np.concatenate([reference.midpoints(reference.NF4), reference.NF4[reference.NF4 != 0]])
    near = (points.view(np.int32)[:, None] + np.arange(-300, 301)).astype(np.int32).view(np.float32).reshape(-1)
    near = near[np.abs(near) <= 1.0]
    near = near[: near.size // 63 * 63].reshape(-1, 63)
    with np.errstate(under="ignore"):
        blocks = np.concatenate([np.ones((near.shape[0], 1), np.float32), near], axis=1) * np.float32(absmax)
    check_quantize(torch.from_numpy(blocks).cuda(), 64)
    check_quantize(torch.from_numpy(-blocks).cuda(), 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_patterns(dtype: torch.dtype) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    check_quantize(every.cuda(), 32)
    in_range = every[every.float().abs() <= 1.0]
    w = in_range[: in_range.numel() // 63 * 63].reshape(-1, 63)
    check_quantize(torch.cat([torch.ones_like(w[:, :1]), w], 1).cuda(), 64)


def test_around_every_scale_boundary() -> None:
    points = reference.midpoints(reference.DYNAMIC8)
    near = (points.view(np.int32)[:, None] + np.arange(-100, 101)).astype(np.int32).view(np.float32).reshape(-1)
    near = near[np.abs(near) <= 1.0]
    # With its mirror image, the mean is 0 and the largest magnitude 1, so that q is the value itself.
    values = np.concatenate([near, -near, [1.0, -1.0]]).astype(np.float32)
    codes, nested, offset = check_quantize_absmax(torch.from_numpy(values).cuda(), values.size)
    assert offset.item() == 0.0
    assert nested.item() == 1.0
    assert codes.unique().numel() == 256


def test_the_mean_is_summed_in_order() -> None:
    for count in (1, 1023, 1025, 65535, 65536, 65537, 3 * 65536 + 1041):
        check_quantize_absmax((torch.exp(4 * torch.randn(count)) + 1e-3).cuda(), 256)


def test_scales_that_are_not_finite() -> None:
    x = torch.rand(1000)
    for value in (float("nan"), float("inf")):
        x[777] = value
        codes, nested, offset = OPS.quantize_absmax(x.cuda(), 256)
        assert not offset.isfinite()
        assert nested.isnan().all()
        assert not codes.any()


def test_any_bytes_with_any_scales() -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat(64).cuda()
    numel = packed.numel() * 2
    patterns = np.random.default_rng(0).integers(0, 2**32, numel // 64, dtype=np.uint32)
    check_dequantize(packed, (torch.from_numpy(patterns.view(np.float32)).cuda(),), numel, 64)
    codes = torch.arange(256, dtype=torch.uint8).repeat(2).cuda()
    for nested, offset in [(0.01, 0.03), (-2.0, 1.0), (1e-38, 1e-40), (3e38, 3e38), (float("nan"), 0.0)]:
        scales = codes, torch.full((2,), nested).cuda(), torch.tensor(offset).cuda()
        check_dequantize(packed, scales, numel, 64)


def test_the_cpu_gives_the_same_bits() -> None:
    w = weights(100_003, torch.bfloat16)
    packed, absmax = OPS.quantize_nf4(w, 64)
    scales = OPS.quantize_absmax(absmax, 256)
    args = (64, 256, [w.numel()], torch.bfloat16)
    here = [packed, absmax, *scales, OPS.dequantize_nf4(packed, *scales, *args)]
    packed, absmax = OPS.quantize_nf4(w.cpu(), 64)
    scales = OPS.quantize_absmax(absmax, 256)
    for a, b in zip(here, [packed, absmax, *scales, OPS.dequantize_nf4(packed, *scales, *args)], strict=True):
        assert_bits(a, b, "CUDA against CPU")


def test_two_streams() -> None:
    """Each call runs on the current stream, and synchronizes with no other."""
    w = [weights(50_000, torch.bfloat16) for _ in range(2)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in w]
    results = []
    for t, stream in zip(w, streams, strict=True):
        with torch.cuda.stream(stream):
            packed, absmax = OPS.quantize_nf4(t, 64)
            scales = OPS.quantize_absmax(absmax, 256)
            results.append((t, packed, OPS.dequantize_nf4(packed, *scales, 64, 256, [t.numel()], torch.float32)))
    torch.cuda.synchronize()
    for t, packed, decoded in results:
        expected, absmax = reference.quantize_nf4(t.float().cpu().numpy(), 64)
        assert_bits(packed, expected, "packed")
        absmax = reference.dequantize_absmax(*reference.quantize_absmax(absmax))
        assert_bits(decoded, reference.dequantize_nf4(expected, absmax, t.numel()), "decoded")


WRONG = {
    "w": lambda: OPS.quantize_nf4(torch.zeros(64, device="cuda", dtype=torch.float64), 64),
    "block_size": lambda: OPS.quantize_nf4(torch.zeros(64, device="cuda"), 48),
    "absmax": lambda: OPS.dequantize_nf4(*_packed(absmax=torch.ones(2)), 64, 256, [128], torch.float32),
    "packed": lambda: OPS.dequantize_nf4(*_packed(), 64, 256, [130], torch.float32),
    "nested_absmax": lambda: OPS.dequantize_absmax(
        torch.zeros(2, dtype=torch.uint8, device="cuda"), torch.ones(1), torch.zeros((), device="cuda"), 256
    ),
    "nested_offset": lambda: OPS.dequantize_absmax(
        torch.zeros(2, dtype=torch.uint8, device="cuda"), torch.ones(1, device="cuda"), torch.zeros(()), 256
    ),
    "dtype": lambda: OPS.dequantize_nf4(*_packed(), 64, 256, [128], torch.int32),
}


def _packed(absmax: torch.Tensor | None = None) -> tuple:
    packed = torch.zeros(64, dtype=torch.uint8, device="cuda")
    return packed, torch.ones(2, device="cuda") if absmax is None else absmax, None, None


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=rf"\b{name}: expected"):
        WRONG[name]()


def free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(free_memory() < 9 << 30, reason="needs 9 GB of free memory")
def test_more_than_2_to_the_31_elements() -> None:
    numel = (1 << 31) + 4096 + 33
    w = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    w[-8225:] = weights(8225, torch.bfloat16)
    packed, absmax = OPS.quantize_nf4(w, 64)
    start = (numel - 8225) // 64 * 64
    expected_packed, expected_absmax = reference.quantize_nf4(w[start:].float().cpu().numpy(), 64)
    assert_bits(packed[start // 2 :], expected_packed, "packed")
    assert_bits(absmax[start // 64 :], expected_absmax, "absmax")
    del w
    decoded = OPS.dequantize_nf4(packed, absmax, None, None, 64, 256, [numel], torch.bfloat16)
    expected = reference.dequantize_nf4(expected_packed, expected_absmax, numel - start, 64)
    assert_bits(decoded[start:], torch.from_numpy(expected).to(torch.bfloat16), "decoded")
