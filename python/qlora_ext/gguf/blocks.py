"""The types of GGUF files that are used as they are: their blocks become a ``Weight4bit``, and back, losslessly.

A file stores a weight as a sequence of blocks along its rows:

    type     elements  block                                                     scales per  value
    Q4_0           32  f16 d, low[16]                                            32          d (c - 8)
    IQ4_NL         32  f16 d, low[16]                                            32          d IQ4_NL[c]
    Q4_1           32  f16 d, f16 m, low[16]                                     32          d c + m
    MXFP4          32  u8 e, low[16]                                             32          2^(e - 127) E2M1[c]
    NVFP4          64  u8[4] s, low[4][8]                                        16          E4M3[s] E2M1[c]
    Q4_K          256  f16 d, f16 dmin, u8[12] of 6 bits, low[4][32]             32          d s c - dmin m
    IQ4_XS        256  f16 d, u8[6] of 6 bits, low[8][16]                        32          d (s - 32) IQ4_NL[c]
    Q5_0           32  f16 d, upper[4], low[16]                                  32          d (c - 16)
    Q5_1           32  f16 d, f16 m, upper[4], low[16]                           32          d c + m
    Q5_K          256  f16 d, f16 dmin, u8[12] of 6 bits, upper[32], low[4][32]  32          d s c - dmin m
    Q6_K          256  low[2][64], upper[2][32], i8[16] s, f16 d                 16          d s (c - 32)
    Q8_0           32  f16 d, bytes[32]                                          32          d c

``low`` has the low four bits of the codes: the low nibbles of a group (in brackets: the last dimension) are the first
half of the group's elements, and the high nibbles are the second half. We store consecutive elements in one byte.
``upper`` has the other bits. In the K types, byte l of 32 has those of element l of each unit of 32 elements, the first
unit's in the lowest bits; in Q5_0 and Q5_1, bits are in the order of the elements, as ours. ``bytes`` are signed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._internal import bit_planes
from ..form import FLOAT_DTYPES, PRESETS, Form
from ..formats import FLOAT16, NESTED8, ZERO_POINT8
from ..untrusted import FileError
from ..weight import Weight4bit, weight_of
from . import block_headers as headers
from .block_headers import TABLES, Fields
from .file import TensorInfo

_CHUNK = 1 << 18  # bytes that are repacked at a time


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The layout of a type's blocks.

    Attributes:
        elements: per block of the file.
        parts: the bytes of each part of a block, in order: "header", "low", "upper", "bytes".
        group: bytes of "low" whose low nibbles precede their high nibbles.
        read: the headers [blocks, header], to the fields of a ``Weight4bit``. It raises a NotFiniteError.
        write: the inverse of ``read``.
    """

    elements: int
    parts: dict[str, int]
    group: int
    read: Callable[[Tensor], Fields]
    write: Callable[[Weight4bit], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes per block of the file."""
        return sum(self.parts.values())

    @property
    def by_units(self) -> bool:
        """Whether a byte of "upper" has bits of several units."""
        return "upper" in self.parts and self.elements > bit_planes.UNIT


def _from_halves(codes: Tensor, group: int) -> Tensor:
    """Consecutive elements in one byte, the first one in the high nibble, from groups of halves."""

    def repack(halves: Tensor) -> Tensor:
        even, odd = halves[:, 0::2], halves[:, 1::2]
        return torch.cat(((even << 4) | (odd & 0x0F), (even & 0xF0) | (odd >> 4)), dim=1)

    return _repacked(codes, group, repack)


def _to_halves(packed: Tensor, group: int) -> Tensor:
    """The inverse of ``_from_halves``."""

    def repack(groups: Tensor) -> Tensor:
        first, second = groups.chunk(2, dim=1)
        return torch.stack(((first >> 4) | (second & 0xF0), (first & 0x0F) | (second << 4)), dim=2)

    return _repacked(packed, group, repack)


def _by_elements(upper: Tensor, bits: int) -> Tensor:
    """The upper ``bits`` of consecutive elements in one byte, from 32 bytes of which each has one element per unit."""

    def repack(groups: Tensor) -> Tensor:
        codes = bit_planes.from_fields(groups, bits).unflatten(1, (bit_planes.UNIT, -1))
        return bit_planes.to_fields(codes.transpose(1, 2), bits)

    return _repacked(upper, bit_planes.UNIT, repack)


def _by_units(upper: Tensor, bits: int) -> Tensor:
    """The inverse of ``_by_elements``."""

    def repack(groups: Tensor) -> Tensor:
        codes = bit_planes.from_fields(groups, bits).unflatten(1, (-1, bit_planes.UNIT))
        return bit_planes.to_fields(codes.transpose(1, 2).flatten(1), bits)

    return _repacked(upper, bit_planes.UNIT, repack)


def _repacked(codes: Tensor, group: int, repack: Callable[[Tensor], Tensor]) -> Tensor:
    """``codes`` [rows, bytes], with ``repack`` applied to its groups, a few rows at a time that stay in the cache."""
    out = torch.empty(codes.shape, dtype=torch.uint8, device="cpu")
    step = max(1, _CHUNK // codes.shape[1])
    for source, target in zip(codes.split(step), out.split(step), strict=True):
        target.copy_(repack(source.reshape(-1, group)).reshape(target.shape))
    return out


def _packed(layout: _Layout, parts: dict[str, Tensor], bits: int) -> Tensor:
    """The codes of blocks as we pack them, [blocks, bytes], from their parts."""
    if "bytes" in parts:
        return parts["bytes"] ^ 0x80  # as unsigned codes
    low = _from_halves(parts["low"], layout.group)
    if "upper" not in parts:
        return low
    upper = _by_elements(parts["upper"], bits - 4) if layout.by_units else parts["upper"]
    return bit_planes.joined(low, upper, bits)


def _parts(layout: _Layout, packed: Tensor, bits: int) -> dict[str, Tensor]:
    """The inverse of ``_packed``."""
    if "bytes" in layout.parts:
        return {"bytes": packed ^ 0x80}
    if "upper" not in layout.parts:
        return {"low": _to_halves(packed, layout.group)}
    low, upper = bit_planes.planes(packed, bits)
    upper = _by_units(upper, bits - 4) if layout.by_units else upper
    return {"low": _to_halves(low, layout.group), "upper": upper}


def _drop_signs_of_zeros(packed: Tensor) -> None:
    """Replaces E2M1's code of -0, which is 8, by that of 0, in place."""
    for part in packed.view(-1).split(_CHUNK):
        for nibble, negative in ((0x0F, 0x08), (0xF0, 0x80)):
            part &= ~(((part & nibble) == negative).to(torch.uint8) * nibble)


_Q4_0 = _Layout(32, {"header": 2, "low": 16}, 16, headers.read_scale, headers.write_scale)
_LAYOUTS = {
    "Q4_0": _Q4_0,
    "Q4_1": _Layout(32, {"header": 4, "low": 16}, 16, headers.read_affine, headers.write_affine),
    "IQ4_NL": _Q4_0,
    "MXFP4": _Layout(32, {"header": 1, "low": 16}, 16, headers.read_e8m0, headers.write_e8m0),
    "NVFP4": _Layout(64, {"header": 4, "low": 32}, 8, headers.read_e4m3, headers.write_e4m3),
    "Q4_K": _Layout(256, {"header": 16, "low": 128}, 32, headers.read_nested, headers.write_nested),
    "IQ4_XS": _Layout(256, {"header": 8, "low": 128}, 16, headers.read_shifted, headers.write_shifted),
    "Q5_0": _Layout(32, {"header": 2, "upper": 4, "low": 16}, 16, headers.read_scale, headers.write_scale),
    "Q5_1": _Layout(32, {"header": 4, "upper": 4, "low": 16}, 16, headers.read_affine, headers.write_affine),
    "Q5_K": _Layout(256, {"header": 16, "upper": 32, "low": 128}, 32, headers.read_nested, headers.write_nested),
    "Q6_K": _Layout(256, {"low": 128, "upper": 64, "header": 18}, 64, headers.read_signed, headers.write_signed),
    "Q8_0": _Layout(32, {"header": 2, "bytes": 32}, 1, headers.read_scale, headers.write_scale),
}
# The names of the types.
KINDS = tuple(_LAYOUTS)


def is_packed(tensor: TensorInfo) -> bool:
    """Whether a tensor of a file is a matrix, or a stack of matrices, of one of these types."""
    return len(tensor.shape) > 1 and tensor.type_name in _LAYOUTS


def form_of(kind: str) -> Form:
    """The form of the weights of a type."""
    return PRESETS[kind.lower()]


def read(kind: str, data: Any, shape: Sequence[int], where: str, row: int = 0) -> Weight4bit:
    """The weight that a tensor of a GGUF file is.

    Args:
        kind: the name of its type, one of ``KINDS``.
        data: its bytes: any object with a buffer.
        shape: [N, K], or [E, N, K] for a stack of E matrices.
        where: the file and the tensor, for error messages.
        row: the number of the first row in that tensor, for error messages.

    Returns:
        The weight, with float32 as its ``dtype``. All values have ggml's bits. ggml has no negative zero, so the code
        that is one in our table becomes the code of zero.

    Raises:
        FileError: the rows do not consist of whole blocks, the data have another size, or a scale is NaN or infinity.
    """
    layout, form = _LAYOUTS[kind], form_of(kind)
    *leading, width = shape
    if width % layout.elements:
        raise FileError(f"{where}: expected rows of whole {kind} blocks of {layout.elements} elements, got {width}")
    array = np.frombuffer(data, np.uint8)
    size = math.prod(shape) // layout.elements * layout.nbytes
    if array.size != size:
        raise FileError(f"{where}: truncated or damaged: expected {size} bytes of {kind} data, got {array.size}")
    blocks = torch.from_numpy(array if array.flags.writeable else array.copy()).reshape(-1, layout.nbytes)
    parts = dict(zip(layout.parts, blocks.split([*layout.parts.values()], dim=1), strict=True))
    try:
        fields = layout.read(parts["header"])
    except headers.NotFiniteError as error:
        block = row * (width // layout.elements) + error.block
        raise FileError(f"{where}: expected finite scales, got {error.found} in block {block}") from error
    packed = _packed(layout, parts, form.bits)
    if form.code == "e2m1":
        _drop_signs_of_zeros(packed)
    stack = leading[:-1]
    tensors: Fields = {name: t.reshape(*stack, -1) for name, t in fields.items() if name != "scale_table"}
    if "scale_table" in fields:
        tensors["scale_table"] = fields["scale_table"].expand(*stack, 256).clone()
    return weight_of(
        form,
        **tensors,
        packed=packed.reshape(*leading, bit_planes.packed_width(width, form.bits)),
        shape=torch.Size(shape),
        dtype=torch.float32,
    )


def in_form_of(kind: str, w4: Weight4bit) -> Weight4bit | None:
    """The same weight on the CPU, with the same codes and values, in the form of a type; None if that cannot hold it.

    Scales for more elements than the type's blocks have are repeated, and scales of another dtype are converted if
    float16 holds their values. Zero points of 8 are the ones that Q4_0 has.
    """
    form, fields = form_of(kind), dict(w4.tensors)
    if w4.block_size % form.block_size or w4.shape[-1] % w4.block_size or w4.form.scales == NESTED8:
        return None
    if w4.form.reordered:
        return None
    code = w4.code
    if code == f"u{form.code}" and w4.form.offsets == ZERO_POINT8:
        if not bool(fields.pop("block_offsets").eq(1 << form.bits - 1).all()):
            return None
        code = form.code
    if code != form.code or (form.offsets is None) != ("block_offsets" not in fields):
        return None
    if w4.form.scales != form.scales and (w4.form.scales not in FLOAT_DTYPES or form.scales != FLOAT16):
        return None
    if w4.form.offsets != form.offsets and form.offsets is not None:
        return None
    if form.has_table and not _has_table(kind, fields["scale_table"], fields["absmax"]):
        return None
    if form.scales == FLOAT16:
        scales = fields["absmax"].to(torch.float16)
        if not torch.equal(scales.float(), fields["absmax"].float()):
            return None
        fields["absmax"] = scales
    repeats = w4.block_size // form.block_size
    for name in ("absmax", "block_offsets"):
        if name in fields and repeats > 1:
            fields[name] = fields[name].repeat_interleave(repeats, -1)
    if form.has_table:
        fields["scale_table"] = TABLES[kind].expand(*w4.shape[:-2], 256)
    return weight_of(form, **fields, shape=w4.shape, dtype=w4.dtype)


def _has_table(kind: str, tables: Tensor, codes: Tensor) -> bool:
    """Whether the scales ``codes`` of a weight have the same values in the table of a type."""
    values = tables.gather(-1, codes.long())
    return torch.equal(values, TABLES[kind][codes.long()]) and bool(values.isfinite().all())


def write(kind: str, w4: Weight4bit) -> bytes:
    """The bytes of a weight that ``read`` returned for this ``kind``; zeros have the code without a sign."""
    layout, bits = _LAYOUTS[kind], form_of(kind).bits
    packed = w4.packed.reshape(-1, bit_planes.packed_width(layout.elements, bits))
    parts = {"header": layout.write(w4), **_parts(layout, packed, bits)}
    data: bytes = torch.cat([parts[name] for name in layout.parts], dim=1).numpy().tobytes()
    return data
