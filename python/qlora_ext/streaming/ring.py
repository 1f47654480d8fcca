"""The memory where streamed blocks take turns, and what fills it ahead of their use."""

from __future__ import annotations

import abc
import concurrent.futures
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .blocks import Block
from .sources import FileSource, PinnedSource


@dataclasses.dataclass(eq=False)
class Slot:
    """Memory for one block, on the device that computes.

    Attributes:
        block: what it holds, or is being filled with; None: nothing.
        size: bytes of the block that it holds, from the first on.
        state: that of the block as it was read; see ``Block.state``.
        lent: the block's tensors, made at its first use.
        filling: the read that is under way or done, by a thread of its own.
        filled: CUDA: when the copy into it has come to its end.
        users: CUDA: the streams on which the block has been used.
        done: CUDA: when these are done with the block before.
    """

    memory: Tensor
    block: Block | None = None
    size: int = 0
    state: Any = None
    lent: Any = None
    filling: concurrent.futures.Future[None] | None = None
    filled: Any = None
    users: set[Any] = dataclasses.field(default_factory=set)
    done: list[Any] = dataclasses.field(default_factory=list)


class Filler(abc.ABC):
    """Fills slots. What is asked for first is there first."""

    @abc.abstractmethod
    def fill(self, slot: Slot, block: Block, size: int) -> None:
        """Begins to fill ``slot`` with the first ``size`` bytes of ``block``.

        What was asked of it before is finished or will not matter.
        """

    @abc.abstractmethod
    def wait(self, slot: Slot) -> None:
        """Has whatever is computed from here on find the block in ``slot``.

        Raises:
            FileError: it could not be read.
        """

    @abc.abstractmethod
    def retire(self, slot: Slot) -> None:
        """Notes that the block in ``slot`` is not used any more, but by what is under way."""


class _Reader:
    """A thread that does one read after the other."""

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="qlora_ext-reader")

    def begin(self, slot: Slot, read: Callable[..., None], *arguments: Any) -> None:
        """Has ``read(*arguments)`` fill ``slot``, in place of what was asked for it before."""
        if slot.filling is not None:
            slot.filling.cancel()  # or it is under way, and comes to its end before the next read begins
        slot.filling = self._thread.submit(read, *arguments)

    def wait(self, slot: Slot) -> None:
        """Until ``slot`` is filled; raises what its read raised."""
        assert slot.filling is not None
        slot.filling.result()


class ReadingFiller(Filler):
    """From files to slots that are in the host's memory."""

    def __init__(self, source: FileSource) -> None:
        self._source = source
        self._reader = _Reader()

    def fill(self, slot: Slot, block: Block, size: int) -> None:
        self._reader.begin(slot, self._source.read, block, slot.memory, size)

    def wait(self, slot: Slot) -> None:
        self._reader.wait(slot)

    def retire(self, slot: Slot) -> None:
        pass  # nothing is under way when a call on the CPU has returned


class CopyingFiller(Filler):
    """From pinned host memory to slots on a CUDA device, by copies on a stream of their own.

    Events order the copies and the kernels: the host waits for neither, nor does the compute stream copy.
    """

    def __init__(self, source: PinnedSource | None, device: torch.device) -> None:
        self._source = source
        self._stream = torch.cuda.Stream(device)

    def fill(self, slot: Slot, block: Block, size: int) -> None:
        assert self._source is not None
        if not self._source.is_current(block):
            self._stream.synchronize()  # a copy of what the block was may be under way
            self._source.update(block)
        self._copy(slot, self._source.memory(block)[:size])

    def _copy(self, slot: Slot, pinned: Tensor) -> None:
        """By whatever thread: has the block follow what is done with the one before it in ``slot``."""
        for event in slot.done:
            self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            slot.memory[: len(pinned)].copy_(pinned, non_blocking=True)
        slot.filled = self._stream.record_event()
        slot.users.clear()

    def wait(self, slot: Slot) -> None:
        stream = torch.cuda.current_stream(slot.memory.device)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a streamed model cannot be captured in a CUDA graph: its weights come from the host")
        if stream not in slot.users:
            stream.wait_event(slot.filled)
            slot.users.add(stream)

    def retire(self, slot: Slot) -> None:
        slot.done = [stream.record_event() for stream in slot.users]


class StagingFiller(CopyingFiller):
    """From files to slots on a CUDA device, by way of pinned memory that a reading thread fills.

    Args:
        nbytes: of the largest block.
    """

    def __init__(self, source: FileSource, device: torch.device, nbytes: int) -> None:
        super().__init__(None, device)
        self._files = source
        self._reader = _Reader()
        # Two: one is read into while the other is copied from.
        self._staging = [torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(2)]
        self._copied: list[Any] = [None, None]
        self._turn = 0

    def fill(self, slot: Slot, block: Block, size: int) -> None:
        self._reader.begin(slot, self._read_and_copy, slot, block, size)

    def _read_and_copy(self, slot: Slot, block: Block, size: int) -> None:
        self._turn = 1 - self._turn
        staging, copied = self._staging[self._turn], self._copied[self._turn]
        if copied is not None:
            copied.synchronize()  # this thread waits for its own copy; nobody who computes does
        self._files.read(block, staging, size)
        self._copy(slot, staging[:size])
        self._copied[self._turn] = slot.filled

    def wait(self, slot: Slot) -> None:
        self._reader.wait(slot)
        super().wait(slot)
