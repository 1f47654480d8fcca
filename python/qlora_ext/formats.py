"""The names and sizes of the packed formats. Those of the compiled library are read from it."""

from __future__ import annotations

import math
import reprlib
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import _C

if TYPE_CHECKING:
    from torch import Tensor

CODES: tuple[str, ...] = tuple(_C.codes())
# The codes of more than 4 bits, and their bits.
WIDE_CODES: dict[str, int] = _C.wide_codes()
NF4 = "nf4"
FP4 = "fp4"
# The names of the formats for which an adapter can be trained merge-aware.
SERVED_FORMATS = ("q4_0", "iq4_nl", "int4", "nvfp4", "mxfp4", "nf4")
# The formats to which a weight can be quantized when it is read. NVFP4 is missing, because layers that servers join
# share a factor.
READ_IN = tuple(name for name in SERVED_FORMATS if name != "nvfp4")
# The forms in which scales and offsets are stored: ScaleForm and OffsetForm in cpp/format/scales.h.
FLOAT32 = "float32"
FLOAT16 = "float16"
BFLOAT16 = "bfloat16"
NESTED8 = "nested8"  # codes of the dynamic map, times a nested scale, plus a mean
TABLE8 = "table8"  # codes of a table
NESTED_TABLE8 = "nested_table8"  # codes of a table, times a nested scale
ZERO_POINT8 = "zero_point8"  # integers, whose unit is minus the block's scale
SCALED8 = "scaled8"  # integers, whose unit is minus a nested scale
SCALE_FORMS = (FLOAT32, FLOAT16, BFLOAT16, NESTED8, TABLE8, NESTED_TABLE8)
OFFSET_FORMS = (FLOAT32, FLOAT16, BFLOAT16, ZERO_POINT8, SCALED8)
# What meets a 4-bit weight: the activations as they are, or rounded to int8 on the CPU.
EXACT, INT8 = ACTIVATIONS = ("exact", "int8")
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
        raise ValueError(f"scales: expected {', '.join(SCALE_FORMS)}, got {reprlib.repr(scales)}")


def check_offsets(offsets: Any) -> None:
    """Raises a ValueError unless ``offsets`` is None or the name of a form of offsets."""
    if offsets is not None and offsets not in OFFSET_FORMS:
        raise ValueError(f"offsets: expected None, {', '.join(OFFSET_FORMS)}, got {reprlib.repr(offsets)}")


def check_activations(activations: Any) -> None:
    """Raises a ValueError unless ``activations`` is one of ``ACTIVATIONS``."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations: expected {' or '.join(ACTIVATIONS)}, got {reprlib.repr(activations)}")


# A code that a caller makes up has no entry in a table: its name contains the bits of its 16 float32 values.
_MADE_UP = "0x"
_VALUES = struct.Struct(">16f")


_NAMED = {
    name: _C.code_values(name) for name in (*CODES, *WIDE_CODES)
}  # at the import, because Dynamo cannot trace a call of _C


def bits_of(code: str) -> int:
    """The bits of a code."""
    return WIDE_CODES.get(code, 4)


def code_values(code: str) -> tuple[float, ...]:
    """The values of a code, by code: 16, or 2^b of a code of b bits. Those of e4m3 and e5m2 include NaN.

    Raises:
        ValueError: there is no such code.
    """
    if code in _NAMED:
        return _NAMED[code]
    if not code.startswith(_MADE_UP):
        return _C.code_values(code)
    try:
        values = _VALUES.unpack(bytes.fromhex(code.removeprefix(_MADE_UP)))
    except (ValueError, struct.error):
        raise ValueError(
            f"code: expected {', '.join(_NAMED)}, or 0x and the 128 hexadecimal digits of 16 float32 values, "
            f"got {reprlib.repr(code)}"
        ) from None
    _check_values(values)
    return values


def _check_values(values: Sequence[float]) -> None:
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"code: expected 16 finite float32 values, got {reprlib.repr(values)}")
    if not any(values):
        raise ValueError("code: expected a value other than 0, got 16 zeros")


def code_name(values: Sequence[float] | Tensor) -> str:
    """The name of the code with these 16 values.

    Args:
        values: 16 finite numbers, by code, in any order; they are rounded to float32.

    Returns:
        One of ``CODES`` if it has these values, bit for bit; else a name that contains them.

    Raises:
        ValueError: there are not 16 values, one is not finite, or all are zero.

    Example:
        >>> from qlora_ext import formats
        >>> formats.code_name([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15])
        'uint4'
        >>> formats.code_name(torch.linspace(-1, 1, 16))[:18]
        '0xbf800000bf5dddde'
    """
    try:
        import torch  # not at the top, because the parsers of a command need the names without it

        exact = torch.as_tensor(values, dtype=torch.float32, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"code: expected a name or 16 numbers, got {reprlib.repr(values)}") from None
    if exact.shape != (16,):
        raise ValueError(f"code: expected 16 values, got shape {list(exact.shape)}")
    _check_values(exact.tolist())
    bits = _VALUES.pack(*exact.tolist())
    for name in CODES:
        if bits == _VALUES.pack(*_NAMED[name]):
            return name
    return _MADE_UP + bits.hex()


def check_code(code: Any) -> None:
    """Raises a ValueError unless ``code`` is the name of a code."""
    if not isinstance(code, str):
        raise ValueError(f"code: expected {', '.join((*CODES, *WIDE_CODES))}, got {reprlib.repr(code)}")
    # _C also accepts the codes made up for tests. It is called last, because Dynamo cannot trace it.
    if code not in _NAMED:
        code_values(code)
