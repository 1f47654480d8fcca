"""The user's cache of compiled decoding: packages ``DIGEST.pt2``, each complete or absent.

A package is made among the system's temporary files, where torch compiles too. What a killed compilation leaves there
is the system's to delete. A kill during the final copy leaves an unfinished file beside the package, for the user to
delete.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator

from qlora_ext.atomic import staged_file


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


@contextlib.contextmanager
def written(package: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path. If the context ends without an exception, the file there becomes ``package``."""
    with tempfile.TemporaryDirectory(prefix="qlora-ext-") as folder:
        path = pathlib.Path(folder) / package.name
        yield path
        with staged_file(package) as staged:
            shutil.copyfile(path, staged)
