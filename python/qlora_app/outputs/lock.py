"""Locks that admit one process at a time to an output directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import re
import socket
import stat
import sys
from collections.abc import Iterator

from ..errors import UserError, writing
from .files import LOCK, delete_lock, filled_from_inside

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


_HOLDER = re.compile(rb"(\d+) ([\w.-]+)\n")


def _holder(descriptor: int) -> str:
    found = _HOLDER.fullmatch(os.pread(descriptor, 512, 0))
    return f"process {int(found[1])} on {found[2].decode()}" if found else "another process"


def _check_lock_file(descriptor: int, file: pathlib.Path) -> None:
    """Rejects a file with the name of a lock file that qlora-ext did not write, because it would be deleted."""
    status = os.fstat(descriptor)
    content = os.pread(descriptor, 512, 0) if stat.S_ISREG(status.st_mode) else b"?"
    if content and not _HOLDER.fullmatch(content):
        raise UserError(f"{file}: expected a lock file of qlora-ext, got another file; move it elsewhere")


def _acquire(file: pathlib.Path, path: pathlib.Path) -> int:
    while True:
        with writing(file):
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            _check_lock_file(descriptor, file)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder deletes the file when it ends. A lock on a deleted file excludes nobody.
            if os.path.samestat(os.fstat(descriptor), file.lstat()):
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(f"--output {path}: {holder} is writing there; wait until it ends, or name another "
                            "directory") from None  # fmt: skip
        except OSError as error:
            if error.errno in _NO_LOCKS:
                print(f"note: the file system of {path} has no locks; do not write there from two processes at once",
                      file=sys.stderr)  # fmt: skip
                return descriptor
            os.close(descriptor)
            raise UserError(f"cannot lock {file}: {error.strerror}") from error
        except UserError:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextlib.contextmanager
def _hold(file: pathlib.Path, path: pathlib.Path) -> Iterator[None]:
    descriptor = _acquire(file, path)
    try:
        with writing(file):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        delete_lock(file, descriptor)
        os.close(descriptor)


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
