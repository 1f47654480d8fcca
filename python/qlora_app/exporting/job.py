"""``Job``: an export that has been checked."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from .calibrated import CalibratedWeights

# A, B and the factor of B · A, which a layer with an adapter adds to its weight.
Factors: TypeAlias = "tuple[Tensor, Tensor, float]"


@dataclasses.dataclass(frozen=True)
class Job:
    """An export that the target can hold.

    Attributes:
        nbytes: the estimated size of the result.
        build: reads and merges the weights, and returns the function that writes the result to a path.
        read_adapter: for a target that is an adapter alone: reads a result, and returns the factors of each layer,
            those of the adapter that was exported and those of the result.
        calibrated: for a target that encodes weights anew: those that ``--calibrate`` encodes, before ``build``.
    """

    nbytes: int
    build: Callable[[], Callable[[pathlib.Path], None]]
    read_adapter: Callable[[pathlib.Path], Mapping[str, tuple[Factors, Factors]]] | None = None
    calibrated: CalibratedWeights | None = None
