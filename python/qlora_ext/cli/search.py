"""``plan --max-memory``: the switches with which a run fits, its longest context, and the largest model that fits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from . import families
from .memory import Job, split, still, tops
from .streamed import Streamed, place, streamed
from .training.settings import flag

# From what costs nothing to what costs time, each with those before it: the fields of Job that are changed.
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"chunked_loss": True},
    {"grad_checkpointing": True},
    {"offload_checkpoints": True},
    {"stream": "ram"},
    {"mlp_chunk": 1024},
)


# What of them serves on the CPU, where checkpoints are in the host's memory anyway and so are weights "in RAM".
HOST_CHANGES = tuple(
    {"stream": "disk"} if "stream" in change else change for change in CHANGES if "offload_checkpoints" not in change
)


@dataclasses.dataclass(frozen=True)
class Switched:
    """A job with some of its fields changed; ``blocks`` where its layers are streamed."""

    changes: dict[str, Any]
    job: Job
    blocks: Streamed | None

    @property
    def switches(self) -> str:
        """The changes, as an option each."""
        options = (flag(name) if value is True else f"{flag(name)} {value}" for name, value in self.changes.items())
        return " ".join(options) or "no switch"


def switched(job: Job, changes: Sequence[dict[str, Any]]) -> Switched:
    """``job`` with all of the changes."""
    merged = {name: value for change in changes for name, value in change.items()}
    changed = dataclasses.replace(job, **merged)
    return Switched(merged, changed, streamed(changed) if changed.stream != "none" else None)


_LONGEST = 2**20
# Tokens a row of which memory is measured: from the first on, what works in chunks of tokens has several.
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
    """The most tokens a row with which the job fits into ``memory`` bytes; 0 where none does.

    Each top is a polynomial of the tokens: activations grow with them, the masks of attention with their square. Three
    sizes give its coefficients.
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


def choose(job: Job, memory: float, changes: Sequence[dict[str, Any]] = CHANGES) -> tuple[Switched, float] | None:
    """The first switches, in the order of what they cost, with which ``job`` fits, and the bytes that it then takes.

    With every switch it takes as much as without, or less: the first that fits is found by halving.
    """
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


def largest_model(job: Job, memory: float, changes: Sequence[dict[str, Any]]) -> str | None:
    """The known model of the most streamed bytes that fits with all ``changes``, all else being as in ``job``."""
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


def run(job: Job, memory: float, process: float, link: float, flops: float, as_json: bool) -> int:
    """Prints what is found; see ``plan --help``.

    Args:
        process: of the ``memory``, the bytes that are taken before there is a model.
    """
    changes = HOST_CHANGES if job.host else CHANGES
    chosen = choose(job, memory - process, changes)
    best, size = chosen or (switched(job, changes), float("nan"))
    size += process
    blocks = best.blocks
    context = longest_context(best.job, blocks, memory - process)
    largest = largest_model(job, memory - process, changes)
    free = None if blocks is None else blocks.free_tokens(link, flops, best.job.grad_checkpointing)[0]
    host = 0.0 if blocks is None or job.host else blocks.host_bytes("ram")
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
    if host:
        print(f"{host / 1e9:.2f} GB of pinned host memory; free from {free:,} tokens a step")
    print(
        f"the longest context then: {context:,} tokens a row, {job.batch_size} rows a pass"
        if context
        else "no context fits"
    )
    print(f"the largest known model that fits: {largest or 'none'} (with --stream, at {job.seq_len:,} tokens)")
    return 0
