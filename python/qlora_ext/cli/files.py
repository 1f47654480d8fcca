"""Files that are either whole or absent under their final name, whenever the process is killed."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from .errors import UserError, writing

# Names of what is not finished begin with this; nothing ever reads them.
PARTIAL = ".partial-"


def _fsync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(root: pathlib.Path) -> None:
    for directory, _, names in os.walk(root):
        for name in names:
            _fsync(pathlib.Path(directory, name))
        _fsync(pathlib.Path(directory))


def remove(path: pathlib.Path) -> None:
    """Deletes a directory so that it is never seen half deleted."""
    if path.is_dir():
        doomed = path.with_name(f"{PARTIAL}removed-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


@contextlib.contextmanager
def staged_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path to write a file to, which then takes the name ``path``; on an error nothing is left."""
    partial = path.with_name(PARTIAL + path.name)
    try:
        with writing(path):
            yield partial
            _fsync(partial)
            partial.replace(path)
            _fsync(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


@contextlib.contextmanager
def staged_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields an empty directory to fill, which then takes the name ``path``; on an error nothing is left."""
    partial = path.with_name(PARTIAL + path.name)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(path):
            partial.mkdir(parents=True)
            yield partial
            _fsync_tree(partial)
            remove(path)
            partial.rename(path)
            _fsync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: pathlib.Path, value: Any) -> None:
    with staged_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_json_lines(path: pathlib.Path, records: list[dict[str, Any]]) -> None:
    with staged_file(path) as partial:
        partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def append_json_line(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Adds one line to ``path``, or leaves it as it was: the line is one write, taken back if the disk is full."""
    line = (json.dumps(record) + "\n").encode()
    with writing(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if os.write(descriptor, line) != len(line):
                os.ftruncate(descriptor, size)
                raise UserError(f"the disk that holds {path} is full; nothing incomplete was left there")
        finally:
            os.close(descriptor)


def new_directory(path: pathlib.Path, overwrite: bool) -> None:
    """Checks that ``path`` can become a new directory of results.

    Raises:
        UserError: something is there already (and ``overwrite`` is false), or the place cannot be written to.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {path}: a file of that name exists; name a directory")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"--output {path} exists and is not empty; name another directory, or add --overwrite")
    place = path
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"--output {path}: no permission to write there")


def need_space(path: pathlib.Path, needed: int, what: str) -> None:
    """Refuses to begin what the disk has no room for: ``needed`` bytes below the existing directory ``path``."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise UserError(
            f"the disk that holds {path} is too full for {what}: {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free"
        )
