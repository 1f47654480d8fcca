"""Releases the memory of pages that were read from a memory-mapped checkpoint, but never pages that were written."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Iterable

from torch import Tensor

from ..._internal.file_mappings import file_mappings

_MADV_DONTNEED, _MADV_PAGEOUT = 4, 21  # asm-generic/mman-common.h
_Range = tuple[int, int]


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


def _advise(begin: int, end: int, advice: int) -> None:
    if begin < end:
        _libc().madvise(begin, end - begin, advice)  # errors are ignored: they only cost memory


def _joined(ranges: Iterable[_Range]) -> list[_Range]:
    """The ranges, with adjacent ones as one: small tensors, one after the other, may share their pages."""
    found: list[_Range] = []
    for begin, end in sorted(ranges):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


class MappedFiles:
    """The files ``paths`` of a checkpoint that one load is about to map and read. Does nothing except on Linux.

    Pages that safetensors has read count as memory of this process until the file is closed. Without releasing them,
    quantizing while loading would still need memory for the whole dense model. Mappings are private and may be written
    to, and other models of this process may use mappings of the same files. Only tensors that the load has finished
    with may therefore be released.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = {os.path.realpath(path) for path in paths}
        self._older = self._mappings()  # mappings of other users

    def _new_mappings(self) -> list[_Range]:
        return [(b, e) for b, e in self._mappings() if not any(b < end and begin < e for begin, end in self._older)]

    def _mappings(self) -> list[_Range]:
        found = file_mappings() if self._paths else []
        return [(m.begin, m.end) for m in found if m.path in self._paths]

    def release(self, *tensors: Tensor) -> None:
        """Releases the pages of ``tensors``, which the load has read for the last time.

        The pages that lie entirely within tensors of a mapping are discarded. If a tensor is a copy (cast,
        or merged from several tensors), its source is unknown, so the kernel is asked to page out everything that was
        mapped since the load began. That preserves all content, but later reads access the disk. Tensors on other
        devices are not released.
        """
        on_cpu = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        mappings, page = self._new_mappings() if on_cpu else [], mmap.PAGESIZE
        copied, mapped = False, list[_Range]()
        for tensor in on_cpu:
            begin = tensor.data_ptr()
            end = begin + tensor.nbytes
            if tensor.is_contiguous() and any(b <= begin and end <= e for b, e in mappings):
                mapped.append((begin, end))
            else:
                copied = True
        for begin, end in _joined(mapped):
            _advise(-(-begin // page) * page, end // page * page, _MADV_DONTNEED)
        for mapping in mappings if copied else []:
            _advise(*mapping, _MADV_PAGEOUT)
