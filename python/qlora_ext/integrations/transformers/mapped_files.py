"""Gives back the memory that reading a memory-mapped checkpoint occupies, and nothing that anybody has written."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Iterable

from torch import Tensor

_MADV_DONTNEED, _MADV_PAGEOUT = 4, 21  # asm-generic/mman-common.h
_Range = tuple[int, int]


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


def _advise(begin: int, end: int, advice: int) -> None:
    if begin < end:
        _libc().madvise(begin, end - begin, advice)  # a refusal costs memory, nothing else


class MappedFiles:
    """The files ``paths`` of a checkpoint, about to be mapped and read by one load (Linux; elsewhere nothing is done).

    What safetensors has read of a checkpoint counts as this process's memory until the file is closed, so that
    quantizing while loading would hold the whole dense model all the same. A mapping is private and may be written to,
    and other models of the process may live in mappings of the same files, now or from another thread: only a tensor
    that the load is done with may lose what is in it.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = {os.path.realpath(path) for path in paths}
        self._older = self._mappings()  # they belong to others

    def _new_mappings(self) -> list[_Range]:
        return [(b, e) for b, e in self._mappings() if not any(b < end and begin < e for begin, end in self._older)]

    def _mappings(self) -> list[_Range]:
        if sys.platform != "linux" or not self._paths:
            return []
        found = []
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                fields = line.rstrip("\n").split(maxsplit=5)
                if len(fields) == 6 and fields[5] in self._paths:
                    begin, _, end = fields[0].partition("-")
                    found.append((int(begin, 16), int(end, 16)))
        return found

    def release(self, tensor: Tensor) -> None:
        """Gives back the pages of ``tensor``, which the load has read and nobody will look at again.

        Those that lie wholly within it are unmapped, where it is itself a piece of a mapping. Of a copy (cast, or
        merged of several tensors) the source is not known: then the kernel pages out what has been mapped of the files
        since the load began, which keeps every content, but means reading from the disk for whoever comes next. What
        was copied to another device is left to the kernel.
        """
        if tensor.device.type != "cpu":
            return
        mappings, begin, page = self._new_mappings(), tensor.data_ptr(), mmap.PAGESIZE
        end = begin + tensor.nbytes
        if tensor.is_contiguous() and any(b <= begin and end <= e for b, e in mappings):
            _advise(-(-begin // page) * page, end // page * page, _MADV_DONTNEED)
        else:
            for mapping in mappings:
                _advise(*mapping, _MADV_PAGEOUT)
