"""The user's cache of compiled decoding: packages ``DIGEST.pt2``, each complete or absent.

A package is compiled as ``compiling-TOKEN.pt2``, which the process keeps locked, and gets its final name after it has
been flushed to the disk.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import secrets
import stat
import zipfile
from collections.abc import Iterator

from qlora_ext.atomic import move_file

from ..errors import UserError
from ..outputs.files import unfinished_in
from ..outputs.lock import locked

_UNFINISHED = re.compile(r"compiling-[0-9a-f]{8}\.pt2")


def directory() -> pathlib.Path:
    """The directory of the packages, which this user owns and only this user can write to.

    Raises:
        OSError: the directory cannot be created, or others own it or can write to it.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    path = (pathlib.Path(home) if home else pathlib.Path.home() / ".cache") / "qlora_ext" / "compiled"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if hasattr(os, "geteuid") and (found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise PermissionError(f"{path}: others can write to this directory, so code in it is not run")
    return path


def is_complete(package: pathlib.Path) -> bool:
    """Whether ``package`` is an undamaged archive."""
    if not package.is_file():  # opening a FIFO would wait for a writer
        return False
    try:
        with zipfile.ZipFile(package) as archive:
            return bool(archive.namelist()) and archive.testzip() is None
    except Exception:  # zipfile raises many kinds of errors for damaged files
        return False


def clean(cache: pathlib.Path) -> None:
    """Deletes what killed compilations left in ``cache``, a path from ``directory()``."""
    for name in unfinished_in(cache):
        if _UNFINISHED.fullmatch(name):
            with contextlib.suppress(UserError), locked(cache / name):
                (cache / name).unlink(missing_ok=True)


@contextlib.contextmanager
def written(package: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path. If the context ends without an exception, the file there is renamed to ``package``."""
    unfinished = package.with_name(f"compiling-{secrets.token_hex(4)}.pt2")
    with locked(unfinished):
        try:
            yield unfinished
            move_file(unfinished, package)
        finally:
            unfinished.unlink(missing_ok=True)
