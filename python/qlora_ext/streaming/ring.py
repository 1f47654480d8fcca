"""The ring buffer of streamed blocks, and the fillers that prefetch blocks into it."""

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
    """A buffer for one block on the device that computes.

    Attributes:
        block: the block in the buffer, or on its way there; None if there is none.
        size: the number of bytes of the block that were requested, from its beginning.
        state: the ``Block.state`` at the time of reading.
        views: the block's tensors as views of the buffer, created at the first use.
        filling: the pending or finished read, in a reading thread.
        filled: CUDA event: the copy into the buffer is complete.
        users: CUDA streams that have used the block.
        done: CUDA events: these streams have finished with the previous block.
    """

    memory: Tensor
    block: Block | None = None
    size: int = 0
    state: Any = None
    views: Any = None
    filling: concurrent.futures.Future[None] | None = None
    filled: Any = None
    users: set[Any] = dataclasses.field(default_factory=set)
    done: list[Any] = dataclasses.field(default_factory=list)


class Filler(abc.ABC):
    """Fills slots in the order of the requests."""

    @abc.abstractmethod
    def fill(self, slot: Slot, block: Block, size: int) -> None:
        """Starts to fill ``slot`` with the first ``size`` bytes of ``block``, replacing any earlier request."""

    @abc.abstractmethod
    def wait(self, slot: Slot) -> None:
        """Makes the following computations wait until the block is in ``slot``.

        Raises:
            FileError: the block could not be read.
        """

    @abc.abstractmethod
    def retire(self, slot: Slot) -> None:
        """Records that no further computation uses the block in ``slot``. Running ones may still use it."""


class _Reader:
    """A thread that runs one read after the other."""

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="qlora_ext-reader")

    def begin(self, slot: Slot, read: Callable[..., None], *arguments: Any) -> None:
        """Schedules ``read(*arguments)`` to fill ``slot``, replacing any earlier request."""
        if slot.filling is not None:
            slot.filling.cancel()  # a running read is not cancelled, but ends before the next one starts
        slot.filling = self._thread.submit(read, *arguments)

    def wait(self, slot: Slot) -> None:
        """Waits until ``slot`` is filled, and raises the exception of the read if it failed."""
        assert slot.filling is not None
        slot.filling.result()


class ReadingFiller(Filler):
    """Reads from files into slots in host memory."""

    def __init__(self, source: FileSource) -> None:
        self._source = source
        self._reader = _Reader()

    def fill(self, slot: Slot, block: Block, size: int) -> None:
        self._reader.begin(slot, self._source.read, block, slot.memory, size)

    def wait(self, slot: Slot) -> None:
        self._reader.wait(slot)

    def retire(self, slot: Slot) -> None:
        pass  # CPU operators are finished when they return


class CopyingFiller(Filler):
    """Copies from pinned host memory into slots on a CUDA device, on a separate stream.

    Events order copies and kernels, so the host never waits, and the compute stream never copies.
    """

    def __init__(self, source: PinnedSource | None, device: torch.device) -> None:
        self._source = source
        self._stream = torch.cuda.Stream(device)

    def fill(self, slot: Slot, block: Block, size: int) -> None:
        assert self._source is not None
        if not self._source.is_current(block):
            self._stream.synchronize()  # a copy of the old content may be running
            self._source.update(block)
        self._copy(slot, self._source.memory(block)[:size])

    def _copy(self, slot: Slot, pinned: Tensor) -> None:
        """Copies after all uses of the previous block in ``slot``. May be called from any thread."""
        for event in slot.done:
            self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            slot.memory[: len(pinned)].copy_(pinned, non_blocking=True)
        slot.filled = self._stream.record_event()
        slot.users.clear()

    def wait(self, slot: Slot) -> None:
        stream = torch.cuda.current_stream(slot.memory.device)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a streamed model cannot be captured in a CUDA graph, because it copies from the host")
        if stream not in slot.users:
            stream.wait_event(slot.filled)
            slot.users.add(stream)

    def retire(self, slot: Slot) -> None:
        slot.done = [stream.record_event() for stream in slot.users]


class StagingFiller(CopyingFiller):
    """Reads from files into pinned memory in a reading thread, and copies from there into slots on a CUDA device.

    Args:
        nbytes: size of the largest block.
    """

    def __init__(self, source: FileSource, device: torch.device, nbytes: int) -> None:
        super().__init__(None, device)
        self._files = source
        self._reader = _Reader()
        # Double buffering: one is read into while the other is copied from.
        self._staging = [torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(2)]
        self._copied: list[Any] = [None, None]
        self._turn = 0

    def fill(self, slot: Slot, block: Block, size: int) -> None:
        self._reader.begin(slot, self._read_and_copy, slot, block, size)

    def _read_and_copy(self, slot: Slot, block: Block, size: int) -> None:
        self._turn = 1 - self._turn
        staging, copied = self._staging[self._turn], self._copied[self._turn]
        if copied is not None:
            copied.synchronize()  # only this thread waits
        self._files.read(block, staging, size)
        self._copy(slot, staging[:size])
        self._copied[self._turn] = slot.filled

    def wait(self, slot: Slot) -> None:
        self._reader.wait(slot)
        super().wait(slot)
