"""Integer weights (q - z) * scale in groups, with or without zero points z: what pack-quantized, AWQ and GPTQ share.

They are decoded as q * scale - z * scale. For scales of at most 16 significant bits, as all 16-bit ones are, both
products are exact, and the result is (q - z) * scale bit for bit, except that zeros are always positive. Of float32
scales with more bits, which only compressed-tensors may have, the result may differ by 2^-18 of the scale for codes of
4 bits, and by 2^-14 for codes of 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..dtype_names import name_of
from ..form import Form
from ..weight import Weight4bit, weight_of
from .format import Format, Given, Settings, check_repeats, matrix_of
from .groups import Groups

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def form_of(groups: Groups, scale_dtype: torch.dtype, symmetric: bool, bits: int) -> Form:
    """Signed integers without zero points, or unsigned ones with them."""
    if symmetric:
        return Form(f"int{bits}", name_of(scale_dtype), groups.block_size)
    return Form(f"uint{bits}", name_of(scale_dtype), groups.block_size, offsets="zero_point8")


def weight(
    groups: Groups,
    packed: Tensor,
    scale: Tensor,
    zero_points: Tensor | None,
    dtype: torch.dtype,
    bits: int = 4,
    column_order: Tensor | None = None,
) -> Weight4bit:
    """The weight with these codes [N, K*bits/8], and scales and uint8 zero points of the groups."""
    return weight_of(
        form_of(groups, scale.dtype, zero_points is None, bits),
        packed=packed,
        absmax=groups.to_blocks(scale),
        block_offsets=None if zero_points is None else groups.to_blocks(zero_points),
        column_order=column_order,
        shape=torch.Size((len(packed), groups.columns)),
        dtype=dtype,
    )


class IntegerFormat(Format):
    """What the formats of integers in groups share.

    Attributes:
        rows_together: the number of rows of a weight is a multiple of it.
    """

    rows_together = 1

    def groups(self, settings: Settings, shape: Sequence[int]) -> Groups:
        """The groups of a weight of that shape.

        Raises:
            ValueError: the format has no weights of that shape.
        """
        rows, _ = matrix_of(self.name, shape)
        if rows % self.rows_together:
            raise ValueError(f"shape: expected a multiple of {self.rows_together} rows for {self.name}, got {rows}")
        return Groups.of(self.name, settings, shape)

    def form(self, settings: Settings, shape: Sequence[int]) -> Form:
        return form_of(self.groups(settings, shape), settings.scale_dtype, settings.symmetric, settings.bits)

    def check_scales(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> None:
        groups, zero_points = self.groups(settings, w4.shape), w4.block_offsets
        check_repeats("absmax", groups.to_blocks(groups.from_blocks(w4.absmax)), w4.absmax)
        if zero_points is not None:
            check_repeats("zero point", groups.to_blocks(groups.from_blocks(zero_points)), zero_points)
            most = (1 << settings.bits) - 1
            if bool((zero_points > most).any()):
                raise ValueError(f"expected zero points of at most {most}, got {zero_points.max().item()}")


def column_order(given: Given, name: str, groups: Groups, reorders: bool) -> Tensor | None:
    """The order of the columns, int32, in which those of each group are neighbours; None if they are so already.

    Args:
        name: the tensor with the group of each column.
        reorders: whether there may be such an order. Otherwise it is rejected.
    """
    found = _group_of_column(groups, given.take(name, (groups.columns,), torch.int32, torch.int64))
    in_order = groups.in_order(found.device)
    if torch.equal(found, in_order):
        return None
    order = found.argsort(stable=True)
    if not torch.equal(found[order], in_order):
        given.refuse(name, f"groups of {groups.width} columns, as the configuration says", "groups of another size")
    if not reorders:
        given.refuse(
            name,
            "the groups of the columns in order",
            "an activation order, which the configuration does not mention (desc_act)",
        )
    return order.to(torch.int32)


def check_column_order(groups: Groups, w4: Weight4bit, stored: Tensor | None) -> None:
    """Rejects a weight whose blocks hold columns of several groups.

    Args:
        stored: the group of each column in the checkpoint; None: they are in order.

    Raises:
        ValueError: there is such a block.
    """
    in_order = groups.in_order(w4.device)
    found = in_order if stored is None else _group_of_column(groups, stored.to(w4.device))
    if not torch.equal(found if w4.column_order is None else found[w4.column_order.long()], in_order):
        raise ValueError("expected the columns in the order of the checkpoint's groups, got another order")


def _group_of_column(groups: Groups, stored: Tensor) -> Tensor:
    """The group of each column, int64. compressed-tensors writes -1 where they are in order."""
    return groups.in_order(stored.device) if bool((stored == -1).all()) else stored.long()


def check_range(given: Given, name: str, scale: Tensor, bits: int = 4) -> None:
    """Rejects scales whose products with integers of that many bits are infinite in float32."""
    if not bool((scale.float() * (1 << bits)).isfinite().all()):
        given.refuse(name, f"below 2^{128 - bits} with zero points", "larger values")
