"""What goes wrong on a user's side, as one sentence each."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """A mistake in what was asked for, or a machine that cannot do it: its text is all that the user has to read."""


def first_line(error: BaseException) -> str:
    """The message of an exception without the lines that follow the first, and with its type if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".:") if lines else type(error).__name__


def _is_full(directory: pathlib.Path) -> bool:
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free < 1 << 20


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a failure to write below ``path`` into a ``UserError``, whatever library met it.

    torch reports a full disk as a RuntimeError and safetensors as an error class of its own, both without an errno.
    """
    path = pathlib.Path(path)
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise UserError(f"the disk that holds {path} is full; nothing incomplete was left there") from error
        reason = error.strerror or first_line(error)
        raise UserError(f"cannot write {path}: {reason}") from error
    except Exception as error:
        # The two libraries' errors carry no type to catch without importing them; others are not ours to explain.
        if "PytorchStreamWriter" not in str(error) and type(error).__name__ != "SafetensorError":
            raise
        if _is_full(path) or "No space left" in str(error):
            raise UserError(f"the disk that holds {path} is full; nothing incomplete was left there") from error
        raise UserError(f"cannot write {path}: {first_line(error)}") from error
