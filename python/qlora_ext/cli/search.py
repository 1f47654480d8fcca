"""``plan --max-memory``: the switches with which a run fits, its longest context, and the largest model that fits."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from . import families
from .memory import Job, split, tops
from .settings import flag
from .streamed import Streamed, place, streamed

# From what costs nothing to what costs time, each with those before it: the fields of Job that are changed.
_CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"chunked_loss": True},
    {"grad_checkpointing": True},
    {"offload_checkpoints": True},
    {"stream": "ram"},
    {"mlp_chunk": 1024},
)


@dataclasses.dataclass(frozen=True)
class _Switched:
    """A job with switches, as an option a switch; ``blocks`` where its layers are streamed."""

    switches: str
    job: Job
    blocks: Streamed | None


def _switched(job: Job, count: int) -> _Switched:
    """``job`` with the first ``count`` of the changes."""
    changes: dict[str, Any] = {}
    for more in _CHANGES[:count]:
        changes |= more
    options = [flag(name) if value is True else f"{flag(name)} {value}" for name, value in changes.items()]
    streams = changes.pop("stream", None)
    changed = dataclasses.replace(job, **changes)
    return _Switched(" ".join(options) or "no switch", changed, streamed(changed) if streams else None)


_LONGEST = 2**20


def total(job: Job, blocks: Streamed | None) -> float:
    """Bytes on the device at the highest point of a step."""
    parts = split(job, tops(job))
    return sum((parts if blocks is None else place(parts, blocks, None)[0]).values())


def longest_context(job: Job, blocks: Streamed | None, memory: float) -> int:
    """The most tokens a row with which the job fits into ``memory`` bytes; 0 where none does.

    Memory grows in proportion to the tokens (attention is torch's, which holds no scores), so that two sizes give a
    line, and a third one, at its end, corrects it.
    """
    short, long = 512, 1024
    low = total(dataclasses.replace(job, seq_len=short), blocks)
    high = total(dataclasses.replace(job, seq_len=long), blocks)
    for _ in range(2):
        slope = max((high - low) / (long - short), 1.0)
        found = int(min(_LONGEST, short + (memory - low) / slope))
        if found < 1:
            return 0
        if found <= long:
            break
        long, high = found, total(dataclasses.replace(job, seq_len=found), blocks)
        if high <= memory:
            break
    return found // 64 * 64 or found


def choose(job: Job, memory: float) -> tuple[_Switched, float] | None:
    """The first switches, in the order of what they cost, with which ``job`` fits, and the bytes that it then takes."""
    for count in range(1, len(_CHANGES) + 1):
        switched = _switched(job, count)
        size = total(switched.job, switched.blocks)
        if size <= memory:
            return switched, size
    return None


def largest_model(job: Job, memory: float) -> str | None:
    """The known model of the most streamed bytes that fits with every switch, all else being as in ``job``."""
    found: list[tuple[float, str]] = []
    for name in families.names():
        other = dataclasses.replace(job, config=families.config(name), target_modules="all-linear")
        switched = _switched(other, len(_CHANGES))
        assert switched.blocks is not None
        if total(switched.job, switched.blocks) <= memory:
            found.append((switched.blocks.total, name))
    return max(found)[1] if found else None


def run(job: Job, memory: float, link: float, flops: float, as_json: bool) -> int:
    """Prints what is found; see ``plan --help``."""
    chosen = choose(job, memory)
    best, size = chosen or (_switched(job, len(_CHANGES)), float("nan"))
    blocks = best.blocks
    context = longest_context(best.job, blocks, memory)
    largest = largest_model(job, memory)
    free = None if blocks is None else blocks.free_tokens(link, flops, best.job.grad_checkpointing)[0]
    host = 0.0 if blocks is None else blocks.host_bytes("ram")
    if as_json:
        found = {
            "memory": memory,
            "fits": chosen is not None,
            "switches": best.switches,
            "total": None if chosen is None else size,
            "host_bytes": host,
            "longest_context": context,
            "free_tokens": free,
            "largest_model": largest,
        }
        print(json.dumps(found, indent=2))
        return 0
    if chosen is None:
        print(f"rows of {job.seq_len:,} tokens do not fit into {memory / 1e9:.1f} GB with any switch ({best.switches})")
    else:
        print(f"fits into {memory / 1e9:.1f} GB with {best.switches}: {size / 1e9:.2f} GB")
    if blocks is not None:
        print(f"{host / 1e9:.2f} GB of pinned host memory; free from {free:,} tokens a step")
    print(
        f"the longest context then: {context:,} tokens a row, {job.batch_size} rows a pass"
        if context
        else "no context fits"
    )
    print(f"the largest known model that fits: {largest or 'none'} (with --stream, at {job.seq_len:,} tokens)")
    return 0
