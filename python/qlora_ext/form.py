"""``Form``: how a 4-bit weight is quantized, and in which dtype a module computes with it."""

from __future__ import annotations

import dataclasses

import torch

from . import formats


@dataclasses.dataclass(frozen=True)
class Form:
    """What all 4-bit weights of a module have in common; checked as it is made.

    Attributes:
        compute_dtype: of the products, biases and decoded rows.
        block_size: elements per scale: a power of two from 16 to 4096.
        double_quant: whether the scales are 8-bit codes themselves.
        nested_block_size: scales per nested scale: from 1 to 2^20.
        code: the name of the 16 values.

    Raises:
        ValueError: no block size or code of the formats. TypeError: ``compute_dtype`` is no floating-point dtype.
    """

    compute_dtype: torch.dtype
    block_size: int = 64
    double_quant: bool = True
    nested_block_size: int = 256
    code: str = formats.NF4

    def __post_init__(self) -> None:
        formats.check_block_sizes(self.block_size, self.nested_block_size)
        formats.check_code(self.code)
        if not isinstance(self.compute_dtype, torch.dtype) or not self.compute_dtype.is_floating_point:
            raise TypeError(f"compute_dtype: expected a floating-point torch.dtype, got {self.compute_dtype!r}")
