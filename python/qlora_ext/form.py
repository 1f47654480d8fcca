"""``Form``: how a 4-bit weight is stored."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypedDict

from . import formats

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FormKeywords(TypedDict, total=False):
    """The keywords by which public functions take a ``Form``; an omitted one has the form's default."""

    block_size: int
    double_quant: bool
    nested_block_size: int
    code: str


@dataclasses.dataclass(frozen=True)
class Form:
    """How a 4-bit weight is stored, checked on construction.

    Attributes:
        code: the name of the 16 values, one of ``formats.CODES``.
        scales: the name of the scale form, one of ``formats.SCALE_FORMS``.
        block_size: elements per scale: a power of two from 16 to 4096.
        nested_block_size: scales per nested scale: from 1 to 2^20.

    Raises:
        ValueError: an attribute is none of these.
    """

    code: str = formats.NF4
    scales: str = formats.NESTED8
    block_size: int = 64
    nested_block_size: int = 256

    def __post_init__(self) -> None:
        formats.check_block_sizes(self.block_size, self.nested_block_size)
        formats.check_code(self.code)
        formats.check_scales(self.scales)

    @classmethod
    def of(cls, **keywords: Unpack[FormKeywords]) -> Form:
        """The form that the keywords of a public function describe."""
        fields: dict[str, Any] = {**keywords}
        double_quant = fields.pop("double_quant", True)
        return cls(scales=formats.NESTED8 if double_quant else formats.FLOAT32, **fields)

    @property
    def keywords(self) -> FormKeywords:
        """The keywords from which ``of`` makes this form."""
        return {
            "block_size": self.block_size,
            "double_quant": self.double_quant,
            "nested_block_size": self.nested_block_size,
            "code": self.code,
        }

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored as 8-bit codes with nested scales of their own."""
        return self.scales == formats.NESTED8
