"""Encoding and decoding on any device, compared with the oracle bit for bit."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import Tensor

import reference
from samples import DTYPES

OPS = torch.ops.qlora


def bits(x: Tensor | np.ndarray, dtype: torch.dtype | None = None) -> np.ndarray:
    """Flat bit patterns; bfloat16 as uint16. With ``dtype``, the patterns are of this type, and all NaNs are equal,
    because payloads are not part of the format."""
    t = torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x.detach().cpu()
    t = t.reshape(-1).contiguous()
    if dtype is not None and dtype.is_floating_point:
        t = t.view(dtype)
        t = torch.where(t.isnan(), torch.full_like(t, float("nan")), t)
    return t.view({1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[t.element_size()]).numpy()


def assert_bits(got: Tensor | np.ndarray, expected: Tensor | np.ndarray, what: str) -> None:
    """The CPU's kernels also have the oracle's NaNs."""
    dtype = got.dtype if isinstance(got, Tensor) and got.is_cuda else None
    a, b = bits(got, dtype), bits(expected, dtype)
    assert a.shape == b.shape, what
    wrong = np.flatnonzero(a != b)
    if wrong.size:
        i = wrong[0]
        pytest.fail(f"{what}: {wrong.size} of {a.size} differ, the first at {i}: {a[i]:#x}, expected {b[i]:#x}")


def check_quantize(w: Tensor, block: int, code: str = "nf4") -> tuple[Tensor, Tensor]:
    packed, absmax = OPS.quantize_nf4(w, block, code)
    assert packed.device == absmax.device == w.device
    expected = reference.quantize_nf4(w.float().cpu().numpy(), block, reference.CODES[code])
    assert_bits(absmax, expected[1], "absmax")
    assert_bits(packed, expected[0], "packed")
    return packed, absmax


def check_quantize_absmax(absmax: Tensor, nested_block: int) -> tuple[Tensor, ...]:
    codes, nested, offset = OPS.quantize_absmax(absmax, nested_block)
    expected = reference.quantize_absmax(absmax.cpu().numpy(), nested_block)
    assert_bits(offset, np.array(expected[2]), "nested_offset")
    assert_bits(nested, expected[1], "nested_absmax")
    assert_bits(codes, expected[0], "codes")
    return codes, nested, offset


def check_dequantize(
    packed: Tensor, scales: tuple, numel: int, block: int, nested_block: int = 256, code: str = "nf4"
) -> None:
    arrays = [s.cpu().numpy() for s in scales]
    with np.errstate(invalid="ignore", over="ignore"):
        absmax = arrays[0] if len(arrays) == 1 else reference.dequantize_absmax(*arrays, nested_block)
        decoded = reference.dequantize_nf4(packed.cpu().numpy(), absmax, numel, block, reference.CODES[code])
    if len(scales) > 1:
        assert_bits(OPS.dequantize_absmax(*scales, nested_block), absmax, "dequantize_absmax")
    expected = decoded, reference.bfloat16_bits(decoded), reference.float16_bits(decoded)
    for dtype, rounded in zip(DTYPES, expected, strict=True):
        nested = scales[1:] or (None, None)
        got = OPS.dequantize_nf4(packed, scales[0], *nested, block, nested_block, [numel], dtype, code)
        assert got.device == packed.device
        assert_bits(got, rounded, f"dequantize_nf4 to {dtype}")


def weights(numel: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Normal, with a different scale in each block."""
    scale = torch.exp(0.5 * torch.randn(numel // 32 + 1)).repeat_interleave(32)[:numel]
    return (torch.randn(numel) * scale).to(device, dtype)


def neighbourhoods(points: np.ndarray, ulps: int) -> np.ndarray:
    """Every float32 at most ``ulps`` away from one of ``points``."""
    steps = np.arange(-ulps, ulps + 1)
    return (points.view(np.int32)[:, None] + steps).astype(np.int32).view(np.float32).reshape(-1)


def free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
