"""Gives back the memory that reading a memory-mapped checkpoint occupies."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterable, Iterator

_MADV_DONTNEED = 4  # asm-generic/mman-common.h


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


def _mappings(paths: Iterable[str]) -> Iterator[tuple[int, int]]:
    wanted = {os.path.realpath(path) for path in paths}
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[5] in wanted:
                begin, _, end = fields[0].partition("-")
                yield int(begin, 16), int(end, 16)


def drop_pages(paths: Iterable[str]) -> None:
    """Unmaps what has been read so far of the files ``paths``, wherever this process has them mapped (Linux).

    What safetensors has read of a checkpoint counts as this process's memory until the file is closed, so that
    quantizing while loading would hold the whole dense model all the same. The pages are unmodified: whoever looks at
    them again gets them from the file. Only to be called while nothing has written to a tensor read from there.
    """
    if sys.platform != "linux":
        return
    for begin, end in _mappings(paths):
        # A refusal costs memory, nothing else.
        _libc().madvise(begin, end - begin, _MADV_DONTNEED)
