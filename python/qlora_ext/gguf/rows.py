"""Finds the rows of a file's tensor in the weight that transformers makes of it.

Conversion to GGUF permutes the rows of some weights and splits others, and transformers' tensor processors undo that.
They work on dense values. Applied to row numbers instead, they show which rows of the file's tensor become which rows
of the weight, so that quantized rows can be moved without decoding them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# How a tensor's values become weights of the model, by name.
Process = Callable[[np.ndarray], "dict[str, Tensor]"]

_COLUMNS = 2  # enough to see whether rows keep their columns


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a weight that come from one tensor of the file.

    Attributes:
        numbers: where row i of the file's tensor is in the weight; a slice if these numbers are consecutive.
        stack: the shape of the weight without its last dimension, which is that of the rows.
        transposed: whether the model transposes the weight, or each matrix of the stack.
    """

    numbers: slice | Tensor
    stack: tuple[int, ...]
    transposed: bool

    def of(self, begin: int, end: int) -> slice | Tensor:
        """Where rows ``begin`` to ``end - 1`` of the file's tensor are in the weight."""
        if isinstance(self.numbers, slice):
            return slice(self.numbers.start + begin, self.numbers.start + end)
        return self.numbers[begin:end]


def find_rows(process: Process, shape: tuple[int, ...], columns: int = _COLUMNS) -> dict[str, Rows | None]:
    """What ``process`` makes of a matrix, or a stack of matrices, of that shape.

    Args:
        columns: the number of columns with which ``process`` is tried. If it rejects them, it is tried with all.

    Returns:
        For each weight, the rows in it; None if ``process`` does not just move rows.
    """
    *stack, width = shape
    columns = min(columns, width)
    count = int(np.prod(stack))
    numbers = np.arange(1, count * columns + 1, dtype=np.int64).reshape(*stack, columns)
    try:
        found = process(numbers)
    except (ValueError, IndexError):  # it reshapes to sizes of its own
        if columns == width:
            raise
        return find_rows(process, shape, width)
    return {name: _rows(values, count, columns) for name, values in found.items()}


def _rows(values: Tensor, count: int, columns: int) -> Rows | None:
    candidates = [(False, values)] + ([(True, values.transpose(-1, -2))] if values.ndim > 1 else [])
    for transposed, candidate in candidates:
        if candidate.shape[-1] != columns or candidate.dtype != torch.int64:
            continue
        # Row i of the file's tensor is i * columns + 1, i * columns + 2, ...; rows of other tensors are 0.
        rows = candidate.reshape(-1, columns)
        here = rows[:, 0] > 0
        expected = rows[:, :1] + torch.arange(columns, dtype=torch.int64, device="cpu")
        places = here.nonzero().squeeze(1)
        source, rest = (rows[here, 0] - 1) // columns, (rows[here, 0] - 1) % columns
        if not torch.equal(rows[here], expected[here]) or rows[~here].any() or rest.any() or len(places) != count:
            continue
        order = source.argsort()
        if not torch.equal(source[order], torch.arange(count, dtype=torch.int64, device="cpu")):
            continue
        return Rows(_as_slice(places[order]), tuple(candidate.shape[:-1]), transposed)
    return None


def _as_slice(numbers: Tensor) -> slice | Tensor:
    first, count = int(numbers[0]), len(numbers)
    consecutive = torch.arange(first, first + count, dtype=torch.int64, device="cpu")
    return slice(first, first + count) if torch.equal(numbers, consecutive) else numbers
