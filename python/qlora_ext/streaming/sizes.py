"""Sizes of memory that are given as arguments."""

from __future__ import annotations

import reprlib

from .. import sizes


def parse_size(name: str, size: str | int | float) -> int:
    """The bytes of a size such as "6GB", "512MiB" or 6e9.

    Args:
        name: of the argument, for the error.

    Raises:
        ValueError: no positive size.
    """
    number: float | None = None
    if isinstance(size, str):
        number = sizes.parse_size(size.strip())
    elif isinstance(size, (int, float)) and not isinstance(size, bool):
        number = float(size)
    if number is None or not 1 <= number < float("inf"):
        raise ValueError(f"{name}: expected a size such as 24GB, 40GiB or a number of bytes, got {reprlib.repr(size)}")
    return int(number)
