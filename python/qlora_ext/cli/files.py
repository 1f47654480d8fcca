"""Files and directories that are either whole or absent under their final name, whenever the process is killed.

What is not finished has a name of its own beside the final one: ``.partial-KIND-NAME-TOKEN``. A directory that cannot
be renamed, a mount point or one whose parent cannot be written to, is filled from inside: there NAME is ``.``.
``recover`` finishes or undoes what a kill left under such names.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from typing import Any

from .._outside import printable
from .errors import UserError, writing

# Names of what is not finished begin with this; nothing but ``recover`` ever reads them.
PARTIAL = ".partial-"
LOCK = f"{PARTIAL}lock"
# new: being written. old: whole, set aside for a new one. placing: whole, on its way up into the directory that holds
# it. gone: being deleted.
_TEMPORARY = re.compile(re.escape(PARTIAL) + r"(new|old|placing|gone)-(.+)-[0-9a-f]{8}", re.DOTALL)
_INSIDE = "."
# Without these a directory is no model and no run: they leave first and come last.
_ENTRANCES = ("config.json", "settings.json")
_CANNOT_RENAME = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM)


def _fsync(path: pathlib.Path, mode: int | None = None) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        if mode is not None:
            os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(root: pathlib.Path) -> None:
    """Brings a directory that this process made onto the disk, its files with the mode that the umask gives.

    safetensors lets nobody but the owner read what it writes; the directory's own mode tells the umask.
    """
    mode = stat.S_IMODE(root.stat().st_mode) & 0o666
    for directory, _, names in os.walk(root):
        for name in names:
            _fsync(pathlib.Path(directory, name), mode)
        _fsync(pathlib.Path(directory))


def filled_from_inside(path: pathlib.Path) -> bool:
    """Whether the directory ``path`` is there and cannot be renamed."""
    return path.is_dir() and (path.is_mount() or not os.access(path.parent, os.W_OK | os.X_OK))


def contents(path: pathlib.Path) -> list[pathlib.Path]:
    """What lies in the directory ``path`` but for our unfinished names, our lock and a file system's ``lost+found``."""
    found = (p for p in path.iterdir() if p.name != LOCK and not _TEMPORARY.fullmatch(p.name))
    return sorted(p for p in found if p.name != "lost+found" or not path.is_mount())


def _temporary(kind: str, path: pathlib.Path, inside: bool = False) -> pathlib.Path:
    """A new name that nobody can foresee."""
    folder, name = (path, _INSIDE) if inside else (path.parent, path.name)
    return folder / f"{PARTIAL}{kind}-{name}-{secrets.token_hex(4)}"


def _as(kind: str, temporary: pathlib.Path) -> pathlib.Path:
    """The same unfinished name as of another kind."""
    return temporary.with_name(PARTIAL + kind + temporary.name[temporary.name.index("-", len(PARTIAL)) :])


def _delete(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _discard(temporary: pathlib.Path) -> None:
    """Deletes what is needed no more. From the renaming on it is never taken for something whole."""
    gone = temporary.rename(_as("gone", temporary))
    _fsync(gone.parent)
    _delete(gone)


def remove(path: pathlib.Path, output: pathlib.Path) -> None:
    """Deletes a directory in or beside ``output`` so that it is never seen half deleted.

    What a kill leaves of it goes with ``recover(output)``.
    """
    gone = path.rename(_temporary("gone", output, path.parent == output))
    _fsync(gone.parent)
    _delete(gone)


def _move_entries(source: pathlib.Path, target: pathlib.Path) -> None:
    for path in sorted(source.iterdir(), key=lambda path: path.name in _ENTRANCES):
        path.rename(target / path.name)
    _fsync(target)


def _finish_placing(placing: pathlib.Path, path: pathlib.Path) -> None:
    _move_entries(placing, path)
    # While ``placing`` is there, what was set aside is not put back: it has to go first.
    for old in _temporaries(path, "old", _INSIDE):
        _discard(old)
    placing.rmdir()


def _place_inside(new: pathlib.Path, path: pathlib.Path) -> None:
    """Replaces what the directory ``path`` holds by what ``new``, a directory in it, holds."""
    former = contents(path)
    if former:
        old = _as("old", new)
        old.mkdir()
        try:
            for entry in sorted(former, key=lambda entry: entry.name not in _ENTRANCES):
                entry.rename(old / entry.name)
        except OSError:
            _move_entries(old, path)
            old.rmdir()
            raise
        _fsync(old)
    placing = new.rename(_as("placing", new))
    _fsync(path)
    _finish_placing(placing, path)


def _place_beside(new: pathlib.Path, path: pathlib.Path) -> None:
    """Gives the directory ``new`` the name ``path``: what was there is set aside before, and deleted after."""
    old = None
    if path.is_dir():
        shutil.copymode(path, new)
        if any(path.iterdir()):
            old = path.rename(_as("old", new))
    try:
        new.rename(path)
    except OSError:
        if old is not None:
            old.rename(path)
        raise
    _fsync(path.parent)
    if old is not None:
        _discard(old)


def _place(new: pathlib.Path, path: pathlib.Path) -> None:
    """Makes the directory ``new`` what is found at ``path``, in place of what was."""
    if new.parent == path:
        _place_inside(new, path)
        return
    try:
        _place_beside(new, path)
    except OSError as error:
        if error.errno not in _CANNOT_RENAME or not path.is_dir() or not new.exists():
            raise
        # A mount of the same file system, or a directory of another user's where only owners rename.
        within = _temporary("new", path, inside=True)
        try:
            shutil.move(new, within)
            _fsync_tree(within)
            _place_inside(within, path)
        finally:
            _delete(within)


@contextlib.contextmanager
def staged_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields an empty file to write to, which then takes the name ``path``; on an error nothing is left."""
    partial = _temporary("new", path)
    try:
        with writing(path):
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
            yield partial
            _fsync(partial)
            partial.replace(path)
            _fsync(path.parent)
    finally:
        _delete(partial)


@contextlib.contextmanager
def staged_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields an empty directory to fill, which then takes the name ``path``, in place of what was there.

    On an error nothing of it is left, and what was there stays.
    """
    partial = _temporary("new", path, filled_from_inside(path))
    try:
        with writing(path):
            partial.mkdir()
            yield partial
            _fsync_tree(partial)
            _place(partial, path)
    finally:
        _delete(partial)


def _temporaries(folder: pathlib.Path, kind: str, name: str | None) -> list[pathlib.Path]:
    """The unfinished names of a kind in ``folder``, of one final name or (None) of all."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(path.name)
        if match and match[1] == kind and name in (None, match[2]):
            found.append(path)
    return found


def _recover_in(folder: pathlib.Path, name: str | None) -> list[str]:
    told = []
    for placing in _temporaries(folder, "placing", name):
        _finish_placing(placing, folder)
        told.append(f"finished replacing {printable(folder)}, in which a command was stopped")
    for old in _temporaries(folder, "old", name):
        final = _TEMPORARY.fullmatch(old.name)[2]  # type: ignore[index]
        if final == _INSIDE:
            _move_entries(old, folder)
            old.rmdir()
            told.append(f"put back {printable(folder)}, which a command that was stopped had set aside")
        elif not (folder / final).exists():
            old.rename(folder / final)
            told.append(f"put back {printable(folder / final)}, which a command that was stopped had set aside")
        else:
            _discard(old)
            told.append(f"removed {printable(old)}, which a command that was stopped had replaced")
    for rest in (*_temporaries(folder, "new", name), *_temporaries(folder, "gone", name)):
        _delete(rest)
        told.append(f"removed {printable(rest)}, which a command that was stopped had left")
    if told:
        _fsync(folder)
    return told


def recover(path: pathlib.Path) -> list[str]:
    """Cleans up what killed commands left of the directory ``path`` and in it, of which the caller holds the lock.

    What was set aside comes back where its successor was not yet in place; a whole successor is put in its place where
    that was begun; the rest goes. Returns a sentence for each.
    """
    with writing(path):
        beside = [] if filled_from_inside(path) else _recover_in(path.parent, path.name)
        return [*beside, *_recover_in(path, None)]


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
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if os.write(descriptor, line) != len(line):
                os.ftruncate(descriptor, size)
                raise UserError(f"the disk that holds {path} is full; nothing incomplete was left there")
        finally:
            os.close(descriptor)


def need_space(path: pathlib.Path, needed: int, what: str) -> None:
    """Refuses to begin what the disk has no room for: ``needed`` bytes below the existing directory ``path``."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise UserError(
            f"the disk that holds {path} is too full for {what}: {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free"
        )
