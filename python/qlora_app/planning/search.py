"""Changes that save memory: those with which a run fits, the longest context, and the largest model that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..models import families
from .blocks import Streamed, place, streamed
from .memory import Job, peaks, split, static_split, trains_head

_MIN_SAVING = 0.005  # of the total: smaller savings are not reported
# Changed fields of Job, from those that cost nothing to those that cost time. Each is applied with all before it.
_CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"chunked_loss": True},
    {"grad_checkpointing": True},
    {"offload_checkpoints": True},
    {"stream": "ram"},
    {"mlp_chunk": 1024},
)
# On the CPU, checkpoints and weights "in RAM" are in host memory anyway.
_HOST_CHANGES = tuple(
    {"stream": "disk"} if "stream" in change else change for change in _CHANGES if "offload_checkpoints" not in change
)


def changes_of(job: Job) -> tuple[dict[str, Any], ...]:
    """The changes that can save memory on the job's device, from those that cost nothing to those that cost time."""
    return _HOST_CHANGES if job.host else _CHANGES


@dataclasses.dataclass(frozen=True)
class Switched:
    """A job with some of its fields changed.

    Attributes:
        changes: the changed fields, by their names.
        job: with the changes.
        blocks: the streamed blocks; None if the job does not stream.
    """

    changes: dict[str, Any]
    job: Job
    blocks: Streamed | None


def switched(job: Job, changes: Sequence[dict[str, Any]]) -> Switched:
    """``job`` with all ``changes``."""
    merged = {name: value for change in changes for name, value in change.items()}
    changed = dataclasses.replace(job, **merged)
    return Switched(merged, changed, streamed(changed) if changed.stream != "none" else None)


_MAX_TOKENS = 2**20
# Tokens per row at which memory is measured. With at least 2048 tokens, code that works in chunks has several chunks.
_MEASURED = ((2048, 4096, 8192), (128, 256, 512))


def total(job: Job, blocks: Streamed | None) -> float:
    """Bytes on the device at the peak of a step."""
    return max(_totals(job, blocks))


def _totals(job: Job, blocks: Streamed | None) -> list[float]:
    """Bytes on the device at each of the two peaks of a step."""
    return [_placed(split(job, [top]), blocks) for top in peaks(job)]


def _before_the_step(job: Job, blocks: Streamed | None) -> float:
    """Bytes on the device that the weights, adapters and optimizer need: much faster to compute than ``total``."""
    return _placed(static_split(job), blocks)


def _placed(parts: dict[str, float], blocks: Streamed | None) -> float:
    return sum((parts if blocks is None else place(parts, blocks, None)[0]).values())


def longest_context(job: Job, blocks: Streamed | None, memory: float) -> int:
    """The maximum number of tokens per row with which the job fits into ``memory`` bytes; 0 if none fits.

    Each peak is a quadratic polynomial of the number of tokens: activations grow linearly, attention masks with the
    square. Three measurements determine the coefficients.

    Args:
        blocks: ``streamed(job)`` if its layers are streamed, else None.

    Example:
        >>> planning = qlora_app.planning
        >>> config = planning.families.config_of_sizes("hidden=64,intermediate=128,layers=2,heads=4,vocab=512")
        >>> planning.longest_context(planning.Job(config), None, 1e9) > 10_000
        True
    """
    found = 0
    if _before_the_step(job, blocks) > memory:
        return found
    for sizes in _MEASURED:
        totals = zip(*(_totals(dataclasses.replace(job, seq_len=n), blocks) for n in sizes), strict=True)
        found = min(_largest_within(sizes, top, memory) for top in totals)
        if found >= sizes[0]:
            break
    return found // 64 * 64 or found


def _largest_within(sizes: Sequence[int], values: Sequence[float], limit: float) -> int:
    """The largest number up to which the polynomial through the points is at most ``limit``; 0 if there is none."""
    import numpy as np

    polynomial = np.polynomial.Polynomial.fit(sizes, values, len(sizes) - 1)
    beyond = [root.real for root in (polynomial - limit).roots() if abs(root.imag) < 1e-6 and root.real > 0]
    if polynomial(0) > limit:
        return 0
    return int(min([*beyond, _MAX_TOKENS]))


def choose(job: Job, memory: float, changes: Sequence[dict[str, Any]] | None = None) -> tuple[Switched, float] | None:
    """The fewest changes, in the order of their cost, with which ``job`` fits into ``memory``.

    No change increases the memory, so a bisection finds them.

    Args:
        memory: bytes on the device, or of the process if the job runs on the CPU.
        changes: fields of ``Job`` to change, each together with all before it; the default is ``changes_of(job)``.

    Returns:
        The changed job and its bytes; None if the job does not fit even with all changes.

    Example:
        >>> planning = qlora_app.planning
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
    """The name of the largest known model that fits with all ``changes``, with the other settings of ``job``.

    Args:
        changes: as in ``choose``. They must stream the layers.

    Returns:
        None if no known model fits.

    Example:
        >>> def largest(card):
        ...     job = qlora_app.planning.Job(qlora_app.planning.families.config("llama-7b"))
        ...     return qlora_app.planning.largest_model(job, card)
    """
    changes = changes_of(job) if changes is None else changes
    candidates = []
    for name in families.names():
        other = dataclasses.replace(job, config=families.config(name), forms=None, target_modules="all-linear")
        found = switched(other, changes)
        assert found.blocks is not None
        candidates.append((found.blocks.total, name, found))
    for _, name, found in sorted(candidates, key=lambda candidate: -candidate[0]):
        if _before_the_step(found.job, found.blocks) <= memory >= total(found.job, found.blocks):
            return name
    return None


def savings(job: Job, measured: list[dict[str, float]] | None = None) -> list[tuple[dict[str, Any], float]]:
    """The changes that would reduce the memory of a run that is not streamed, each alone, the largest saving first.

    Args:
        measured: the ``peaks`` of the job, if they are known.

    Returns:
        Changed fields of ``job``, and the bytes per device that they save.

    Example:
        >>> planning = qlora_app.planning
        >>> config = planning.families.config_of_sizes("hidden=64,intermediate=128,layers=2,heads=4,vocab=4096")
        >>> planning.savings(planning.Job(config, seq_len=128))[0][0]
        {'chunked_loss': True}
    """
    measured = peaks(job) if measured is None else measured
    parts = split(job, measured)
    total = sum(parts.values())
    plain = job.optimizer == "adamw_torch"
    changes: list[tuple[bool, dict[str, Any]]] = [
        (not job.grad_checkpointing, {"grad_checkpointing": True}),
        (not job.chunked_loss and not trains_head(job), {"chunked_loss": True}),
        (job.batch_size > 1, {"batch_size": job.batch_size // 2}),
        (job.seq_len > 256, {"seq_len": job.seq_len // 2}),
        (job.rank > 8, {"rank": job.rank // 2}),
        (plain, {"optimizer": "adamw_8bit"}),
        (not job.host, {"devices": job.devices * 2}),
        (plain and not job.host, {"optimizer": "paged_adamw_8bit"}),
    ]
    found: list[tuple[dict[str, Any], float]] = []
    for change in (change for possible, change in changes if possible):
        changed = dataclasses.replace(job, **change)
        outside_step = change.keys() <= {"optimizer", "devices"}  # the step is that of the unchanged job
        size = split(changed, measured if outside_step else peaks(changed))
        found.append((change, total - sum(size.values())))
    found = [(change, saving) for change, saving in found if saving > _MIN_SAVING * total]
    streamable, _ = place(parts, streamed(job), None)
    found.append(({"stream": "disk" if job.host else "ram"}, total - sum(streamable.values())))
    return sorted(found, key=lambda pair: -pair[1])
