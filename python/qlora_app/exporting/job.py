"""``Job``: an export that has been checked."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from qlora_ext.calibration import Calibration

    from ..models.adapted import Adapted

# A, B and the factor of B · A, which a layer with an adapter adds to its weight.
Factors: TypeAlias = "tuple[Tensor, Tensor, float]"


@dataclasses.dataclass(frozen=True)
class Job:
    """An export that the target can hold.

    Attributes:
        nbytes: the estimated size of the result.
        build: reads and merges the weights, which it encodes with a calibration if it gets one, and returns the
            function that writes the result to a path.
        read_adapter: for a target that is an adapter alone: reads a result, and returns the factors of each layer,
            those of the adapter that was exported and those of the result.
        calibrates: the model, if the target encodes weights anew; ``build`` then takes a calibration.
    """

    nbytes: int
    build: Callable[[Calibration | None], Callable[[pathlib.Path], None]]
    read_adapter: Callable[[pathlib.Path], Mapping[str, tuple[Factors, Factors]]] | None = None
    calibrates: Adapted | None = None
