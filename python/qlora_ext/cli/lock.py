"""One process at a time in an output directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import re
import socket
import sys
from collections.abc import Iterator

from .errors import UserError, writing
from .files import LOCK, filled_from_inside

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def _holder(descriptor: int) -> str:
    found = re.fullmatch(rb"(\d+) ([\w.-]+)\n", os.pread(descriptor, 512, 0))
    return f"process {int(found[1])} on {found[2].decode()}" if found else "another process"


def _acquire(file: pathlib.Path, path: pathlib.Path) -> int:
    while True:
        with writing(file):
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A holder that ends removes the file: a lock on a file without a name holds nobody off.
            if os.path.samestat(os.fstat(descriptor), file.lstat()):
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(f"--output {path}: {holder} is at work there; wait until it has ended, or name another "
                            "directory") from None  # fmt: skip
        except OSError as error:
            if error.errno in _NO_LOCKS:
                print(f"note: the file system of {path} knows no locks; let one process at a time write there",
                      file=sys.stderr)  # fmt: skip
                return descriptor
            os.close(descriptor)
            raise UserError(f"cannot lock {file}: {error.strerror}") from error
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Holds the lock of the output directory ``path``, which may not exist yet, in a file beside it (or in it, where it
    is filled from inside).

    The kernel keeps the lock and drops it with its process, however that ends; the file only says whose it is.

    Raises:
        UserError: another process holds it; the text names its pid and host.
    """
    file = path / LOCK if filled_from_inside(path) else path.with_name(f"{LOCK}-{path.name}")
    descriptor = _acquire(file, path)
    try:
        with writing(file):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)
