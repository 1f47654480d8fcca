"""The names and sizes of the 4-bit formats, read from the compiled library so that they are defined once."""

from __future__ import annotations

import reprlib
from typing import Any

from . import _C

CODES: tuple[str, ...] = tuple(_C.codes())
NF4 = "nf4"
# The forms in which scales are stored: ScaleForm in cpp/format/scales.h.
FLOAT32 = "float32"
NESTED8 = "nested8"
SCALE_FORMS = (FLOAT32, NESTED8)
BLOCK_SIZES: tuple[int, ...] = tuple(_C.block_sizes())
MAX_NESTED_BLOCK_SIZE: int = _C.MAX_NESTED_BLOCK_SIZE
MAX_ELEMENTS: int = _C.MAX_ELEMENTS  # cpp/format/packing.h has the reason


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_block_sizes(block_size: Any = 64, nested_block_size: Any = 256) -> None:
    """Raises a ValueError unless both are valid block sizes."""
    if not is_integer(block_size) or block_size not in BLOCK_SIZES:
        raise ValueError(
            f"block_size: expected a power of two from {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}, "
            f"got {reprlib.repr(block_size)}"
        )
    if not is_integer(nested_block_size) or not 1 <= nested_block_size <= MAX_NESTED_BLOCK_SIZE:
        raise ValueError(
            f"nested_block_size: expected an integer from 1 to {MAX_NESTED_BLOCK_SIZE}, "
            f"got {reprlib.repr(nested_block_size)}"
        )


def check_scales(scales: Any) -> None:
    """Raises a ValueError unless ``scales`` is the name of a scale form."""
    if scales not in SCALE_FORMS:
        raise ValueError(f"scales: expected {' or '.join(SCALE_FORMS)}, got {reprlib.repr(scales)}")


def check_code(code: Any) -> None:
    """Raises a ValueError unless ``code`` is the name of a 4-bit code."""
    if not isinstance(code, str):
        raise ValueError(f"code: expected {', '.join(CODES)}, got {reprlib.repr(code)}")
    # _C also accepts the codes made up for tests. It is called last, because Dynamo cannot trace it.
    if code not in CODES:
        _C.code_values(code)
