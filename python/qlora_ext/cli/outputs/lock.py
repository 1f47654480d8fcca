"""One process at a time in an output directory."""

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
    """Rejects a file with the name of a lock file that qlora-ext did not write: locking would empty and delete it."""
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
            # A holder that ends removes the file: a lock on a file without a name holds nobody off.
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
                print(f"note: the file system of {path} has no locks; let only one process at a time write there",
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
    """Holds the lock of the output directory ``path``, which may not exist yet, in a file beside it (or in it, where it
    is filled from inside).

    The kernel keeps the lock and drops it with its process, however that ends; the file only says whose it is.

    Raises:
        UserError: another process holds it; the text names its pid and host.
    """
    inside = path / LOCK
    with contextlib.ExitStack() as stack:
        if filled_from_inside(path):
            stack.enter_context(_hold(inside, path))
        else:
            stack.enter_context(_hold(path.with_name(f"{LOCK}-{path.name}"), path))
            if os.path.lexists(inside):  # of a user who cannot write beside the directory
                stack.enter_context(_hold(inside, path))
        yield
