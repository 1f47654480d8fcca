"""Sizes as users write them: 24GB, 40GiB, 512."""

from __future__ import annotations

import re
import reprlib

_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def bytes_of(text: str) -> float | None:
    """The number of bytes that ``text`` names; None if it is not a size."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][0-9]+)?)\s*([A-Za-z]*)", text)
    if not match or match[2].upper() not in _UNITS:
        return None
    return float(match[1]) * _UNITS[match[2].upper()]


def parse_size(name: str, size: str | int | float) -> int:
    """The bytes of a size such as "6GB", "512MiB" or 6e9.

    Args:
        name: of the argument, for the error.

    Raises:
        ValueError: ``size`` is not a size of at least one byte.
    """
    number: float | None = None
    if isinstance(size, str):
        number = bytes_of(size.strip())
    elif isinstance(size, (int, float)) and not isinstance(size, bool):
        number = float(size)
    if number is None or not 1 <= number < float("inf"):
        raise ValueError(f"{name}: expected a size such as 24GB, 40GiB or a number of bytes, got {reprlib.repr(size)}")
    return int(number)
