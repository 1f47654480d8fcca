"""Finds the tensors of a memory-mapped checkpoint in their files, and reads their bytes without the mapping.

If a mapped file is truncated, or the disk has an error, an access to the mapping kills the process with a signal.
Reading the file into memory reports both as exceptions.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import weakref
from collections.abc import Iterable

from torch import Tensor

from .._internal.file_mappings import file_mappings
from ..untrusted import FileError, printable


@dataclasses.dataclass(frozen=True)
class Extent:
    """A range of ``nbytes`` bytes of a file that begins at ``offset``."""

    file: File
    offset: int
    nbytes: int


def _identity(descriptor: int) -> tuple[int, int, int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class File:
    """A file that stays open, and must not change.

    If another file takes its name, the open file is still read.

    Args:
        path: of the file.
        inode: the expected inode.

    Raises:
        FileError: the file is missing, or another one has replaced it.
    """

    def __init__(self, path: str, inode: int) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise FileError(f"cannot read {printable(path)}: {error.strerror}") from error
        weakref.finalize(self, os.close, self._descriptor)
        self._known = _identity(self._descriptor)
        if self._known[1] != inode:
            raise FileError(f"{printable(path)}: another file has replaced it since the model was loaded")

    def check(self) -> None:
        """Raises a FileError if the file has changed since it was opened."""
        size, modified = _identity(self._descriptor)[2:]
        if size < self._known[2]:
            raise FileError(
                f"{printable(self.path)}: truncated while in use: {size} of {self._known[2]} bytes are left; "
                "restore it, and resume"
            )
        if (size, modified) != self._known[2:]:
            raise FileError(f"{printable(self.path)}: changed while in use; restore it, and resume")

    def read(self, offset: int, into: memoryview) -> None:
        """Fills ``into`` with the bytes at ``offset``.

        Raises:
            FileError: the file is too short, or cannot be read.
        """
        done = 0
        while done < len(into):
            try:
                count = os.preadv(self._descriptor, [into[done:]], offset + done)
            except OSError as error:
                raise FileError(
                    f"cannot read {printable(self.path)} at byte {offset + done}: {error.strerror}"
                ) from error
            if count == 0:
                self.check()
                raise FileError(
                    f"{printable(self.path)}: expected more data, but the file ends at byte {offset + done}"
                )
            done += count


def extents_of(tensors: Iterable[Tensor]) -> list[Extent | None]:
    """The file range from which each tensor is mapped; None for tensors that are not mapped from a file.

    Raises:
        FileError: a file is missing, or another one has replaced it. OSError: the system is not Linux.
    """
    if sys.platform != "linux":
        raise OSError("source='disk' needs Linux, because it finds the mapped files in /proc")
    mappings = file_mappings()
    files: dict[tuple[str, int], File] = {}
    found: list[Extent | None] = []
    for tensor in tensors:
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        inside = (m for m in mappings if m.begin <= begin and end <= m.end)
        mapping = next(inside, None) if tensor.device.type == "cpu" and tensor.is_contiguous() else None
        if mapping is None:
            found.append(None)
            continue
        key = mapping.path, mapping.inode
        if key not in files:
            files[key] = File(*key)
        found.append(Extent(files[key], mapping.offset + begin - mapping.begin, tensor.nbytes))
    return found
