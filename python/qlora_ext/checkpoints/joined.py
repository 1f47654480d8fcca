"""Joins matrices that a checkpoint stores separately, as transformers fuses them, and takes them apart again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..weight import Weight4bit
from .format import check_repeats

# Scales of float8_e4m3fn are not negative, so their codes need half of a table.
_HALF = 128
_PER_BLOCK = ("absmax", "block_offsets")


def in_blocks_of(w4: Weight4bit, block_size: int) -> Weight4bit:
    """The same weight in blocks of a size that divides its own: scales are repeated."""
    factor = w4.block_size // block_size
    if factor == 1:
        return w4
    parts: dict[str, Any] = {
        name: t.repeat_interleave(factor, -1) for name in _PER_BLOCK if (t := getattr(w4, name)) is not None
    }
    return w4.replace(**parts, block_size=block_size)


def in_larger_blocks(w4: Weight4bit, block_size: int) -> Weight4bit:
    """The inverse of ``in_blocks_of``.

    Raises:
        ValueError: blocks that would become one have different scales.
    """
    factor = block_size // w4.block_size
    if factor == 1:
        return w4
    found = {name: t for name in _PER_BLOCK if (t := getattr(w4, name)) is not None}
    parts: dict[str, Any] = {name: t[..., ::factor].contiguous() for name, t in found.items()}
    for name, t in found.items():
        check_repeats(name, parts[name].repeat_interleave(factor, -1), t)
    return w4.replace(**parts, block_size=block_size)


def join_rows(matrices: Sequence[Weight4bit], where: str) -> Weight4bit:
    """The rows of matrices of one form, the first matrix's first.

    Two matrices may have different tables of scales, because E4M3 scales use only half of a table: the codes of the
    second one move to the upper half.

    Raises:
        ValueError: the tables of more matrices differ, or a scale is negative; the message begins with ``where``.
    """
    first = matrices[0]
    if len(matrices) == 1:
        return first
    _check_forms(matrices, where)
    parts: dict[str, Any] = {name: torch.cat([m.tensors[name] for m in matrices]) for name in ("packed", "absmax")}
    if first.block_offsets is not None:
        parts["block_offsets"] = torch.cat([m.tensors["block_offsets"] for m in matrices])
    tables = [m.scale_table for m in matrices if m.scale_table is not None]
    if any(not torch.equal(table, tables[0]) for table in tables):
        if len(tables) > 2 or any(bool((m.absmax >= _HALF).any()) for m in matrices):
            raise ValueError(
                f"{where}: expected scales of 0 or more and at most two global scales in the weights that the model "
                "joins, got others, which are not supported"
            )
        parts["scale_table"] = torch.cat([table[:_HALF] for table in tables])
        parts["absmax"] = torch.cat([matrices[0].absmax, matrices[1].absmax + _HALF])
    rows = sum(m.shape[0] for m in matrices)
    return first.replace(**parts, shape=torch.Size((rows, *first.shape[1:])))


def split_rows(w4: Weight4bit, count: int) -> list[Weight4bit]:
    """The ``count`` matrices of equally many rows that ``join_rows`` joined."""
    if count == 1:
        return [w4]
    names = ("packed", *_PER_BLOCK)
    parts: dict[str, Sequence[Tensor]] = {name: t.chunk(count) for name, t in w4.tensors.items() if name in names}
    if _has_two_tables(w4):
        assert w4.scale_table is not None
        parts["absmax"] = [parts["absmax"][0], parts["absmax"][1] - _HALF]
        parts["scale_table"] = [torch.cat([half, -half]) for half in w4.scale_table.chunk(count)]
    shape = torch.Size((w4.shape[0] // count, *w4.shape[1:]))
    return [w4.replace(**{name: chunks[i] for name, chunks in parts.items()}, shape=shape) for i in range(count)]


def _check_forms(matrices: Sequence[Weight4bit], where: str) -> None:
    forms = {str(m.form) for m in matrices}
    if len(forms) > 1:
        raise ValueError(
            f"{where}: expected one form of the weights that the model joins, got {' and '.join(sorted(forms))}"
        )


def _has_two_tables(w4: Weight4bit) -> bool:
    """Whether the upper half of the table is another matrix's, and not the negative values of E4M3."""
    if w4.scale_table is None:
        return False
    upper = w4.scale_table[_HALF:]  # E8M0's begins with 2
    return bool((upper[0] == 0) & (upper > 0).any())


def stacked(matrices: Iterable[tuple[str, Weight4bit]], count: int) -> Weight4bit:
    """The stack [E, N, K] of ``count`` matrices of one form, each of which is needed only until the next one is read.

    Args:
        matrices: each with its place, for messages.

    Raises:
        ValueError: their forms differ; the message begins with the place of the first that does.
    """
    stack: Weight4bit | None = None
    for e, (where, matrix) in enumerate(matrices):
        if stack is None:
            stack = matrix.map(lambda t: t.new_empty((count, *t.shape)), shape=(count, *matrix.shape))
        _check_forms([stack, matrix], where)
        stack.matrix(e).copy_(matrix)
    assert stack is not None
    return stack
