"""Packed weights on loan: other weights reuse their memory, so a borrower may not keep them.

A loan is a context manager. Until it ends, no other thread can refill the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeAlias

import torch
from torch import Tensor

# packed, absmax, nested_absmax, nested_offset
PackedTensors: TypeAlias = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None"]
Loan: TypeAlias = AbstractContextManager[PackedTensors]
Lender: TypeAlias = Callable[[], Loan]

_LENDER = "_qlora_lender"


def mark_lent(packed: Tensor, lender: Lender) -> None:
    """Notes that ``packed`` is lent, and whom a backward pass has to ask for it again."""
    setattr(packed, _LENDER, lender)


def lender_of(packed: Tensor) -> Lender | None:
    """Whom to ask for ``packed`` again; None where it stays what it is, and may be saved.

    A traced graph takes no lent weight: modules with such run outside of it.
    """
    return None if torch.compiler.is_dynamo_compiling() else getattr(packed, _LENDER, None)
