"""``Job``: an export that has been checked."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Job:
    """An export that the target can hold.

    Attributes:
        nbytes: the estimated size of the result.
        build: reads and merges the weights, and returns the function that writes the result to a path.
    """

    nbytes: int
    build: Callable[[], Callable[[pathlib.Path], None]]
