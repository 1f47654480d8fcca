"""The sources of streamed blocks: the checkpoint's files, or pinned host memory."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ..digest import bytes_of
from .blocks import Block, Part
from .files import Extent, extents_of


def _bytes_of(memory: Tensor, part: Part) -> memoryview:
    return memory.numpy().data[part.offset : part.offset + part.nbytes]


class FileSource:
    """Reads blocks from the files from which the model's weights are mapped.

    Raises:
        ValueError: a weight is not mapped from a file. FileError: a file has been replaced.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        parts = [part for block in blocks for part in block.parts]
        self._extents: dict[Part, tuple[Extent, tuple[int, int]]] = {}
        for part, extent in zip(parts, extents_of([part.host_tensor for part in parts]), strict=True):
            if extent is None:
                raise ValueError(
                    "source: 'disk' expects 4-bit weights that are mapped from the model's files, as loading a "
                    "saved 4-bit model with device_map='cpu' makes them; "
                    f"{part.name} of {type(part.module).__name__} is in memory (save and load the model, or use 'ram')"
                )
            self._extents[part] = extent, part.state
        self._files = {extent.file for extent, _ in self._extents.values()}

    def check(self) -> None:
        """Raises a FileError if a file has changed."""
        for file in self._files:
            file.check()

    def read(self, block: Block, memory: Tensor, size: int) -> None:
        """Reads the first ``size`` bytes of the block into ``memory``, uint8 on the host.

        Raises:
            FileError: a file has changed or cannot be read.
        """
        self.check()
        for part in block.parts:
            if part.offset < size:
                self.read_part(part, _bytes_of(memory, part))
        self.check()  # again, because the file may have changed during the read

    def read_part(self, part: Part, into: memoryview, begin: int = 0) -> None:
        """Fills ``into`` with a tensor's bytes from ``begin`` on. If the module's tensor has changed, it is read."""
        extent, state = self._extents[part]
        if part.state == state:
            extent.file.read(extent.offset + begin, into)
        else:
            into[:] = bytes_of(part.host_tensor)[begin : begin + len(into)]


class PinnedSource:
    """Keeps blocks in pinned host memory, one buffer per block. The modules' tensors become views of it."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._memory: dict[str, Tensor] = {}
        for block in blocks:
            self._memory[block.name] = _pinned(block.nbytes)
            self.update(block)

    def memory(self, block: Block) -> Tensor:
        """The block's memory, uint8."""
        return self._memory[block.name]

    def is_current(self, block: Block) -> bool:
        """Whether the modules' tensors are still views of the block's memory, that is, none was replaced."""
        begin = self.memory(block).data_ptr()
        return all(part.host_tensor.data_ptr() == begin + part.offset for part in block.parts)

    def update(self, block: Block) -> None:
        """Copies replaced tensors of the modules into the block's memory."""
        for part in block.parts:
            view = part.view(self.memory(block))
            if view.data_ptr() != part.host_tensor.data_ptr():
                view.copy_(part.host_tensor)
                part.set_host_tensor(view)

    def read_part(self, part: Part, into: memoryview, begin: int = 0) -> None:
        """Fills ``into`` with a tensor's bytes from ``begin`` on."""
        into[:] = bytes_of(part.host_tensor)[begin : begin + len(into)]

    def check(self) -> None:
        """Does nothing, because memory does not change like files."""


def _pinned(nbytes: int) -> Tensor:
    """Pinned memory of exactly that size. torch's own allocator rounds up to a power of two."""
    memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    runtime = torch.cuda.cudart()
    error = runtime.cudaHostRegister(memory.data_ptr(), nbytes, 0)
    if int(error) != 0:
        raise MemoryError(f"cannot pin {nbytes} bytes of host memory (CUDA error {int(error)}); use source='disk'")
    weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())
    return memory
