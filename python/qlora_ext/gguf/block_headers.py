"""The headers of blocks in GGUF files: scales and offsets become those of a ``Weight4bit``, and back, losslessly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._internal import scale_tables
from ..weight import Weight4bit

Fields = dict[str, Any]  # of a Weight4bit


class NotFiniteError(ValueError):
    """A scale is NaN or infinity: what was ``found``, and in which ``block``."""

    def __init__(self, found: str, block: int) -> None:
        super().__init__(found)
        self.found, self.block = found, block


def _float16(header: Tensor, name: str) -> Tensor:
    """Two bytes of each header as a float16.

    Raises:
        NotFiniteError: a value is NaN or infinity.
    """
    values = header.contiguous().view(torch.float16).reshape(-1)
    if not values.isfinite().all():
        at = int((~values.isfinite()).nonzero()[0])
        raise NotFiniteError(f"{name} = {values[at].item()}", at)
    return values


def _bytes_of(values: Tensor) -> Tensor:
    """The bytes of one float16 per block."""
    return values.reshape(-1, 1).to(torch.float16).view(torch.uint8)


def read_scale(header: Tensor) -> Fields:
    return {"absmax": _float16(header, "d")}


def write_scale(w4: Weight4bit) -> Tensor:
    return _bytes_of(w4.absmax)


def read_affine(header: Tensor) -> Fields:
    return {"absmax": _float16(header[:, :2], "d"), "block_offsets": _float16(header[:, 2:], "m")}


def write_affine(w4: Weight4bit) -> Tensor:
    return torch.cat((_bytes_of(w4.absmax), _bytes_of(w4.tensors["block_offsets"])), dim=1)


def read_e8m0(header: Tensor) -> Fields:
    exponents = header.reshape(-1)
    if (exponents == scale_tables.E8M0_NAN).any():
        at = int((exponents == scale_tables.E8M0_NAN).nonzero()[0])
        raise NotFiniteError("0xFF (NaN)", at)
    return {"absmax": exponents.contiguous(), "scale_table": TABLES["MXFP4"]}


def write_e8m0(w4: Weight4bit) -> Tensor:
    return w4.absmax.reshape(-1, 1)


def read_e4m3(header: Tensor) -> Fields:
    return {"absmax": header.reshape(-1), "scale_table": TABLES["NVFP4"]}


def write_e4m3(w4: Weight4bit) -> Tensor:
    return w4.absmax.reshape(-1, 4)


def read_nested(header: Tensor) -> Fields:
    # Eight scales and eight mins of 6 bits are in twelve bytes. The first four bytes hold scales 0 to 3 and, in their
    # upper two bits, those of scales 4 to 7; the next four hold the mins likewise; the last four hold the lower four
    # bits of scales 4 to 7 (low nibble) and of mins 4 to 7 (high nibble).
    lower, mins, rest = header[:, 4:].reshape(-1, 3, 4).unbind(1)
    upper = (rest & 0x0F) | ((lower >> 2) & 0x30)
    upper_mins = (rest >> 4) | ((mins >> 2) & 0x30)
    return {
        "absmax": torch.cat((lower & 0x3F, upper), dim=1).reshape(-1),
        "nested_absmax": _float16(header[:, :2], "d").float(),
        "scale_table": _UNSIGNED,
        "block_offsets": torch.cat((mins & 0x3F, upper_mins), dim=1).reshape(-1),
        "offset_scale": _float16(header[:, 2:4], "dmin").float(),
    }


def write_nested(w4: Weight4bit) -> Tensor:
    tensors = w4.tensors
    lower, upper = tensors["absmax"].reshape(-1, 2, 4).unbind(1)
    mins, upper_mins = tensors["block_offsets"].reshape(-1, 2, 4).unbind(1)
    parts = (
        _bytes_of(tensors["nested_absmax"]),
        _bytes_of(tensors["offset_scale"]),
        lower | ((upper & 0x30) << 2),
        mins | ((upper_mins & 0x30) << 2),
        (upper & 0x0F) | (upper_mins << 4),
    )
    return torch.cat(parts, dim=1)


def read_signed(header: Tensor) -> Fields:
    """Q6_K's: sixteen scales, and what multiplies them."""
    return {
        "absmax": header[:, :16].reshape(-1),
        "nested_absmax": _float16(header[:, 16:], "d").float(),
        "scale_table": TABLES["Q6_K"],
    }


def write_signed(w4: Weight4bit) -> Tensor:
    return torch.cat((w4.absmax.reshape(-1, 16), _bytes_of(w4.tensors["nested_absmax"])), dim=1)


def read_shifted(header: Tensor) -> Fields:
    """IQ4_XS': eight scales of 6 bits, whose upper two bits are in two bytes, and whose lower four in the next four."""
    upper = (header[:, 2:4, None] >> _SHIFTS) & 3
    lower = torch.stack((header[:, 4:] & 0x0F, header[:, 4:] >> 4), dim=2)
    return {
        "absmax": (lower.reshape(-1, 8) | (upper.reshape(-1, 8) << 4)).reshape(-1),
        "nested_absmax": _float16(header[:, :2], "d").float(),
        "scale_table": TABLES["IQ4_XS"],
    }


def write_shifted(w4: Weight4bit) -> Tensor:
    scales = w4.absmax.reshape(-1, 8)
    upper = ((scales >> 4).view(-1, 2, 4) << _SHIFTS).sum(-1, dtype=torch.uint8)
    lower = (scales[:, 0::2] & 0x0F) | (scales[:, 1::2] << 4)
    return torch.cat((_bytes_of(w4.tensors["nested_absmax"]), upper, lower), dim=1)


def _ue4m3_table() -> Tensor:
    """The values of ggml's unsigned E4M3, which ignores the sign, and whose code 0x7F, NaN elsewhere, is zero."""
    table = scale_tables.e4m3_table().abs()
    table[0x7F], table[0xFF] = 0.0, 480.0
    return table


_SHIFTS = torch.arange(0, 8, 2, dtype=torch.uint8, device="cpu")
_UNSIGNED = torch.arange(256, dtype=torch.float32, device="cpu")
# The values of the codes of scales, by the name of the type.
TABLES = {
    "MXFP4": scale_tables.e8m0_table(),
    "NVFP4": _ue4m3_table(),
    "Q4_K": _UNSIGNED,
    "Q5_K": _UNSIGNED,
    "Q6_K": torch.where(_UNSIGNED < 128, _UNSIGNED, _UNSIGNED - 256),
    "IQ4_XS": _UNSIGNED - 32,
}
