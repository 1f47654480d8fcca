"""Rejects logits from which no token can be chosen."""

from __future__ import annotations

from torch import Tensor

from ..untrusted import UserError


class NotFiniteError(UserError, FloatingPointError):
    """A model computes NaN or infinity."""


def require_finite(ids: Tensor, logits: Tensor) -> Tensor:
    """A logits processor of transformers, which changes nothing.

    Raises:
        NotFiniteError: a row of ``logits`` has NaN or infinity, or no token is possible.
    """
    if not logits.logsumexp(-1).isfinite().all():
        raise NotFiniteError(
            f"the model computes NaN or infinity as the logits after {ids.shape[1]} tokens: its weights or its adapter "
            "are damaged, or too large for its dtype; try float32"
        )
    return logits
