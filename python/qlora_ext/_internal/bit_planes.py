"""Packs codes of any width, in the layout of cpp/format/packing.h."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 32  # elements whose bit planes lie together


def has_units(bits: int) -> bool:
    """Whether codes of that width are stored in planes of 4 and fewer bits, in units of ``UNIT`` elements."""
    return bits in (5, 6)


def packed_width(width: int, bits: int) -> int:
    """The bytes of a row of ``width`` codes: a multiple of ``UNIT`` if there are units, and even for 4 bits."""
    return width * bits // 8


def to_fields(codes: Tensor, bits: int) -> Tensor:
    """[..., K] codes below 2^bits in bytes [..., K * bits / 8], those of lower elements in lower bits."""
    per_byte = 8 // bits
    parts = codes.unflatten(-1, (-1, per_byte))
    packed: Tensor = parts[..., 0]
    for i in range(1, per_byte):
        packed = packed | parts[..., i] << bits * i
    return packed


def from_fields(fields: Tensor, bits: int) -> Tensor:
    """The inverse of ``to_fields``."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=fields.device)
    return ((fields.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 [..., K], packed: uint8 [..., K * bits / 8].

    Example:
        >>> from qlora_ext._internal import bit_planes
        >>> codes = torch.arange(32, dtype=torch.uint8)
        >>> packed = bit_planes.pack(codes, 5)
        >>> packed.shape, torch.equal(bit_planes.unpack(packed, 5), codes)
        (torch.Size([20]), True)
    """
    if bits == 8:
        return codes
    low = codes & 15
    nibbles = low[..., 0::2] << 4 | low[..., 1::2]
    if bits == 4:
        return nibbles
    return joined(nibbles, to_fields(codes >> 4, bits - 4), bits)


def joined(low: Tensor, upper: Tensor, bits: int) -> Tensor:
    """The planes of the low 4 bits of codes of 5 or 6 bits, uint8 [..., K / 2], and of their upper bits, as packed."""
    units = low.unflatten(-1, (-1, UNIT // 2)), upper.unflatten(-1, (-1, UNIT // 8 * (bits - 4)))
    return torch.cat(units, -1).flatten(-2)


def planes(packed: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The inverse of ``joined``."""
    units = packed.unflatten(-1, (-1, UNIT // 8 * bits))
    return units[..., : UNIT // 2].flatten(-2), units[..., UNIT // 2 :].flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of ``pack``: uint8 [..., K]."""
    if bits == 8:
        return packed
    upper = None
    if bits > 4:
        packed, upper = planes(packed, bits)
        upper = from_fields(upper, bits - 4)
    low = torch.stack([packed >> 4, packed & 15], -1).flatten(-2)
    return low if upper is None else low | upper << 4
