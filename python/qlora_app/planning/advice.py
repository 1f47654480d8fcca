"""Changes that would reduce the memory of a run, and by how much."""

from __future__ import annotations

import dataclasses
from typing import Any

from .blocks import place, streamed
from .memory import Job, peaks, split, trains_head

_MIN_SAVING = 0.005  # of the total: smaller savings are not reported


def _changes_of_step(job: Job) -> list[dict[str, Any]]:
    """Changes whose effect requires running the step again."""
    changes: list[dict[str, Any]] = []
    if not job.grad_checkpointing:
        changes.append({"grad_checkpointing": True})
    if not job.chunked_loss and not trains_head(job):
        changes.append({"chunked_loss": True})
    if job.batch_size > 1:
        changes.append({"batch_size": job.batch_size // 2})
    if job.seq_len > 256:
        changes.append({"seq_len": job.seq_len // 2})
    if job.rank > 8:
        changes.append({"rank": job.rank // 2})
    return changes


def _changes_outside_step(job: Job) -> list[dict[str, Any]]:
    """Changes whose effect follows from the memory of the unchanged step."""
    changes: list[dict[str, Any]] = []
    if job.optimizer == "adamw_torch":
        changes.append({"optimizer": "adamw_8bit"})
    if not job.host:
        changes.append({"devices": job.devices * 2})
        if job.optimizer == "adamw_torch":
            changes.append({"optimizer": "paged_adamw_8bit"})
    return changes


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
    found = []
    for change in _changes_of_step(job):
        changed = dataclasses.replace(job, **change)
        found.append((change, total - sum(split(changed, peaks(changed)).values())))
    for change in _changes_outside_step(job):
        found.append((change, total - sum(split(dataclasses.replace(job, **change), measured).values())))
    found = [(change, saving) for change, saving in found if saving > _MIN_SAVING * total]
    streamable, _ = place(parts, streamed(job), None)
    found.append(({"stream": "disk" if job.host else "ram"}, total - sum(streamable.values())))
    return sorted(found, key=lambda pair: -pair[1])
