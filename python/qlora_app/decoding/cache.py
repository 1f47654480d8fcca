"""The user's cache of compiled decoding: packages ``DIGEST.pt2``, each complete or absent.

A package is compiled in a sibling directory ``compiling-TOKEN``, which the process keeps locked. It gets its final name
after it has been flushed to the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import re
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator

from qlora_ext.atomic import move_file

# Earlier versions used the name tmpTOKEN.
_UNFINISHED = re.compile(r"(compiling-|tmp)[a-z0-9_]{8}")
_PACKAGE = re.compile(r"[0-9a-f]{64}\.pt2")


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


def _locked(folder: pathlib.Path, wait: bool = False) -> int | None:
    """Locks ``folder``. Returns the descriptor that holds the lock, or None if that failed.

    It fails if the folder is missing, if the file system has no locks, or if another process holds the lock.

    Args:
        wait: wait for another process that holds the lock.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(descriptor), folder.lstat()):
            return descriptor
    except OSError:  # another process holds the lock, or the file system has no locks
        pass
    os.close(descriptor)
    return None


def _is_ours(folder: pathlib.Path) -> bool:
    """Whether the name and the content of ``folder`` show that a package was compiled in it."""
    if not _UNFINISHED.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
        return False
    return all(_PACKAGE.fullmatch(p.name) and p.is_file() and not p.is_symlink() for p in folder.iterdir())


def clean(cache: pathlib.Path) -> None:
    """Deletes the directories of killed compilations in ``cache``, a path from ``directory()``."""
    for folder in cache.iterdir():
        descriptor = _locked(folder) if _is_ours(folder) else None
        if descriptor is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


@contextlib.contextmanager
def written(package: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path. If the context ends without an exception, the file there is renamed to ``package``."""
    descriptor = None
    while descriptor is None:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="compiling-", dir=package.parent))
        descriptor = _locked(folder, wait=True)  # None if another process has just cleaned up the folder
        if descriptor is None and folder.is_dir():  # the file system has no locks, so no process cleans up
            break
    try:
        path = folder / package.name
        yield path
        move_file(path, package)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)
