"""The order in which blocks will be needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator


def upcoming(at: int, count: int, backward: bool, training: bool) -> Iterator[int]:
    """All ``count`` blocks in the order of their next use, starting with the current one.

    A forward pass goes from the first to the last block, a backward pass from the last to the first. Either is followed
    by another forward pass.

    Args:
        at: the current block.
        backward: whether a backward pass is running, including recomputation.
        training: whether a forward pass is followed by a backward pass.
    """
    if backward:
        return itertools.chain(range(at, -1, -1), range(at + 1, count))
    others = range(at - 1, -1, -1) if training else range(at)
    return itertools.chain(range(at, count), others)
