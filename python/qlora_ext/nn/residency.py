"""``Residency``: where the packed weights of a module are that is not on the computing device."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from .._internal.shared_buffers import Loan, PackedTensors


class Residency(Protocol):
    """Provides the packed weights of modules whose parameters are not on the computing device; see ``streaming``.

    The arguments ``module`` are of the class ``Packed4bit``.
    """

    @property
    def device(self) -> torch.device:
        """The device that computes."""

    def lend(self, module: Any, weight: str) -> Loan:
        """The packed tensors of a weight on ``device``, valid until the loan ends."""

    def read(self, module: Any, weight: str) -> PackedTensors:
        """Permanent copies of the packed tensors of a weight."""

    def read_experts(self, module: Any, weight: str, experts: list[int]) -> PackedTensors:
        """Permanent copies for some matrices of a stack, stacked in that order."""

    def check(self) -> None:
        """Raises an error if the parameters can no longer be read."""
