"""Atomic directories: a directory is complete or absent under its final name. Only this module deletes directories,
other than temporary ones.

Unfinished directories are siblings with the name ``.partial-KIND-NAME-TOKEN``. A directory that cannot be renamed (a
mount point, or one whose parent is not writable) is filled from inside; NAME is then ``.``. ``recover`` finishes or
undoes what was interrupted, be it by a kill, an error or Ctrl-C: every replacement ends with it.

The rules for every deletion in the package (docs/security.md):

1. A directory with a final name is deleted or replaced only if the caller's function ``foreign`` recognizes every entry
   in it as written by the command. The check is repeated after the directory has been set aside.
2. The caller holds the lock of the name (``lock.locked``), also for unfinished names.
3. The caller has checked that the directory does not overlap an input (``directory.relation``).
4. Intermediate results are deleted only after the final result is complete under its final name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from qlora_ext import atomic
from qlora_ext.atomic import INSIDE, PARTIAL, fsync, unfinished_name
from qlora_ext.untrusted import printable

from ..errors import UserError, full, writing

LOCK = f"{PARTIAL}lock"
# The directory of a calibration's intermediate results inside an output that is filled from inside (waiting.py).
WAITS_INSIDE = f"{PARTIAL}calibration"
# new: being written. old: complete, set aside for its successor. placing: complete, being moved up into the directory
# that contains it. gone: being deleted.
_SAVED = "saved an earlier directory"  # how the sentence about it begins
_UNFINISHED = re.compile(re.escape(PARTIAL) + r"(new|old|placing|gone)-(.+)-([0-9a-f]{8})", re.DOTALL)
# The files that make a directory a model, a run or a sweep. They are moved away first and put in place last.
_ENTRY_FILES = ("config.json", "settings.json", "sweep.json")
_CANNOT_RENAME = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM)

# A function that returns the name of an entry in a directory that the command did not write; None if there is none.
Foreign: TypeAlias = Callable[[pathlib.Path], "str | None"]


def _fsync_tree(root: pathlib.Path) -> None:
    """Flushes a directory that this process created to the disk, and sets the modes of its files.

    safetensors makes its files readable by the owner only. The files get the mode of the umask, which is derived from
    the directory's mode.
    """
    mode = stat.S_IMODE(root.stat().st_mode) & 0o666
    for directory, _, names in os.walk(root):
        for name in names:
            fsync(pathlib.Path(directory, name), mode)
        fsync(pathlib.Path(directory))


def filled_from_inside(path: pathlib.Path) -> bool:
    """Whether the directory ``path`` exists and cannot be renamed."""
    return path.is_dir() and (path.is_mount() or not os.access(path.parent, os.W_OK | os.X_OK))


def contents(path: pathlib.Path) -> list[pathlib.Path]:
    """The entries of the directory ``path``, without its own lock, its own unfinished names, and ``lost+found``.

    Unfinished names of other directories are included, because another process may be writing them.
    """

    def own(name: str) -> bool:
        found = _UNFINISHED.fullmatch(name)
        unfinished = found is not None and found[2] in (INSIDE, WAITS_INSIDE)
        return unfinished or name in (LOCK, WAITS_INSIDE) or (name == "lost+found" and path.is_mount())

    return sorted(p for p in path.iterdir() if not own(p.name))


def is_unfinished_name(name: str) -> bool:
    """Whether the name is reserved for unfinished files and directories, or locks."""
    return name.startswith(PARTIAL)


def unfinished_in(directory: pathlib.Path) -> set[str]:
    """The final names of all unfinished or locked entries in ``directory``, without ``directory`` itself."""
    found = set()
    for path in directory.iterdir():
        match = _UNFINISHED.fullmatch(path.name)
        name = match[2] if match else path.name.removeprefix(f"{LOCK}-")
        if name not in (INSIDE, path.name):
            found.add(name)
    return found


def nothing_may_be_there(directory: pathlib.Path) -> str | None:
    """A ``Foreign`` for which every entry is foreign."""
    return next((path.name for path in contents(directory)), None)


def _as(kind: str, temporary: pathlib.Path) -> pathlib.Path:
    """The unfinished name ``temporary`` with another kind."""
    return temporary.with_name(PARTIAL + kind + temporary.name[temporary.name.index("-", len(PARTIAL)) :])


def _delete(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _discard(temporary: pathlib.Path) -> None:
    """Deletes ``temporary``, which is renamed first, so that a half-deleted directory never looks complete."""
    gone = temporary.rename(_as("gone", temporary))
    fsync(gone.parent)
    _delete(gone)


def _refuse_foreign(directory: pathlib.Path, path: pathlib.Path, foreign: Foreign) -> None:
    name = foreign(directory)
    if name is not None:
        raise UserError(f"{path} holds {name!a}, which qlora-ext did not write and does not delete; move it elsewhere")


def delete(path: pathlib.Path, output: pathlib.Path, foreign: Foreign) -> None:
    """Deletes a directory in or next to ``output`` atomically.

    The caller holds the lock of ``output``. ``recover(output)`` finishes a deletion that a kill interrupted.

    Raises:
        UserError: the directory has a foreign entry, and is unchanged.
    """
    _refuse_foreign(path, path, foreign)
    gone = path.rename(unfinished_name("gone", output, path.parent == output))
    try:
        _refuse_foreign(gone, path, foreign)
    except BaseException:
        gone.rename(path)
        raise
    fsync(gone.parent)
    _delete(gone)


@contextlib.contextmanager
def parents_made(path: pathlib.Path) -> Iterator[None]:
    """Creates the missing parents of ``path``. At the end, those that are still empty are removed."""
    made: list[pathlib.Path] = []
    try:
        with writing(path):
            for parent in reversed([parent for parent in path.parents if not parent.exists()]):
                with contextlib.suppress(FileExistsError):
                    parent.mkdir()
                    made.append(parent)
        yield
    finally:
        with contextlib.suppress(OSError):
            for parent in reversed(made):
                parent.rmdir()


def _move_content(directory: pathlib.Path) -> None:
    for path in sorted(directory.iterdir(), key=lambda path: path.name in _ENTRY_FILES):
        path.rename(directory.parent / path.name)
    fsync(directory.parent)


def move_up(directory: pathlib.Path) -> None:
    """Moves the content of ``directory`` to its parent, which this process fills, and removes ``directory``."""
    _move_content(directory)
    directory.rmdir()


def _place_inside(new: pathlib.Path, path: pathlib.Path, foreign: Foreign) -> None:
    """Sets the content of the directory ``path`` aside, and declares its successor ``new``, inside it, complete."""
    if former := contents(path):
        old = _as("old", new)
        old.mkdir()
        for entry in sorted(former, key=lambda entry: entry.name not in _ENTRY_FILES):
            entry.rename(old / entry.name)
        _refuse_foreign(old, path, foreign)
        fsync(old)
    new.rename(_as("placing", new))
    fsync(path)


def _place_next_to(new: pathlib.Path, path: pathlib.Path, foreign: Foreign) -> None:
    """Renames the directory ``new`` to ``path``. An existing directory is set aside before."""
    if path.is_dir():
        shutil.copymode(path, new)
        if any(path.iterdir()):
            old = path.rename(_as("old", new))
            _refuse_foreign(old, path, foreign)
    new.rename(path)
    fsync(path.parent)


def _place(new: pathlib.Path, path: pathlib.Path, foreign: Foreign) -> None:
    """Replaces the directory ``path`` by the directory ``new``, up to what ``recover`` finishes."""
    if new.parent == path:
        _place_inside(new, path, foreign)
        return
    try:
        _place_next_to(new, path, foreign)
    except OSError as error:
        if error.errno not in _CANNOT_RENAME or not path.is_dir() or not new.exists():
            raise
        # A mount of the same file system, or another user's directory in which only owners may rename.
        within = path / f"{PARTIAL}new-{INSIDE}-{new.name[-8:]}"
        shutil.move(new, within)
        _fsync_tree(within)
        _place_inside(within, path, foreign)


@contextlib.contextmanager
def staged_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """``atomic.staged_file`` that raises a ``UserError`` if the file cannot be written."""
    with writing(path), atomic.staged_file(path) as partial:
        yield partial


@contextlib.contextmanager
def staged_directory(path: pathlib.Path, foreign: Foreign = nothing_may_be_there) -> Iterator[pathlib.Path]:
    """Yields an empty directory to fill, which then replaces the directory ``path``.

    On an error it is deleted, and ``path`` is unchanged.

    Args:
        foreign: recognizes entries that must not be in the replaced directory.

    Raises:
        UserError: the directory cannot be written, or the one to replace has a foreign entry.
    """
    partial = unfinished_name("new", path, filled_from_inside(path))
    token = partial.name[-8:]
    with writing(path):
        partial.mkdir()
        try:
            yield partial
            _fsync_tree(partial)
            _place(partial, path, foreign)
            recover(path, token)
        finally:
            for note in recover(path, token):  # undoes after an error, and finishes after Ctrl-C in the line above
                if note.startswith(_SAVED):
                    print(f"note: {note}", file=sys.stderr)


def _put_back(old: pathlib.Path, path: pathlib.Path) -> str:
    """Restores a directory that was set aside, unless its successor is in place."""
    directories = all(p.is_dir() and not p.is_symlink() for p in (old, path))
    empty = directories and not any(path.iterdir())
    if empty or not os.path.lexists(path):
        old.rename(path)
        return f"restored {printable(path)}, which an interrupted command had set aside"
    if os.path.lexists(_as("new", old)):  # the successor is not in place: another program took the name
        free = next(p for n in range(1, 1 << 20) if not os.path.lexists(p := path.with_name(f"{path.name}.former-{n}")))
        old.rename(free)
        return f"{_SAVED} as {printable(free)}: a command was interrupted while it replaced it"
    _discard(old)
    return f"removed {printable(old)}, which an interrupted command had replaced"


def _recover_in(folder: pathlib.Path, name: str, token: str) -> list[str]:
    unfinished: dict[str, list[pathlib.Path]] = {kind: [] for kind in ("placing", "old", "new", "gone")}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _UNFINISHED.fullmatch(path.name)
        if match and match[2] == name and match[3].endswith(token):
            unfinished[match[1]].append(path)
    notes = []
    for placing in unfinished["placing"]:
        _move_content(placing)
        # The old content is deleted before ``placing``, whose existence prevents that it is restored.
        while unfinished["old"]:
            _discard(unfinished["old"].pop())
        placing.rmdir()
        notes.append(f"finished replacing {printable(folder)}, which an interrupted command had begun")
    for old in unfinished["old"]:
        if name == INSIDE:
            move_up(old)
            notes.append(f"restored {printable(folder)}, which an interrupted command had set aside")
        else:
            notes.append(_put_back(old, folder / name))
    for rest in (*unfinished["new"], *unfinished["gone"]):
        _delete(rest)
        done = "could not remove" if os.path.lexists(rest) else "removed"
        notes.append(f"{done} {printable(rest)}, which an interrupted command had left")
    if notes:
        fsync(folder)
    return notes


def recover(path: pathlib.Path, token: str = "") -> list[str]:
    """Cleans up after killed commands that wrote the file or directory ``path``. The caller holds its lock.

    A directory that was set aside is restored unless its successor is in place. If moving a complete successor had
    begun, the move is finished. All other unfinished entries of this name are deleted. Other names are not touched.

    Args:
        token: the end of the unfinished names of one operation; that of all if empty.

    Returns:
        One sentence per action.
    """
    with writing(path):
        siblings = [] if filled_from_inside(path) else _recover_in(path.parent, path.name, token)
        return [*siblings, *_recover_in(path, INSIDE, token)]


def write_text(path: pathlib.Path, text: str) -> None:
    with staged_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: pathlib.Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_json_lines(path: pathlib.Path, records: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def append_json_line(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Appends one line to ``path`` in a single write, which is undone if the disk is full."""
    line = (json.dumps(record) + "\n").encode()
    with writing(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if os.write(descriptor, line) != len(line):
                os.ftruncate(descriptor, size)
                raise UserError(full(path))
        finally:
            os.close(descriptor)


def need_space(path: pathlib.Path, needed: int, what: str) -> None:
    """Raises a UserError unless the disk has ``needed`` free bytes below the existing directory ``path``."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise UserError(
            f"the disk that holds {path} is too full for {what}: {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free"
        )
