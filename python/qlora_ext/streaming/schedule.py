"""Which blocks are needed next, from where a model is in its passes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator


def upcoming(at: int, count: int, backward: bool, training: bool) -> Iterator[int]:
    """All ``count`` blocks in the order in which they are next used, the one in use first.

    A forward pass goes from the first to the last, and a backward pass returns; another forward pass follows either.

    Args:
        at: the block in use.
        backward: whether the pass under way is a backward one; recomputed activations belong to it.
        training: whether a forward pass is followed by a backward one.
    """
    if backward:
        return itertools.chain(range(at, -1, -1), range(at + 1, count))
    behind = range(at - 1, -1, -1) if training else range(at)
    return itertools.chain(range(at, count), behind)
