"""``Form``: how a packed weight is stored."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from . import formats
from ._internal import bit_planes
from .ops import packed_shape

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FormKeywords(TypedDict, total=False):
    """The keywords by which public functions take a ``Form``; an omitted one has the form's default.

    ``code`` is a name or 16 values. ``scales`` goes before ``double_quant``, which chooses between two forms only.
    """

    block_size: int
    double_quant: bool
    nested_block_size: int
    code: str | Sequence[float] | Tensor
    scales: str | None
    offsets: str | None
    reordered: bool


class TensorSpec(NamedTuple):
    """The shape and dtype of a tensor of a packed weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype


# The dtypes of the scale and offset forms that are stored as floating-point numbers.
FLOAT_DTYPES = {
    formats.FLOAT32: torch.float32,
    formats.FLOAT16: torch.float16,
    formats.BFLOAT16: torch.bfloat16,
}


@dataclasses.dataclass(frozen=True)
class Form:
    """How a packed weight is stored, checked on construction.

    ``tensors`` says which tensors a form has; ``Weight4bit`` says what they mean.

    Attributes:
        code: the name of the values: one of ``formats.CODES`` (16 values), ``formats.WIDE_CODES`` (of 5, 6 or 8 bits),
            or from ``formats.code_name``.
        scales: the name of the scale form, one of ``formats.SCALE_FORMS``.
        block_size: elements per scale: a power of two from 16 to 4096.
        nested_block_size: scales per nested scale: from 1 to 2^20.
        offsets: the name of the form of the offsets, one of ``formats.OFFSET_FORMS``; None if there are none.
        reordered: whether a matrix stores its columns in an order of its own, as GPTQ's activation order does.

    Raises:
        ValueError: an attribute is none of these.

    Example:
        >>> form = qlora_ext.Form("int4", "bfloat16", block_size=128)
        >>> w4 = qlora_ext.quantize(torch.randn(48, 256), form)
        >>> w4.form == form, w4.bits_per_param
        (True, 4.125)
    """

    code: str = formats.NF4
    scales: str = formats.NESTED8
    block_size: int = 64
    nested_block_size: int = 256
    offsets: str | None = None
    reordered: bool = False

    def __post_init__(self) -> None:
        formats.check_block_sizes(self.block_size, self.nested_block_size)
        formats.check_code(self.code)
        formats.check_scales(self.scales)
        formats.check_offsets(self.offsets)

    @property
    def bits(self) -> int:
        """The bits of a code: 4, 5, 6 or 8."""
        return formats.bits_of(self.code)

    @property
    def row_unit(self) -> int:
        """The rows of a weight have a multiple of that many elements: with more than 4 bits, whole blocks and units."""
        return 1 if self.bits == 4 else max(self.block_size, bit_planes.UNIT if bit_planes.has_units(self.bits) else 1)

    def check_rows(self, name: str, shape: Sequence[int]) -> None:
        """Raises a ValueError that begins with ``name`` if the rows of ``shape`` are no multiple of ``row_unit``."""
        if self.row_unit > 1 and (not shape or shape[-1] % self.row_unit):
            raise ValueError(
                f"{name}: expected rows of a multiple of {self.row_unit} elements for {self}, got {[*shape]}"
            )

    @classmethod
    def of(cls, **keywords: Unpack[FormKeywords]) -> Form:
        """The form that the keywords of a public function describe."""
        fields: dict[str, Any] = {**keywords}
        double_quant, scales = fields.pop("double_quant", True), fields.pop("scales", None)
        if not isinstance(fields.get("code", ""), str):
            fields["code"] = formats.code_name(fields["code"])
        return cls(scales=scales or (formats.NESTED8 if double_quant else formats.FLOAT32), **fields)

    @property
    def keywords(self) -> FormKeywords:
        """The keywords from which ``of`` makes this form."""
        keywords: FormKeywords = {
            "block_size": self.block_size,
            "nested_block_size": self.nested_block_size,
            "code": self.code,
        }
        if self.scales in (formats.FLOAT32, formats.NESTED8):
            keywords["double_quant"] = self.double_quant
        else:
            keywords["scales"] = self.scales
        if self.offsets is not None:
            keywords["offsets"] = self.offsets
        if self.reordered:
            keywords["reordered"] = True
        return keywords

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored as 8-bit codes with nested scales and a mean."""
        return self.scales == formats.NESTED8

    @property
    def has_table(self) -> bool:
        """Whether the scales are stored as codes of a table."""
        return self.scales in (formats.TABLE8, formats.NESTED_TABLE8)

    @property
    def has_more_tensors(self) -> bool:
        """Whether a weight has more tensors than its codes, ``absmax``, ``nested_absmax`` and ``nested_offset``."""
        return self.has_table or self.offsets is not None or self.reordered

    def tensors(self, shape: Sequence[int], stack: Sequence[int] = ()) -> dict[str, TensorSpec]:
        """The tensors of a weight of that shape, by their names in ``Weight4bit``.

        Args:
            shape: of a weight that is quantized as one tensor.
            stack: the number of such weights, as leading dimensions.

        Raises:
            ValueError: the rows are no multiple of ``row_unit``; or there is a stack, and the form is reordered.

        Example:
            >>> from qlora_ext.form import Form
            >>> Form(code="e2m1", scales="table8", block_size=32).tensors((48, 64))["absmax"]
            TensorSpec(shape=(96,), dtype=torch.uint8)
        """
        self.check_rows("shape", (*stack, *shape))
        blocks = -(-math.prod(shape) // self.block_size)
        nested = (-(-blocks // self.nested_block_size),)
        found = {"packed": TensorSpec(packed_shape((*shape,), self.bits), torch.uint8)}
        found["absmax"] = TensorSpec((blocks,), FLOAT_DTYPES.get(self.scales, torch.uint8))
        if self.scales in (formats.NESTED8, formats.NESTED_TABLE8):
            found["nested_absmax"] = TensorSpec(nested, torch.float32)
        if self.double_quant:
            found["nested_offset"] = TensorSpec((), torch.float32)
        if self.has_table:
            found["scale_table"] = TensorSpec((256,), torch.float32)
        if self.offsets is not None:
            found["block_offsets"] = TensorSpec((blocks,), FLOAT_DTYPES.get(self.offsets, torch.uint8))
        if self.offsets == formats.SCALED8:
            found["offset_scale"] = TensorSpec(nested, torch.float32)
        if self.reordered:
            if stack:
                raise ValueError(f"form: expected columns in order in a stack of {stack[0]} matrices, got {self}")
            found["column_order"] = TensorSpec((shape[-1],), torch.int32)
        return {name: TensorSpec((*stack, *spec.shape), spec.dtype) for name, spec in found.items()}

    @classmethod
    def named(cls, name: str) -> Form:
        """The form of that name, one of ``PRESETS``.

        Raises:
            ValueError: there is no such form.
        """
        if name not in PRESETS:
            raise ValueError(f"form: expected {', '.join(PRESETS)} or a Form, got {reprlib.repr(name)}")
        return PRESETS[name]

    def __str__(self) -> str:
        """The keywords that describe the form, without those that say nothing about it."""
        nested = self.scales == formats.NESTED_TABLE8 or self.offsets == formats.SCALED8
        shown: dict[str, Any] = {} if self.code == formats.NF4 else {"code": self.code}
        shown |= {key: value for key, value in self.keywords.items() if key not in ("code", "nested_block_size")}
        shown |= {"nested_block_size": self.nested_block_size} if nested else {}
        return ", ".join(f"{key}={value}" for key, value in shown.items())


PRESETS: dict[str, Form] = {
    "nf4": Form(),
    "fp4": Form("fp4"),
    "mxfp4": Form("e2m1", formats.TABLE8, 32),
    "nvfp4": Form("e2m1", formats.TABLE8, 16),
    "int4": Form("int4", formats.BFLOAT16, 32),
    "q4_0": Form("int4", formats.FLOAT16, 32),
    "q4_1": Form("uint4", formats.FLOAT16, 32, offsets=formats.FLOAT16),
    "q4_k": Form("uint4", formats.NESTED_TABLE8, 32, 8, formats.SCALED8),
    "iq4_nl": Form("iq4_nl", formats.FLOAT16, 32),
    "iq4_xs": Form("iq4_nl", formats.NESTED_TABLE8, 32, 8),
    "q5_0": Form("int5", formats.FLOAT16, 32),
    "q5_1": Form("uint5", formats.FLOAT16, 32, offsets=formats.FLOAT16),
    "q5_k": Form("uint5", formats.NESTED_TABLE8, 32, 8, formats.SCALED8),
    "q6_k": Form("int6", formats.NESTED_TABLE8, 16, 16),
    "q8_0": Form("int8", formats.FLOAT16, 32),
    "int8": Form("int8", formats.BFLOAT16, 128),
    "fp8": Form("e4m3", formats.FLOAT32, 128),
}
