"""Files appear under their final name complete or not at all, even if the process is killed.

``cli/outputs/files.py`` does the same for directories. No other module of the package renames or deletes a file
(``tests/project/test_deletions.py`` lists every such call).
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator

# Unfinished files and directories have names that begin with this, beside their final name.
PARTIAL = ".partial-"
INSIDE = "."  # stands for the final name where the unfinished one lies inside the directory it belongs to


def unfinished_name(kind: str, path: pathlib.Path, inside: bool = False) -> pathlib.Path:
    """A new, unpredictable name ``.partial-KIND-NAME-TOKEN`` beside ``path``, or (``inside``) in it."""
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
    """Yields an empty file, which replaces the file ``path`` at the end of the context. An error deletes it.

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
    """Gives a complete file that this process wrote the name ``path``, once its content is on the disk."""
    fsync(source)
    source.replace(path)
    fsync(path.parent)
