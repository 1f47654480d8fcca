"""E2M1 codes with a scale of 8 bits per block: what the MXFP4 and NVFP4 formats share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .._internal import scale_tables
from ..form import Form
from ..ops import check_shape
from ..weight import Weight4bit, weight_of
from . import nibbles
from .format import Format, Given, Settings, matrix_of

MX_BLOCK_SIZE = 32
NV_BLOCK_SIZE = 16


class E2M1Format(Format):
    """A format of matrices [N, K] with the codes uint8 [N, K/2], lo first, and scales [N, K / block_size].

    The scales are E8M0, 2^(code - 127); or E4M3, and multiplied or divided by a factor of the weight.

    Attributes:
        codes, scales: the names of these tensors.
        codes_dtype, scale_dtype: their dtypes, of one byte.
        factor: the name of the tensor with the factor of E4M3 scales; None: the scales are E8M0.
        divides: whether the scales are divided by it.
    """

    scales = "weight_scale"
    codes_dtype = torch.uint8
    scale_dtype = torch.uint8
    block_size: int
    factor: str | None = None
    divides = False

    def tensors(self, settings: Settings) -> dict[str, bool]:
        names = {self.codes: True, self.scales: True, **dict.fromkeys(self.retained, False)}
        return names if self.factor is None else names | {self.factor: True}

    def form(self, settings: Settings, shape: Sequence[int]) -> Form:
        if not self.has_stacks:
            matrix_of(self.name, shape)
        check_shape("shape", shape)
        if len(shape) not in (2, 3) or 0 in shape or shape[-1] % self.block_size:
            expected = f"rows of a multiple of {self.block_size} elements for {self.name}"
            raise ValueError(f"shape: expected {expected}, got {list(shape)}")
        return Form("e2m1", "table8", self.block_size)

    def read(
        self, tensors: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype, settings: Settings, where: str
    ) -> Weight4bit:
        form = self.form(settings, shape)
        given = Given(tensors, self.tensors(settings), self.name, where)
        packed = given.take(self.codes, self._codes_shape(shape), self.codes_dtype)
        stored = given.take(self.scales, (*shape[:-1], shape[-1] // self.block_size), self.scale_dtype)
        table = self._checked_table(given, stored)
        return weight_of(
            form,
            packed=nibbles.swap(packed.view(torch.uint8)).view(*shape[:-1], shape[-1] // 2),
            absmax=stored.contiguous().view(torch.uint8).reshape(*shape[:-2], -1),
            scale_table=table.expand(*shape[:-2], -1).contiguous(),
            shape=torch.Size(shape),
            dtype=dtype,
        )

    def check_scales(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> None:
        assert w4.scale_table is not None
        expected = self._table(None if self.factor is None else retained[self.factor], "cpu")
        if not torch.equal(w4.scale_table.cpu(), expected.expand_as(w4.scale_table)):
            raise ValueError("expected the table of scales of the checkpoint, got another")

    def write(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        codes = nibbles.swap(w4.packed).view(self.codes_dtype).view(self._codes_shape(w4.shape))
        return {
            self.codes: codes,
            self.scales: w4.absmax.reshape(*w4.shape[:-1], -1).view(self.scale_dtype),
            **retained,
        }

    def _codes_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the codes of a weight of that shape."""
        return (*shape[:-1], shape[-1] // 2)

    def _table(self, factor: Tensor | None, device: torch.device | str) -> Tensor:
        """The values of the scales' 256 codes."""
        if factor is None:
            return scale_tables.e8m0_table(device)
        table, factor = scale_tables.e4m3_table(device), factor.reshape(())
        return table / factor if self.divides else table * factor

    def _checked_table(self, given: Given, stored: Tensor) -> Tensor:
        """The table of the scales ``stored``, which are numbers."""
        if self.factor is None:
            if bool((stored.view(torch.uint8) == scale_tables.E8M0_NAN).any()):
                given.refuse(self.scales, "E8M0 codes of numbers", f"0x{scale_tables.E8M0_NAN:02X}, which is NaN")
            return self._table(None, stored.device)
        factor = given.take_factor(self.factor)
        table = self._table(factor, stored.device)
        if scale_tables.has_e4m3_nan(stored.contiguous().view(torch.uint8)):
            given.refuse(self.scales, "E4M3 codes of numbers", "NaN")
        if not bool(table[: scale_tables.E4M3_NAN].isfinite().all()):
            given.refuse(self.factor, "such that all scales are finite in float32", str(factor.item()))
        return table
