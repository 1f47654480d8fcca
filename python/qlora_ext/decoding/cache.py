"""The user's cache of compiled decoding: packages ``DIGEST.pt2``, each complete or absent.

A package is compiled in a directory ``compiling-TOKEN`` beside it, which the process locks while it runs. The package
gets its final name once it is on the disk.
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

from .._internal.atomic import move_file

# Earlier versions called them tmpTOKEN.
_UNFINISHED = re.compile(r"(compiling-|tmp)[a-z0-9_]{8}")
_PACKAGE = re.compile(r"[0-9a-f]{64}\.pt2")


def directory() -> pathlib.Path:
    """Where packages are kept: a directory that this user owns and nobody else can write to.

    Raises:
        OSError: there is no such directory.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    path = (pathlib.Path(home) if home else pathlib.Path.home() / ".cache") / "qlora_ext" / "compiled"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if hasattr(os, "geteuid") and (found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise PermissionError(f"{path}: others can write to this directory, so code in it is not run")
    return path


def is_whole(package: pathlib.Path) -> bool:
    """Whether ``package`` is a file that holds everything that was packed into it."""
    if not package.is_file():  # opening a FIFO would wait for a writer
        return False
    try:
        with zipfile.ZipFile(package) as archive:
            return bool(archive.namelist()) and archive.testzip() is None
    except Exception:  # zipfile has an error for every kind of damage
        return False


def _locked(folder: pathlib.Path, wait: bool = False) -> int | None:
    """A descriptor that holds the lock of ``folder``; None if the folder is gone or locks are not available.

    Args:
        wait: wait for another process that holds the lock, instead of returning None.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(descriptor), folder.lstat()):
            return descriptor
    except OSError:  # held; or the file system has no locks, and nothing is known about it
        pass
    os.close(descriptor)
    return None


def _is_ours(folder: pathlib.Path) -> bool:
    """Whether ``folder`` is one in which a package was compiled: by its name, and by all that it holds."""
    if not _UNFINISHED.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
        return False
    return all(_PACKAGE.fullmatch(p.name) and p.is_file() and not p.is_symlink() for p in folder.iterdir())


def clean(cache: pathlib.Path) -> None:
    """Deletes what killed compilations have left in ``cache``, a path from ``directory()``."""
    for folder in cache.iterdir():
        descriptor = _locked(folder) if _is_ours(folder) else None
        if descriptor is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


@contextlib.contextmanager
def written(package: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write ``package`` to, which takes its name when the context ends without an exception."""
    descriptor = None
    while descriptor is None:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="compiling-", dir=package.parent))
        descriptor = _locked(folder, wait=True)  # or another process has just taken it for one that was left
        if descriptor is None and folder.is_dir():  # this file system has no locks, and so nobody cleans up
            break
    try:
        path = folder / package.name
        yield path
        move_file(path, package)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)
