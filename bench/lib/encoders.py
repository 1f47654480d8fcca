"""Other 4-bit formats, for comparison: each encodes a weight and decodes it again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import qlora_ext

# bitsandbytes' FP4: two bits of exponent, one of mantissa (the subnormal is 1/192), scaled to 1.
_FP4 = [0.0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0]
FP4 = torch.tensor([*(-v for v in reversed(_FP4[1:])), *_FP4])
# Fifteen even steps: absmax quantization to four bits.
INT4 = torch.arange(-7, 8) / 7


def rounded(w: Tensor, levels: Tensor, block_size: int) -> Tensor:
    """Rounds each block of ``w``, divided by its absmax, to the nearest of ``levels`` [L], which rise from -1 to 1."""
    flat = w.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block_size)).reshape(-1, block_size)
    absmax = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    codes = torch.bucketize(blocks / absmax, (levels[1:] + levels[:-1]) / 2)
    return (levels[codes] * absmax).flatten()[: len(flat)].reshape(w.shape)


def nf4(w: Tensor, block_size: int, double_quant: bool) -> Tensor:
    return qlora_ext.quantize_nf4(w, block_size, double_quant).dequantize(torch.float32)


# For each format, a function from a float32 weight and a block size to the decoded weight.
FORMATS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "NF4": lambda w, block_size: nf4(w, block_size, False),
    "NF4, double quantization": lambda w, block_size: nf4(w, block_size, True),
    "FP4": lambda w, block_size: rounded(w, FP4, block_size),
    "Int4": lambda w, block_size: rounded(w, INT4, block_size),
}


def bits(name: str, block_size: int) -> float:
    """Bits per parameter of a large weight: four, and its share of a float32 scale, or of nested 8-bit scales."""
    scale = 8 + 32 / 256 if "double" in name else 32
    return 4 + scale / block_size
