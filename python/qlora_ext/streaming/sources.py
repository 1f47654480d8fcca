"""Where the blocks are at home: in the checkpoint's files, or in pinned memory of the host."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import Block, Part
from .files import Extent, extents_of


def _bytes_of(memory: Tensor, part: Part) -> memoryview:
    return memory.numpy().data[part.offset : part.offset + part.nbytes]


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class FileSource:
    """Blocks in the files that the model's weights are mapped from.

    Raises:
        ValueError: a weight is not mapped from a file. FileError: a file is another by now.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        parts = [part for block in blocks for part in block.parts]
        self._extents: dict[Part, tuple[Extent, tuple[int, int]]] = {}
        for part, extent in zip(parts, extents_of([part.home for part in parts]), strict=True):
            if extent is None:
                raise ValueError(
                    "source: 'disk' expects 4-bit weights that are mapped from the model's files, as loading a "
                    "saved 4-bit model with device_map='cpu' makes them; "
                    f"{part.name} of {type(part.module).__name__} is in memory (save and load the model, or use 'ram')"
                )
            self._extents[part] = extent, part.state
        self._files = {extent.file for extent, _ in self._extents.values()}

    def check(self) -> None:
        """Raises a FileError where a file is no longer what it was."""
        for file in self._files:
            file.check()

    def read(self, block: Block, memory: Tensor, size: int) -> None:
        """Fills the first ``size`` bytes of the block into ``memory`` on the host, uint8.

        Raises:
            FileError: a file has changed or cannot be read.
        """
        self.check()
        for part in block.parts:
            if part.offset < size:
                self.read_part(part, _bytes_of(memory, part))
        self.check()  # what was changed meanwhile may have been read in part

    def read_part(self, part: Part, into: memoryview, begin: int = 0) -> None:
        """Fills ``into`` with a tensor's bytes from ``begin`` on; what the module was given since is taken from it."""
        extent, state = self._extents[part]
        if part.state == state:
            extent.file.read(extent.offset + begin, into)
        else:
            into[:] = raw(part.home)[begin : begin + len(into)]


class PinnedSource:
    """Blocks in pinned host memory, one piece of it a block, of which the modules' tensors are views."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._memory: dict[str, Tensor] = {}
        for block in blocks:
            self._memory[block.name] = _pinned(block.nbytes)
            self.update(block)

    def memory(self, block: Block) -> Tensor:
        """The block's memory, uint8."""
        return self._memory[block.name]

    def is_current(self, block: Block) -> bool:
        """Whether the modules' tensors are those in the block's memory; not so where a module was given another."""
        begin = self.memory(block).data_ptr()
        return all(part.home.data_ptr() == begin + part.offset for part in block.parts)

    def update(self, block: Block) -> None:
        """Takes the tensors that the modules have by now into the block's memory."""
        for part in block.parts:
            view = part.view(self.memory(block))
            if view.data_ptr() != part.home.data_ptr():
                view.copy_(part.home)
                part.move_home(view)

    def read_part(self, part: Part, into: memoryview, begin: int = 0) -> None:
        """Fills ``into`` with a tensor's bytes from ``begin`` on."""
        into[:] = raw(part.home)[begin : begin + len(into)]

    def check(self) -> None:
        """Nothing can have changed."""


def _pinned(nbytes: int) -> Tensor:
    """Pinned memory of just that size: torch's own allocator takes the next power of two."""
    memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    runtime = torch.cuda.cudart()
    error = runtime.cudaHostRegister(memory.data_ptr(), nbytes, 0)
    if int(error) != 0:
        raise MemoryError(f"cannot pin {nbytes} bytes of host memory (CUDA error {int(error)}); use source='disk'")
    weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())
    return memory
