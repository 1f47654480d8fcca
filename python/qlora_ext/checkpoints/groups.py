"""The elements of a matrix that share a scale, and the blocks of its rows that get one each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats import BLOCK_SIZES
from .format import LOAD_ORIGINAL, Settings, matrix_of


@dataclasses.dataclass(frozen=True)
class Groups:
    """Groups of ``height`` rows and ``width`` columns, the last of which may be smaller, and the blocks of a row.

    A block is as large as all groups permit. Where it is smaller than a group, it has the group's scale.

    Attributes:
        stored: the shape of a tensor of scales in the file, which may lack dimensions of 1.
    """

    rows: int
    columns: int
    height: int
    width: int
    block_size: int
    stored: tuple[int, ...]

    @classmethod
    def of(cls, kind: str, settings: Settings, shape: Sequence[int]) -> Groups:
        """The groups of a weight [N, K].

        A weight that has one scale by its configuration may have one per row in the file.

        Raises:
            ValueError: no block divides the groups.
        """
        rows, columns = matrix_of(kind, shape)
        height, width, stored = settings.group_rows or rows, settings.group_size or columns, settings.scale_shape
        if settings.group_rows is None and stored in ((rows,), (rows, 1)):
            height = 1
        block_sizes = [block for block in BLOCK_SIZES if width % block == 0 and columns % block == 0]
        if not block_sizes:
            raise ValueError(
                f"shape: expected groups and rows of a multiple of {BLOCK_SIZES[0]} elements for {kind}, got groups "
                f"of {width} in rows of {columns}, which are not supported; {LOAD_ORIGINAL}"
            )
        groups = -(-rows // height), -(-columns // width)
        is_same = stored is not None and [n for n in stored if n != 1] == [n for n in groups if n != 1]
        return cls(rows, columns, height, width, max(block_sizes), stored if stored is not None and is_same else groups)

    @property
    def shape(self) -> tuple[int, int]:
        """The number of groups along the rows and the columns of the weight."""
        return -(-self.rows // self.height), -(-self.columns // self.width)

    def to_blocks(self, groups: Tensor) -> Tensor:
        """One entry per block, in row-major order, of a tensor of ``shape``."""
        if self.height > 1:
            groups = groups.repeat_interleave(self.height, 0)[: self.rows]
        if self.width != self.block_size:
            first = torch.arange(0, self.columns, self.block_size, dtype=torch.int64, device=groups.device)
            groups = groups.index_select(1, first // self.width)
        return groups.reshape(-1)

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """The inverse of ``to_blocks``."""
        rows = blocks.reshape(self.rows, -1)[:: self.height]
        if self.width == self.block_size:
            return rows
        first = torch.arange(0, self.columns, self.width, dtype=torch.int64, device=blocks.device)
        return rows.index_select(1, first // self.block_size)

    def in_order(self, device: torch.device) -> Tensor:
        """The group of each column, int64."""
        return torch.arange(self.columns, dtype=torch.int64, device=device) // self.width
