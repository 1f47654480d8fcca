"""Packed weights that are lent: in memory that other weights use in turn, so that nobody may keep them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

# packed, absmax, nested_absmax, nested_offset
PackedTensors: TypeAlias = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None"]
Lender: TypeAlias = Callable[[], PackedTensors]

_LENDER = "_qlora_lender"


def mark_lent(packed: Tensor, lender: Lender) -> None:
    """Notes that ``packed`` is lent, and whom a backward pass has to ask for it again."""
    setattr(packed, _LENDER, lender)


def lender_of(packed: Tensor) -> Lender | None:
    """Whom to ask for ``packed`` again; None where it stays what it is, and may be saved.

    A traced graph takes no lent weight: modules with such run outside of it.
    """
    return None if torch.compiler.is_dynamo_compiling() else getattr(packed, _LENDER, None)
