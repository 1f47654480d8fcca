"""Sizes as people write them: 24GB, 40GiB, 512."""

from __future__ import annotations

import re

_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_size(text: str) -> float | None:
    """The bytes that ``text`` says; None where it is no size."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][0-9]+)?)\s*([A-Za-z]*)", text)
    if not match or match[2].upper() not in _UNITS:
        return None
    return float(match[1]) * _UNITS[match[2].upper()]
