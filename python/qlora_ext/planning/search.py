"""The changes with which a run fits into some memory, its longest context, and the largest model that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from . import families
from .blocks import Streamed, place, streamed
from .memory import Job, split, still, tops

# From what costs nothing to what costs time, each with those before it: the fields of Job that are changed.
_CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"chunked_loss": True},
    {"grad_checkpointing": True},
    {"offload_checkpoints": True},
    {"stream": "ram"},
    {"mlp_chunk": 1024},
)
# On the CPU, checkpoints are in the host's memory anyway, and so are weights "in RAM".
_HOST_CHANGES = tuple(
    {"stream": "disk"} if "stream" in change else change for change in _CHANGES if "offload_checkpoints" not in change
)


def changes_of(job: Job) -> tuple[dict[str, Any], ...]:
    """The changes that can save memory on the job's device, from what costs nothing to what costs time."""
    return _HOST_CHANGES if job.host else _CHANGES


@dataclasses.dataclass(frozen=True)
class Switched:
    """A job with some of its fields changed.

    Attributes:
        changes: the changed fields, by their names.
        job: with the changes.
        blocks: the blocks of its layers, where these are streamed.
    """

    changes: dict[str, Any]
    job: Job
    blocks: Streamed | None


def switched(job: Job, changes: Sequence[dict[str, Any]]) -> Switched:
    """``job`` with all of the changes."""
    merged = {name: value for change in changes for name, value in change.items()}
    changed = dataclasses.replace(job, **merged)
    return Switched(merged, changed, streamed(changed) if changed.stream != "none" else None)


_LONGEST = 2**20
# Tokens per row at which memory is measured. From the first on, whatever works in chunks of tokens has several.
_MEASURED = ((2048, 4096, 8192), (128, 256, 512))


def total(job: Job, blocks: Streamed | None) -> float:
    """Bytes on the device at the highest point of a step."""
    return max(_heights(job, blocks))


def _heights(job: Job, blocks: Streamed | None) -> list[float]:
    """The bytes on the device at each of the two tops of a step."""
    return [_placed(split(job, [top]), blocks) for top in tops(job)]


def _placed(parts: dict[str, float], blocks: Streamed | None) -> float:
    return sum((parts if blocks is None else place(parts, blocks, None)[0]).values())


def longest_context(job: Job, blocks: Streamed | None, memory: float) -> int:
    """The most tokens per row with which the job fits into ``memory`` bytes; 0 where no row does.

    Each top is a polynomial of the tokens: activations grow with them, the masks of attention with their square. Three
    sizes give its coefficients.

    Args:
        blocks: ``streamed(job)``, where its layers are streamed; else None.

    Example:
        >>> planning = qlora_ext.planning
        >>> config = planning.families.config_of_sizes("hidden=64,intermediate=128,layers=2,heads=4,vocab=512")
        >>> planning.longest_context(planning.Job(config), None, 1e9) > 10_000
        True
    """
    found = 0
    for sizes in _MEASURED:
        heights = zip(*(_heights(dataclasses.replace(job, seq_len=n), blocks) for n in sizes), strict=True)
        found = min(_largest_below(sizes, top, memory) for top in heights)
        if found >= sizes[0]:
            break
    return found // 64 * 64 or found


def _largest_below(sizes: Sequence[int], values: Sequence[float], limit: float) -> int:
    """The largest number up to which the polynomial through the points is at most ``limit``; 0 where none is."""
    import numpy as np

    polynomial = np.polynomial.Polynomial.fit(sizes, values, len(sizes) - 1)
    beyond = [root.real for root in (polynomial - limit).roots() if abs(root.imag) < 1e-6 and root.real > 0]
    if polynomial(0) > limit:
        return 0
    return int(min([*beyond, _LONGEST]))


def choose(job: Job, memory: float, changes: Sequence[dict[str, Any]] | None = None) -> tuple[Switched, float] | None:
    """The first changes, in the order of what they cost, with which ``job`` fits, and the bytes that it then takes.

    With every change it takes as much as without, or less: the first that fits is found by bisection.

    Args:
        memory: bytes on the device, or of the process where the job runs on the CPU.
        changes: fields of ``Job`` to change, each with those before it; by default those of the job's device.

    Returns:
        None where the job does not fit with all of the changes.

    Example:
        >>> planning = qlora_ext.planning
        >>> config = planning.families.config_of_sizes("hidden=64,intermediate=128,layers=2,heads=4,vocab=4096")
        >>> job = planning.Job(config, seq_len=512)
        >>> found, size = planning.choose(job, 30e6)
        >>> found.changes, size < 30e6
        ({'chunked_loss': True}, True)
    """
    changes = changes_of(job) if changes is None else changes
    fitting = None
    fewest, most = 0, len(changes)
    while fewest < most:
        count = (fewest + most) // 2
        found = switched(job, changes[: count + 1])
        size = total(found.job, found.blocks)
        if size <= memory:
            fitting, most = (found, size), count
        else:
            fewest = count + 1
    return fitting


def largest_model(job: Job, memory: float, changes: Sequence[dict[str, Any]] | None = None) -> str | None:
    """The known model of the most streamed bytes that fits with all ``changes``, all else being as in ``job``.

    Args:
        changes: as of ``choose``; they have to stream the layers.

    Example:
        >>> def largest(card):
        ...     job = qlora_ext.planning.Job(qlora_ext.planning.families.config("llama-7b"))
        ...     return qlora_ext.planning.largest_model(job, card)
    """
    changes = changes_of(job) if changes is None else changes
    candidates = []
    for name in families.names():
        other = dataclasses.replace(job, config=families.config(name), target_modules="all-linear")
        found = switched(other, changes)
        assert found.blocks is not None
        candidates.append((found.blocks.total, name, found))
    for _, name, found in sorted(candidates, key=lambda candidate: -candidate[0]):
        # Before the step, which takes seconds: what is there without one.
        if _placed(still(found.job), found.blocks) <= memory >= total(found.job, found.blocks):
            return name
    return None
