"""Orders of a weight's rows, and weights with their rows in another order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..weight import Weight4bit


def grouped_rows(rows: int, device: torch.device | str = "cpu") -> Tensor:
    """The order that puts alternating rows gate, up, gate, up... in halves, all of gate before all of up."""
    return torch.arange(rows, dtype=torch.int64, device=device).view(-1, 2).t().reshape(-1)


def alternating_rows(rows: int, device: torch.device | str = "cpu") -> Tensor:
    """The inverse of ``grouped_rows``."""
    return torch.arange(rows, dtype=torch.int64, device=device).view(2, -1).t().reshape(-1)


def select_rows(w4: Weight4bit, rows: Tensor) -> Weight4bit:
    """The rows ``rows`` of a matrix [N, K], or of each matrix of a stack, without decoding them.

    Raises:
        ValueError: a scale belongs to several rows.
    """
    *stack, count, columns = w4.shape
    if columns % w4.block_size or w4.nested_absmax is not None:
        raise ValueError(
            f"w4: expected rows with scales of their own, got {w4.form} of shape {list(w4.shape)}; dequantize it first"
        )
    parts: dict[str, Any] = {
        name: t.reshape(*stack, count, -1).index_select(len(stack), rows.to(t.device))
        for name in ("packed", "absmax", "block_offsets")
        if (t := getattr(w4, name)) is not None
    }
    parts |= {name: t.reshape(*stack, -1) for name, t in parts.items() if name != "packed"}
    return w4.replace(**parts, shape=torch.Size((*stack, len(rows), columns)))
