"""The memory and the transfers of a streamed model, and the number of tokens that hides the transfers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .memory import FEW, MORE, Job, build

# The ring is double-buffered. Streaming from a disk needs two more buffers in pinned memory.
_MIN_SLOTS, _STAGING_BUFFERS = 2, 2


@dataclasses.dataclass(frozen=True)
class Streamed:
    """The blocks of a streamed model.

    Attributes:
        blocks: their number.
        total, largest: bytes of all blocks, and of the largest one.
        active: average number of weights per block that each token uses. Of a mixture, only the token's experts count.
    """

    blocks: float
    total: float
    largest: float
    active: float

    def slots(self, resident: float | None, rest: float) -> int:
        """The number of buffers in the ring if weights may use ``resident`` bytes, ``rest`` of them not streamed."""
        fitting = 0 if resident is None else (resident - rest) // self.largest
        return int(min(self.blocks, max(_MIN_SLOTS, fitting)))

    def step_bytes(self, slots: int) -> float:
        """Bytes transferred per forward and backward pass. Blocks in the ring at each turning point are reused."""
        return 2 * (self.blocks - slots) * self.total / self.blocks

    def host_bytes(self, source: str) -> float:
        """Bytes of pinned host memory of a run on a GPU."""
        return self.total if source == "ram" else _STAGING_BUFFERS * self.largest

    def free_tokens(self, link: float, flops: float, checkpointing: bool) -> tuple[int, int]:
        """The number of tokens per step from which the computation hides the transfers.

        Args:
            link: bytes per second from the host to the device, or from the disk.
            flops: operations per second.

        Returns:
            The number that hides the transfers of every pass (the forward is the shortest, with 2 operations per weight
            and token), and the number that hides them for the whole step (4 operations, 6 with checkpointing).
        """
        seconds = self.total / self.blocks / link
        per_token = 2 * self.active / flops
        passes = 3 if checkpointing else 2
        return math.ceil(seconds / per_token), math.ceil(2 * seconds / (passes * per_token))


def _count(model: Any, experts: float) -> tuple[float, float, float, float]:
    from qlora_ext.streaming.blocks import blocks_of

    blocks = blocks_of(model)
    active = 0.0
    for block in blocks:
        for module in block.modules:
            for shape in module.packed_shapes.values():
                active += math.prod(shape) * (experts if len(shape) == 3 else 1.0)
    sizes = [block.nbytes for block in blocks]
    return len(blocks), sum(sizes), max(sizes), active


def streamed(job: Job) -> Streamed:
    """The blocks of the job's model, extrapolated from models with few layers on the meta device.

    Example:
        >>> planning = qlora_app.planning
        >>> config = planning.families.config_of_sizes("hidden=64,intermediate=128,layers=20,heads=4,vocab=512")
        >>> planning.streamed(planning.Job(config)).blocks
        20.0
    """
    text = job.config.get_text_config()
    layers = text.num_hidden_layers
    count = next(
        (n for key in ("num_local_experts", "num_experts", "n_routed_experts") if (n := getattr(text, key, 0))), 1
    )
    share = min(1.0, (getattr(text, "num_experts_per_tok", None) or 1) / count)
    if layers <= MORE:
        blocks, total, largest, active = _count(build(job, layers), share)
    else:
        few, more = _count(build(job, FEW), share), _count(build(job, MORE), share)
        ahead = (layers - FEW) / (MORE - FEW)
        blocks, total, _, active = (a + (b - a) * ahead for a, b in zip(few, more, strict=True))
        largest = more[2]
    return Streamed(blocks, total, largest, active / blocks)


def place(parts: dict[str, float], blocks: Streamed, resident: float | None) -> tuple[dict[str, float], int]:
    """The memory of a run with streamed blocks, and the number of buffers in the ring.

    Args:
        parts: the result of ``peak_memory``.
        blocks: the blocks of the model.
        resident: bytes that the weights may use on the device; None for the minimum.

    Example:
        >>> planning = qlora_app.planning
        >>> config = planning.families.config_of_sizes("hidden=64,intermediate=128,layers=20,heads=4,vocab=512")
        >>> job = planning.Job(config, seq_len=64)
        >>> parts, buffers = planning.place(planning.peak_memory(job), planning.streamed(job), None)
        >>> buffers
        2
    """
    # 4-bit weights outside of blocks, such as a quantized head, stay on the device. Codes and scales are in the ring.
    left = max(parts["base weights"] + parts["scales"] - blocks.total, 0.0)
    slots = blocks.slots(resident, left + parts["other weights"])
    return {**parts, "base weights": left, "scales": 0.0, "ring": slots * blocks.largest}, slots
