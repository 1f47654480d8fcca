"""What streaming costs and saves: memory on the device and the host, bytes per step, and when it takes no time."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .memory import FEW, MORE, Job, build

# One block is computed with while another comes in; from a disk, two more wait in pinned memory.
_FEWEST_SLOTS, _STAGED = 2, 2


@dataclasses.dataclass(frozen=True)
class Streamed:
    """The blocks of a model that is streamed.

    Attributes:
        blocks: how many there are.
        total, largest: bytes of all of them, and of one.
        active: weights of one that a token is multiplied with, on average: of a mixture, those of its experts.
    """

    blocks: float
    total: float
    largest: float
    active: float

    def slots(self, resident: float | None, rest: float) -> int:
        """Buffers of the ring where the weights may take ``resident`` bytes, ``rest`` of which are not streamed."""
        fitting = 0 if resident is None else (resident - rest) // self.largest
        return int(min(self.blocks, max(_FEWEST_SLOTS, fitting)))

    def step_bytes(self, slots: int) -> float:
        """Bytes that come in for a forward and a backward pass; what the ring holds at each turn stays in it."""
        return 2 * (self.blocks - slots) * self.total / self.blocks

    def host_bytes(self, source: str) -> float:
        """Pinned bytes on the host of a run on a GPU."""
        return self.total if source == "ram" else _STAGED * self.largest

    def free_tokens(self, link: float, flops: float, checkpointing: bool) -> tuple[int, int]:
        """From how many tokens per step copies hide behind the computation.

        Args:
            link: bytes per second from the host to the device, or from the disk. flops: operations per second.

        Returns:
            For every pass by itself (the forward one decides, of 2 operations a weight and token), and for the step as
            a whole (4 operations and, with checkpointing, 2 more).
        """
        seconds = self.total / self.blocks / link
        per_token = 2 * self.active / flops
        passes = 3 if checkpointing else 2
        return math.ceil(seconds / per_token), math.ceil(2 * seconds / (passes * per_token))


def _count(model: Any, experts: float) -> tuple[float, float, float, float]:
    from ..streaming.blocks import blocks_of

    blocks = blocks_of(model)
    active = 0.0
    for block in blocks:
        for module in block.modules:
            for shape in module.packed_shapes.values():
                active += math.prod(shape) * (experts if len(shape) == 3 else 1.0)
    sizes = [block.nbytes for block in blocks]
    return len(blocks), sum(sizes), max(sizes), active


def streamed(job: Job) -> Streamed:
    """The blocks of the job's model, found on models of few layers without memory.

    Example:
        >>> planning = qlora_ext.planning
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
    """The split of a resident run as it is with the blocks streamed, and the number of buffers in the ring.

    Args:
        parts: of ``peak_memory``.
        resident: bytes that the weights may take on the device; None: as few as possible.

    Example:
        >>> planning = qlora_ext.planning
        >>> config = planning.families.config_of_sizes("hidden=64,intermediate=128,layers=20,heads=4,vocab=512")
        >>> job = planning.Job(config, seq_len=64)
        >>> parts, buffers = planning.place(planning.peak_memory(job), planning.streamed(job), None)
        >>> buffers
        2
    """
    # What of the 4-bit weights is in no block, such as a quantized head, stays; both kinds lie in the ring.
    left = max(parts["base weights"] + parts["scales"] - blocks.total, 0.0)
    slots = blocks.slots(resident, left + parts["other weights"])
    return {**parts, "base weights": left, "scales": 0.0, "ring": slots * blocks.largest}, slots
