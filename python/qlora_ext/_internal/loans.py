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


def set_lender(packed: Tensor, lender: Lender) -> None:
    """Records that ``packed`` is on loan from ``lender``, which a backward pass must call to get it again."""
    setattr(packed, _LENDER, lender)


def lender_of(packed: Tensor) -> Lender | None:
    """The lender of ``packed``; None if the tensor is permanent, so that a backward pass may save it.

    While a graph is traced the answer is None, because modules with weights on loan run outside of compiled graphs.
    """
    return None if torch.compiler.is_dynamo_compiling() else getattr(packed, _LENDER, None)
