"""The values of 8-bit scales."""

from __future__ import annotations

from torch import Tensor

from .._internal.scale_tables import E4M3_NAN, E8M0_NAN, e4m3_table, e8m0_table

__all__ = ["E4M3_NAN", "E8M0_NAN", "e4m3_table", "e8m0_table", "has_e4m3_nan"]


def has_e4m3_nan(codes: Tensor) -> bool:
    """Whether one of the uint8 ``codes`` is a NaN of E4M3."""
    return bool(((codes & E4M3_NAN) == E4M3_NAN).any())
