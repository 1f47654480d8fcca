"""The 4-bit types of GGUF files that are used as they are: their blocks become a ``Weight4bit``, and back, losslessly.

A file stores a weight as a sequence of blocks along its rows. Each block is a header with scales, then the codes:

    type     elements  header                              codes           scales per block of   value
    Q4_0           32  f16 d                               u8[16]          32                    d (c - 8)
    IQ4_NL         32  f16 d                               u8[16]          32                    d IQ4_NL[c]
    Q4_1           32  f16 d, f16 m                        u8[16]          32                    d c + m
    MXFP4          32  u8 e                                u8[16]          32                    2^(e - 127) E2M1[c]
    NVFP4          64  u8[4] s                             u8[4][8]        16                    E4M3[s] E2M1[c]
    Q4_K          256  f16 d, f16 dmin, u8[12] of 6 bits   u8[4][32]       32                    d s c - dmin m

The low nibbles of a group of codes (in brackets: the last dimension) are the first half of the group's elements, and
the high nibbles are the second half. We store consecutive elements in one byte instead.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._internal import scale_tables
from ..form import FLOAT_DTYPES, PRESETS, Form
from ..formats import FLOAT16, NESTED8, TABLE8, ZERO_POINT8
from ..untrusted import FileError
from ..weight import Weight4bit, weight_of
from .file import TensorInfo

_Fields = dict[str, Any]  # of a Weight4bit
_CHUNK = 1 << 18  # bytes that are repacked at a time


class _NotFiniteError(ValueError):
    """A scale is NaN or infinity: what was ``found``, and in which ``block``."""

    def __init__(self, found: str, block: int) -> None:
        super().__init__(found)
        self.found, self.block = found, block


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The layout of a type's blocks.

    Attributes:
        elements: per block of the file.
        header: bytes before the codes.
        group: bytes whose low nibbles precede their high nibbles.
        read: the headers [blocks, header], to the fields of a ``Weight4bit``. It raises a _NotFiniteError.
        write: the inverse of ``read``.
    """

    elements: int
    header: int
    group: int
    read: Callable[[Tensor], _Fields]
    write: Callable[[Weight4bit], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes per block of the file."""
        return self.header + self.elements // 2


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


def _repacked(codes: Tensor, group: int, repack: Callable[[Tensor], Tensor]) -> Tensor:
    """``codes`` [rows, bytes], with ``repack`` applied to its groups, a few rows at a time that stay in the cache."""
    out = torch.empty(codes.shape, dtype=torch.uint8, device="cpu")
    step = max(1, _CHUNK // codes.shape[1])
    for source, target in zip(codes.split(step), out.split(step), strict=True):
        target.copy_(repack(source.reshape(-1, group)).view(target.shape))
    return out


def _drop_signs_of_zeros(packed: Tensor) -> None:
    """Replaces E2M1's code of -0, which is 8, by that of 0, in place."""
    for part in packed.view(-1).split(_CHUNK):
        for nibble, negative in ((0x0F, 0x08), (0xF0, 0x80)):
            part &= ~(((part & nibble) == negative).to(torch.uint8) * nibble)


def _float16(header: Tensor, name: str) -> Tensor:
    """Two bytes of each header as a float16.

    Raises:
        _NotFiniteError: a value is NaN or infinity.
    """
    values = header.contiguous().view(torch.float16).reshape(-1)
    if not values.isfinite().all():
        at = int((~values.isfinite()).nonzero()[0])
        raise _NotFiniteError(f"{name} = {values[at].item()}", at)
    return values


def _bytes_of(values: Tensor) -> Tensor:
    """The bytes of one float16 per block."""
    return values.reshape(-1, 1).to(torch.float16).view(torch.uint8)


def _read_scale(header: Tensor) -> _Fields:
    return {"absmax": _float16(header, "d")}


def _write_scale(w4: Weight4bit) -> Tensor:
    return _bytes_of(w4.absmax)


def _read_affine(header: Tensor) -> _Fields:
    return {"absmax": _float16(header[:, :2], "d"), "block_offsets": _float16(header[:, 2:], "m")}


def _write_affine(w4: Weight4bit) -> Tensor:
    return torch.cat((_bytes_of(w4.absmax), _bytes_of(w4.tensors["block_offsets"])), dim=1)


def _read_e8m0(header: Tensor) -> _Fields:
    exponents = header.reshape(-1)
    if (exponents == scale_tables.E8M0_NAN).any():
        at = int((exponents == scale_tables.E8M0_NAN).nonzero()[0])
        raise _NotFiniteError("0xFF (NaN)", at)
    return {"absmax": exponents.contiguous(), "scale_table": _E8M0}


def _write_e8m0(w4: Weight4bit) -> Tensor:
    return w4.absmax.reshape(-1, 1)


def _read_e4m3(header: Tensor) -> _Fields:
    return {"absmax": header.reshape(-1), "scale_table": _UE4M3}


def _write_e4m3(w4: Weight4bit) -> Tensor:
    return w4.absmax.reshape(-1, 4)


def _read_nested(header: Tensor) -> _Fields:
    # Eight scales and eight mins of 6 bits are in twelve bytes. The first four bytes hold scales 0 to 3 and, in their
    # upper two bits, those of scales 4 to 7; the next four hold the mins likewise; the last four hold the lower four
    # bits of scales 4 to 7 (low nibble) and of mins 4 to 7 (high nibble).
    lower, mins, rest = header[:, 4:].reshape(-1, 3, 4).unbind(1)
    upper = (rest & 0x0F) | ((lower >> 2) & 0x30)
    upper_mins = (rest >> 4) | ((mins >> 2) & 0x30)
    return {
        "absmax": torch.cat((lower & 0x3F, upper), dim=1).reshape(-1),
        "nested_absmax": _float16(header[:, :2], "d").float(),
        "scale_table": _INTEGERS,
        "block_offsets": torch.cat((mins & 0x3F, upper_mins), dim=1).reshape(-1),
        "offset_scale": _float16(header[:, 2:4], "dmin").float(),
    }


def _write_nested(w4: Weight4bit) -> Tensor:
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


def _ue4m3_table() -> Tensor:
    """The values of ggml's unsigned E4M3, which ignores the sign, and whose code 0x7F, NaN elsewhere, is zero."""
    table = scale_tables.e4m3_table().abs()
    table[0x7F], table[0xFF] = 0.0, 480.0
    return table


_E8M0 = scale_tables.e8m0_table()
_UE4M3 = _ue4m3_table()
_TABLES = {"MXFP4": _E8M0, "NVFP4": _UE4M3}
_INTEGERS = torch.arange(256, dtype=torch.float32, device="cpu")

_LAYOUTS = {
    "Q4_0": _Layout(32, 2, 16, _read_scale, _write_scale),
    "Q4_1": _Layout(32, 4, 16, _read_affine, _write_affine),
    "IQ4_NL": _Layout(32, 2, 16, _read_scale, _write_scale),
    "MXFP4": _Layout(32, 1, 16, _read_e8m0, _write_e8m0),
    "NVFP4": _Layout(64, 4, 8, _read_e4m3, _write_e4m3),
    "Q4_K": _Layout(256, 16, 32, _read_nested, _write_nested),
}
# The names of the types.
KINDS = tuple(_LAYOUTS)


def is_4bit(tensor: TensorInfo) -> bool:
    """Whether a tensor of a file is a matrix, or a stack of matrices, of one of these types."""
    return len(tensor.shape) > 1 and tensor.type_name in _LAYOUTS


def form_of(kind: str) -> Form:
    """The form of the weights of a type."""
    return PRESETS[kind.lower()]


def read(kind: str, data: Any, shape: Sequence[int], where: str, row: int = 0) -> Weight4bit:
    """The 4-bit weight that a tensor of a GGUF file is.

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
    header, codes = blocks.split((layout.header, layout.elements // 2), dim=1)
    try:
        fields = layout.read(header)
    except _NotFiniteError as error:
        block = row * (width // layout.elements) + error.block
        raise FileError(f"{where}: expected finite scales, got {error.found} in block {block}") from error
    packed = _from_halves(codes, layout.group)
    if form.code == "e2m1":
        _drop_signs_of_zeros(packed)
    stack = leading[:-1]
    tensors: _Fields = {name: t.reshape(*stack, -1) for name, t in fields.items() if name != "scale_table"}
    if "scale_table" in fields:
        tensors["scale_table"] = fields["scale_table"].expand(*stack, 256).clone()
    return weight_of(
        form,
        **tensors,
        packed=packed.reshape(*leading, width // 2),
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
    if (code, form.code) == ("uint4", "int4") and w4.form.offsets == ZERO_POINT8:
        if not bool(fields.pop("block_offsets").eq(8).all()):
            return None
        code = form.code
    if code != form.code or (form.offsets is None) != ("block_offsets" not in fields):
        return None
    if w4.form.scales != form.scales and (w4.form.scales not in FLOAT_DTYPES or form.scales != FLOAT16):
        return None
    if w4.form.offsets != form.offsets and form.offsets is not None:
        return None
    if form.scales == TABLE8 and not _has_table(kind, fields["scale_table"], fields["absmax"]):
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
    if form.scales == TABLE8:
        fields["scale_table"] = _TABLES[kind].expand(*w4.shape[:-2], 256)
    return weight_of(form, **fields, shape=w4.shape, dtype=w4.dtype)


def _has_table(kind: str, tables: Tensor, codes: Tensor) -> bool:
    """Whether the scales ``codes`` of a weight have the same values in the table of a type."""
    values = tables.gather(-1, codes.long())
    return torch.equal(values, _TABLES[kind][codes.long()]) and bool(values.isfinite().all())


def write(kind: str, w4: Weight4bit) -> bytes:
    """The bytes of a weight that ``read`` returned for this ``kind``; zeros have the code without a sign."""
    layout = _LAYOUTS[kind]
    codes = _to_halves(w4.packed.reshape(-1, layout.elements // 2), layout.group)
    data: bytes = torch.cat((layout.write(w4), codes), dim=1).numpy().tobytes()
    return data
