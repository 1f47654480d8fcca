"""Packed weights in buffers that other weights reuse: they are on loan, and a borrower may not keep them.

A loan is a context manager. Until it ends, no other thread can refill the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


class PackedTensors(NamedTuple):
    """The tensors of a 4-bit weight, by the names of the attributes of ``Weight4bit``, which explains them."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None
    scale_table: Tensor | None = None
    block_offsets: Tensor | None = None
    offset_scale: Tensor | None = None
    column_order: Tensor | None = None


Loan: TypeAlias = AbstractContextManager[PackedTensors]
Owner: TypeAlias = Callable[[], Loan]

_OWNER = "_qlora_owner"


def set_owner(packed: Tensor, owner: Owner) -> None:
    """Records that ``packed`` is on loan from ``owner``, which a backward pass must call to get it again."""
    setattr(packed, _OWNER, owner)


def owner_of(packed: Tensor) -> Owner | None:
    """The owner of ``packed``; None if the tensor is permanent, so that a backward pass may save it.

    While a graph is traced the answer is None, because modules with weights on loan run outside of compiled graphs.
    """
    return None if torch.compiler.is_dynamo_compiling() else getattr(packed, _OWNER, None)
