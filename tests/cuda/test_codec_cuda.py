"""Encoding and decoding on CUDA at any address and on any stream, and the arguments that they refuse. The bits are
those of tests/kernels/test_codec.py."""

from __future__ import annotations

import pytest
import torch

import reference
from codec_checks import assert_bits, check_dequantize, check_quantize, check_quantize_absmax, weights
from samples import DTYPES

pytestmark = pytest.mark.cuda

OPS = torch.ops.qlora


@pytest.mark.parametrize("dtype", DTYPES)
def test_data_at_any_address(dtype: torch.dtype) -> None:
    """A view may start at an address that is not aligned for vector loads."""
    numel = 16384 + 100
    w = weights(numel + 3, dtype, "cuda")[3:]
    packed, absmax = check_quantize(w, 64)
    shifted = torch.cat([packed[:1], packed])[1:]
    assert shifted.data_ptr() % 4 == 1
    check_dequantize(shifted, check_quantize_absmax(absmax, 256), numel, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_in_the_largest_blocks(dtype: torch.dtype) -> None:
    w = torch.randn(8, 4096).to(dtype)
    w[0], w[1] = 0.0, torch.finfo(dtype).max
    w[2] *= 1e-38
    w[3, 4095], w[4, 0], w[5, 30] = float("nan"), float("inf"), -float("inf")
    packed, absmax = check_quantize(w.cuda(), 4096)
    assert absmax.isnan().tolist() == [3 <= row <= 5 for row in range(8)]
    check_dequantize(packed, (absmax,), w.numel(), 4096)
    check_dequantize(packed, check_quantize_absmax(absmax, 256), w.numel(), 4096)


def test_two_streams() -> None:
    """Each call runs on the current stream, and synchronizes with no other."""
    w = [weights(50_000, torch.bfloat16, "cuda") for _ in range(2)]
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
