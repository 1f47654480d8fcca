"""Atomic writes: a file appears under its final name complete or not at all, even if the process is killed.

No other module of the library renames or deletes a file (``tests/project/test_deletions.py`` lists every such module).
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator

# Unfinished files and directories are siblings of the final ones; their names begin with this.
PARTIAL = ".partial-"
INSIDE = "."  # replaces the final name if the unfinished directory is inside the final one


def unfinished_name(kind: str, path: pathlib.Path, inside: bool = False) -> pathlib.Path:
    """A new, unpredictable name ``.partial-KIND-NAME-TOKEN`` next to ``path``, or (``inside``) in it."""
    folder, name = (path, INSIDE) if inside else (path.parent, path.name)
    return folder / f"{PARTIAL}{kind}-{name}-{secrets.token_hex(4)}"


def fsync(path: pathlib.Path, mode: int | None = None) -> None:
    """Flushes a file or directory to the disk and sets its ``mode``. Links are not followed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        if mode is not None:
            os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the path of an empty file. On success it replaces the file ``path``; on an error it is deleted.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> with staged_file(pathlib.Path("record.json")) as partial:
        ...     partial.write_text("{}")
    """
    partial = unfinished_name("new", path)
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
    try:
        yield partial
        move_file(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def move_file(source: pathlib.Path, path: pathlib.Path) -> None:
    """Renames a complete file to ``path``, after flushing its content to the disk."""
    fsync(source)
    source.replace(path)
    fsync(path.parent)
