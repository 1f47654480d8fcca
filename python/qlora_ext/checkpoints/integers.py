"""Integer weights (q - z) * scale in groups, with or without zero points z: what pack-quantized, AWQ and GPTQ share.

They are decoded as q * scale - z * scale. For scales of at most 20 significant bits, as all 16-bit ones are, both
products are exact, and the result is (q - z) * scale bit for bit, except that zeros are always positive. Of float32
scales with more bits, which only compressed-tensors may have, the result may differ by 2^-18 of the scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..dtype_names import name_of
from ..form import Form
from ..formats import BLOCK_SIZES
from ..weight import Weight4bit, weight_of
from .format import LOAD_ORIGINAL, Format, Given, Settings, check_repeats, matrix_of

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclasses.dataclass(frozen=True)
class Groups:
    """The groups of a row, the last of which may be shorter, and the blocks into which they are divided.

    A block is as large as all groups permit. Where it is smaller than a group, it has the group's scale.
    """

    columns: int
    size: int
    block_size: int

    @classmethod
    def of(cls, kind: str, settings: Settings, shape: Sequence[int]) -> Groups:
        """The groups of a weight [N, K].

        Raises:
            ValueError: no block divides the groups.
        """
        _, columns = matrix_of(kind, shape)
        size = settings.group_size or columns
        block_sizes = [block for block in BLOCK_SIZES if size % block == 0 and columns % block == 0]
        if not block_sizes:
            raise ValueError(
                f"shape: expected groups and rows of a multiple of {BLOCK_SIZES[0]} elements for {kind}, got groups "
                f"of {size} in rows of {columns}, which are not supported; {LOAD_ORIGINAL}"
            )
        return cls(columns, size, max(block_sizes))

    @property
    def count(self) -> int:
        """Groups per row."""
        return -(-self.columns // self.size)

    def to_blocks(self, groups: Tensor) -> Tensor:
        """One entry per block, in row-major order, of a tensor [N, count]."""
        if self.size == self.block_size:
            return groups.reshape(-1)
        first = torch.arange(0, self.columns, self.block_size, dtype=torch.int64, device=groups.device)
        return groups.index_select(1, first // self.size).reshape(-1)

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """The inverse of ``to_blocks``."""
        rows = blocks.reshape(-1, self.columns // self.block_size)
        if self.size == self.block_size:
            return rows
        first = torch.arange(0, self.columns, self.size, dtype=torch.int64, device=blocks.device)
        return rows.index_select(1, first // self.block_size)

    def in_order(self, device: torch.device) -> Tensor:
        """The group of each column, int64."""
        return torch.arange(self.columns, dtype=torch.int64, device=device) // self.size


def form_of(groups: Groups, scale_dtype: torch.dtype, symmetric: bool) -> Form:
    """int4 without zero points, or uint4 with them."""
    if symmetric:
        return Form("int4", name_of(scale_dtype), groups.block_size)
    return Form("uint4", name_of(scale_dtype), groups.block_size, offsets="zero_point8")


def weight(
    groups: Groups,
    packed: Tensor,
    scale: Tensor,
    zero_points: Tensor | None,
    dtype: torch.dtype,
    column_order: Tensor | None = None,
) -> Weight4bit:
    """The weight with these codes [N, K/2], and scales and uint8 zero points [N, groups]."""
    return weight_of(
        form_of(groups, scale.dtype, zero_points is None),
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
        return form_of(self.groups(settings, shape), settings.scale_dtype, settings.symmetric)

    def check_scales(self, w4: Weight4bit, settings: Settings, retained: Mapping[str, Tensor]) -> None:
        groups, zero_points = self.groups(settings, w4.shape), w4.block_offsets
        check_repeats("absmax", groups.to_blocks(groups.from_blocks(w4.absmax)), w4.absmax)
        if zero_points is not None:
            check_repeats("zero point", groups.to_blocks(groups.from_blocks(zero_points)), zero_points)
            if bool((zero_points > 15).any()):
                raise ValueError(f"expected zero points of at most 15, got {zero_points.max().item()}")


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
        given.refuse(name, f"groups of {groups.size} columns, as the configuration says", "groups of another size")
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


def check_range(given: Given, name: str, scale: Tensor) -> None:
    """Rejects scales of weights with zero points whose products with 16 are infinite in float32."""
    if not bool((scale.float() * 16).isfinite().all()):
        given.refuse(name, "below 2^124 with zero points", "larger values")
