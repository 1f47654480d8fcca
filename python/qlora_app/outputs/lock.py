"""Locks that admit one process at a time to an output directory."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import socket
import stat
import sys
from collections.abc import Iterator

from ..errors import UserError, writing
from .files import LOCK, filled_from_inside

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_HOLDER = re.compile(rb"(\d+) ([\w.-]+)\n")


def _content(file: pathlib.Path) -> bytes:
    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            return b"?"
        with file.open("rb") as opened:
            return opened.read(512)
    except FileNotFoundError:
        return b""


def _signature() -> bytes:
    return f"{os.getpid()} {socket.gethostname()}\n".encode()


def _sign(file: pathlib.Path) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW)
    try:
        os.write(descriptor, _signature())
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _hold(file: pathlib.Path, path: pathlib.Path) -> Iterator[None]:
    from filelock import FileLock, Timeout  # here, because it takes long to import

    with writing(file):
        content = _content(file)
    if content and not _HOLDER.fullmatch(content):  # it would be overwritten and deleted
        raise UserError(f"{file}: expected a lock file of qlora-ext, got another file; move it elsewhere")
    lock = FileLock(file, timeout=0, fallback_to_soft=False)
    try:
        try:
            lock.acquire()
        except Timeout:
            if _content(file):
                raise
            lock.acquire()  # a process that ended just now had it
    except Timeout:
        found = _HOLDER.fullmatch(_content(file))
        holder = f"process {int(found[1])} on {found[2].decode()}" if found else "another process"
        raise UserError(f"--output {path}: {holder} is writing there; wait until it ends, or name another "
                        "directory") from None  # fmt: skip
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            with writing(file):
                raise
        print(f"note: the file system of {path} has no locks; do not write there from two processes at once",
              file=sys.stderr)  # fmt: skip
    try:
        if lock.is_locked:
            with writing(file):
                _sign(file)
        yield
    finally:
        # The file is deleted before the lock is released, so that no process holds the lock of a deleted file.
        if _content(file) in (b"", _signature()):
            file.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Holds the lock of the output directory ``path``, which need not exist.

    The lock file is next to the directory, or inside it if the directory is filled from inside. The kernel releases the
    lock when the process ends in any way; the file only names the holder.

    Raises:
        UserError: another process holds the lock; the message names its pid and host.
    """
    inside = path / LOCK
    with contextlib.ExitStack() as stack:
        if filled_from_inside(path):
            stack.enter_context(_hold(inside, path))
        else:
            stack.enter_context(_hold(path.with_name(f"{LOCK}-{path.name}"), path))
            if os.path.lexists(inside):  # of a user who cannot write to the parent directory
                stack.enter_context(_hold(inside, path))
        yield
