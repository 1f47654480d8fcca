"""Comparisons of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found - expected‖ / ‖expected‖."""
    return ((found - expected).norm() / expected.norm()).item()


def same_bits(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    """Whether the tensors have the same names, dtypes, shapes and bits."""
    return found.keys() == expected.keys() and all(_same(t, expected[name]) for name, t in found.items())


def _same(t: torch.Tensor, other: torch.Tensor) -> bool:
    if t.dtype != other.dtype or t.shape != other.shape:
        return False
    return torch.equal(t.detach().reshape(-1).view(torch.uint8), other.detach().reshape(-1).view(torch.uint8))
