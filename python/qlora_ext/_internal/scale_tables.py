"""The values of 8-bit scales. Codes of NaN, which no weight may have, stand for 0, so that tables are finite."""

from __future__ import annotations

import torch
from torch import Tensor

E8M0_NAN = 0xFF
E4M3_NAN = 0x7F  # and, with the sign, 0xFF
E4M3_MAX = 448.0


def e8m0_table(device: torch.device | str = "cpu") -> Tensor:
    """The float32 values of E8M0 (OCP Microscaling Formats): 2^(u - 127).

    They are made from their bits, because torch may flush 2^-127, a subnormal number, to zero.
    """
    bits = torch.arange(256, dtype=torch.int32, device=device) << 23
    bits[0] = 1 << 22
    bits[E8M0_NAN] = 0
    return bits.view(torch.float32)


def e4m3_table(device: torch.device | str = "cpu") -> Tensor:
    """The float32 values of E4M3."""
    values = torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()
    return torch.where(values.isnan(), 0.0, values)


def has_e4m3_nan(codes: Tensor) -> bool:
    """Whether one of the uint8 ``codes`` is a NaN of E4M3."""
    return bool(((codes & E4M3_NAN) == E4M3_NAN).any())
