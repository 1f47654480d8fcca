"""E2M1 codes with a scale of 8 bits per block: what the MXFP4 and NVFP4 formats share."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from ..form import Form
from ..ops import check_shape
from ..weight import Weight4bit, weight_of
from . import nibbles, scales
from .format import Format, Given, Settings, matrix_of

MX_BLOCK_SIZE = 32
NV_BLOCK_SIZE = 16


class Scales(TypedDict):
    """The codes of a weight's scales, in any shape, and their values."""

    codes: Tensor
    table: Tensor


def form_of(kind: str, shape: Sequence[int], block_size: int) -> Form:
    """The form of a matrix, or of a stack of them.

    Raises:
        ValueError: its rows do not hold whole blocks.
    """
    check_shape("shape", shape)
    if len(shape) not in (2, 3) or 0 in shape or shape[-1] % block_size:
        raise ValueError(f"shape: expected rows of a multiple of {block_size} elements for {kind}, got {list(shape)}")
    return Form("e2m1", "table8", block_size)


def weight(form: Form, packed: Tensor, scales: Scales, shape: Sequence[int], dtype: torch.dtype) -> Weight4bit:
    """The weight of that shape with the codes ``packed``, lo first."""
    stack = shape[:-2]
    return weight_of(
        form,
        packed=nibbles.swap(packed).view(*shape[:-1], shape[-1] // 2),
        absmax=scales["codes"].reshape(*stack, -1),
        nested_absmax=None,
        nested_offset=None,
        scale_table=scales["table"].expand(*stack, -1).contiguous(),
        shape=torch.Size(shape),
        dtype=dtype,
    )


def e8m0(given: Given, name: str, codes: Tensor) -> Scales:
    """The scales of MXFP4: 2^(code - 127)."""
    if bool((codes == scales.E8M0_NAN).any()):
        given.refuse(name, "E8M0 codes of numbers", f"0x{scales.E8M0_NAN:02X}, which is NaN")
    return {"codes": codes, "table": scales.e8m0_table(codes.device)}


def e4m3(given: Given, codes: Tensor, factor_name: str, divides: bool) -> Scales:
    """The scales of NVFP4: the float8_e4m3fn ``codes``, divided or multiplied by the weight's factor."""
    factor = given.take_factor(factor_name)
    table = scales.e4m3_table(codes.device)
    table = table / factor if divides else table * factor
    codes = codes.contiguous().view(torch.uint8)
    if scales.has_e4m3_nan(codes):
        given.refuse("weight_scale", "E4M3 codes of numbers", "NaN")
    if not bool(table[: scales.E4M3_NAN].isfinite().all()):
        given.refuse(factor_name, "such that all scales are finite in float32", str(factor.item()))
    return {"codes": codes, "table": table}


def check_table(w4: Weight4bit, expected: Tensor) -> None:
    """Rejects a weight, or a stack of weights, whose scale codes do not stand for the values ``expected``.

    Raises:
        ValueError: the tables differ.
    """
    assert w4.scale_table is not None
    if not torch.equal(w4.scale_table.cpu(), expected.expand_as(w4.scale_table)):
        raise ValueError("expected the table of scales of the checkpoint, got another")


class E2M1Format(Format):
    """A format of matrices [N, K] with the codes uint8 [N, K/2], lo first, and the scales ``weight_scale``.

    Attributes:
        codes: the name of the tensor with the codes.
        scale_dtype: of ``weight_scale`` [N, K / block_size].
    """

    codes: str
    block_size: int
    scale_dtype: torch.dtype

    def form(self, settings: Settings, shape: Sequence[int]) -> Form:
        return form_of(self.name, matrix_of(self.name, shape), self.block_size)

    def read(
        self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype, settings: Settings, where: str
    ) -> Weight4bit:
        form = self.form(settings, shape)
        rows, columns = shape
        given = Given(tensors, self.tensors(settings), self.name, where)
        packed = given.take(self.codes, (rows, columns // 2), torch.uint8)
        stored = given.take("weight_scale", (rows, columns // self.block_size), self.scale_dtype)
        return weight(form, packed, self._scales(given, stored), shape, dtype)

    def check_scales(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> None:
        check_table(w4, self._table(retained))

    def write(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        stored = w4.absmax.reshape(w4.shape[0], -1).view(self.scale_dtype)
        return {self.codes: nibbles.swap(w4.packed), "weight_scale": stored, **retained}

    @abc.abstractmethod
    def _scales(self, given: Given, stored: Tensor) -> Scales: ...

    @abc.abstractmethod
    def _table(self, retained: Mapping[str, Tensor]) -> Tensor:
        """The values of the scales' 256 codes in the checkpoint."""
