"""Tensors at the edge of mapped memory: a read one byte past their ends, or any write to them, is a fault."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_NO_ACCESS, _M_PERTURB = 0, -6


def _require(done: bool) -> None:
    if not done:
        raise OSError(ctypes.get_errno(), "no memory for a guarded tensor")


@contextlib.contextmanager
def fenced(arguments: Sequence[Any], at_end: bool) -> Iterator[list[Any]]:
    """The arguments with each tensor copied to read-only pages between two inaccessible pages.

    Its last byte is the last before the page that follows or, where not ``at_end``, its first the first behind the
    one before. The copies live as long as the context.
    """
    page = mmap.PAGESIZE
    mapped: list[tuple[int, int]] = []

    def copy(t: Tensor) -> Tensor:
        if t.nbytes == 0:
            return t
        room = -(-t.nbytes // page) * page
        base = _LIBC.mmap(None, room + 2 * page, _NO_ACCESS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        _require(base not in (None, ctypes.c_void_p(-1).value))
        mapped.append((base, room + 2 * page))
        _require(_LIBC.mprotect(base + page, room, mmap.PROT_READ | mmap.PROT_WRITE) == 0)
        address = base + page + (room - t.nbytes if at_end else 0)
        out = torch.frombuffer((ctypes.c_char * t.nbytes).from_address(address), dtype=t.dtype).view(t.shape)
        out.copy_(t)
        _require(_LIBC.mprotect(base + page, room, mmap.PROT_READ) == 0)
        return out

    try:
        yield [copy(a) if isinstance(a, Tensor) else a for a in arguments]
    finally:
        for base, length in mapped:
            _LIBC.munmap(base, length)


def fill_new_memory(byte: int) -> None:
    """Sets the content of new memory from malloc (glibc), so that unwritten outputs are detected."""
    _LIBC.mallopt(_M_PERTURB, byte ^ 0xFF)
