"""Directories that are complete or absent under their final name. Only this module deletes directories.
(``compiled_cache`` deletes those of unfinished packages in the user's own cache.)

What is not finished has a name of its own beside the final one: ``.partial-KIND-NAME-TOKEN``. A directory that cannot
be renamed, a mount point or one whose parent cannot be written to, is filled from inside: there NAME is ``.``.
``recover`` finishes or undoes what a kill left under such names.

The rule for every deletion in the package (docs/security.md):

1. A directory with a final name is deleted or replaced only if ``foreign``, a function of the caller's, recognizes
every entry in it as written by the command. The check is repeated after the directory has been set aside.
2. The caller holds the lock of the name (``lock.locked``), for unfinished names too.
3. The caller has checked that the directory neither is, holds nor lies inside an input (``directory.relation``).
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
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from ..._internal import atomic
from ..._internal.atomic import INSIDE, PARTIAL, fsync, unfinished_name
from ..._internal.untrusted import printable
from ..errors import UserError, full, writing

LOCK = f"{PARTIAL}lock"
# Where a calibration waits whose output is filled from inside (waiting.py): beside a mount point nothing can be put.
WAITS_INSIDE = f"{PARTIAL}calibration"
# new: being written. old: complete, set aside for a new one. placing: complete, on its way up into the directory that
# holds it. gone: being deleted.
_UNFINISHED = re.compile(re.escape(PARTIAL) + r"(new|old|placing|gone)-(.+)-([0-9a-f]{8})", re.DOTALL)
# Without these a directory is no model and no run: they leave first and come last.
_ENTRANCES = ("config.json", "settings.json")
_CANNOT_RENAME = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM)

# Of a directory, the name of something in it that the command did not write; None where there is nothing foreign.
Foreign: TypeAlias = Callable[[pathlib.Path], "str | None"]


def _fsync_tree(root: pathlib.Path) -> None:
    """Brings a directory that this process made onto the disk, its files with the mode that the umask gives.

    safetensors lets nobody but the owner read what it writes; the directory's own mode tells the umask.
    """
    mode = stat.S_IMODE(root.stat().st_mode) & 0o666
    for directory, _, names in os.walk(root):
        for name in names:
            fsync(pathlib.Path(directory, name), mode)
        fsync(pathlib.Path(directory))


def filled_from_inside(path: pathlib.Path) -> bool:
    """Whether the directory ``path`` is there and cannot be renamed."""
    return path.is_dir() and (path.is_mount() or not os.access(path.parent, os.W_OK | os.X_OK))


def contents(path: pathlib.Path) -> list[pathlib.Path]:
    """The entries of the directory ``path``, without its own lock and unfinished names and ``lost+found`` of a disk.

    Unfinished names of other directories count: another process may be at work on them.
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
    """The final names of what is unfinished in ``directory``, or was locked there; not ``directory``'s own."""
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
    """The same unfinished name as of another kind."""
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
    """Deletes a directory in or beside ``output`` so that it is never seen half deleted.

    The caller holds the lock of ``output``. What a kill leaves goes with ``recover(output)``.

    Raises:
        UserError: it holds something foreign, and stays as it is.
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


def delete_lock(file: pathlib.Path, descriptor: int) -> None:
    """Deletes the lock file that ``descriptor``, on which this process holds the lock, was opened from."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), file.lstat()):
            file.unlink()


def make_parents(path: pathlib.Path) -> list[pathlib.Path]:
    """Makes the directories above ``path`` that are missing; returns those that this process made, outermost first."""
    made = []
    for parent in reversed([parent for parent in path.parents if not parent.exists()]):
        with contextlib.suppress(FileExistsError):
            parent.mkdir()
            made.append(parent)
    return made


def remove_empty(made: Iterable[pathlib.Path]) -> None:
    """Removes those directories among ``made``, created by this process, that are still empty."""
    with contextlib.suppress(OSError):
        for path in reversed(list(made)):
            path.rmdir()


def move_up(staged: pathlib.Path) -> None:
    """Moves what is in ``staged``, a directory within one that this process fills, to where ``staged`` is."""
    for path in staged.iterdir():
        path.rename(staged.parent / path.name)
    staged.rmdir()


def _move_entries(source: pathlib.Path, target: pathlib.Path) -> None:
    for path in sorted(source.iterdir(), key=lambda path: path.name in _ENTRANCES):
        path.rename(target / path.name)
    fsync(target)


def _finish_placing(placing: pathlib.Path, path: pathlib.Path) -> None:
    _move_entries(placing, path)
    # While ``placing`` is there, what was set aside is not put back: it has to go first.
    for old in _unfinished(path, "old", INSIDE):
        _discard(old)
    placing.rmdir()


def _place_inside(new: pathlib.Path, path: pathlib.Path, foreign: Foreign) -> None:
    """Replaces what the directory ``path`` holds by what ``new``, a directory in it, holds."""
    old, placing = _as("old", new), _as("placing", new)
    try:
        if former := contents(path):
            old.mkdir()
            for entry in sorted(former, key=lambda entry: entry.name not in _ENTRANCES):
                entry.rename(old / entry.name)
            _refuse_foreign(old, path, foreign)
            fsync(old)
        new.rename(placing)
    except BaseException:  # Ctrl-C too
        if old.exists() and not placing.exists():
            _move_entries(old, path)
            old.rmdir()
        raise
    try:
        fsync(path)
        _finish_placing(placing, path)
    except KeyboardInterrupt:
        if placing.exists():
            _finish_placing(placing, path)
        raise


def _place_next_to(new: pathlib.Path, path: pathlib.Path, foreign: Foreign) -> None:
    """Gives the directory ``new`` the name ``path``: what was there is set aside before, and deleted after."""
    old = None
    if path.is_dir():
        shutil.copymode(path, new)
        if any(path.iterdir()):
            old = _as("old", new)
    try:
        if old is not None:
            path.rename(old)
            _refuse_foreign(old, path, foreign)
        new.rename(path)
    except BaseException:  # Ctrl-C too
        if old is not None and old.exists() and not path.exists():
            old.rename(path)
        raise
    fsync(path.parent)
    if old is not None:
        _discard(old)


def _place(new: pathlib.Path, path: pathlib.Path, foreign: Foreign) -> None:
    """Makes the directory ``new`` what is found at ``path``, in place of what was."""
    if new.parent == path:
        _place_inside(new, path, foreign)
        return
    try:
        _place_next_to(new, path, foreign)
    except OSError as error:
        if error.errno not in _CANNOT_RENAME or not path.is_dir() or not new.exists():
            raise
        # A mount of the same file system, or a directory of another user's where only owners rename.
        within = unfinished_name("new", path, inside=True)
        try:
            shutil.move(new, within)
            _fsync_tree(within)
            _place_inside(within, path, foreign)
        finally:
            _delete(within)


@contextlib.contextmanager
def staged_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """``atomic.staged_file``, whose failures are a ``UserError``."""
    with writing(path), atomic.staged_file(path) as partial:
        yield partial


@contextlib.contextmanager
def staged_directory(path: pathlib.Path, foreign: Foreign = nothing_may_be_there) -> Iterator[pathlib.Path]:
    """Yields an empty directory to fill, which then takes the name ``path``, in place of what was there.

    On an error nothing of it is left, and what was there stays.

    Args:
        foreign: what must not be in the directory that is replaced.

    Raises:
        UserError: it cannot be written, or something foreign is in the directory that it would replace.
    """
    partial = unfinished_name("new", path, filled_from_inside(path))
    with writing(path):
        partial.mkdir()
        try:
            yield partial
            _fsync_tree(partial)
            _place(partial, path, foreign)
        finally:
            _delete(partial)


def _unfinished(folder: pathlib.Path, kind: str, name: str) -> list[pathlib.Path]:
    """The unfinished names of a kind in ``folder`` that belong to the final name ``name``."""
    matches = ((path, _UNFINISHED.fullmatch(path.name)) for path in sorted(folder.iterdir()))
    return [path for path, match in matches if match and match[1] == kind and match[2] == name]


def _put_back(old: pathlib.Path, path: pathlib.Path) -> str:
    """Restores the name of a directory that was set aside, unless its successor has the name."""
    directories = all(p.is_dir() and not p.is_symlink() for p in (old, path))
    empty = directories and not any(path.iterdir())
    if empty or not os.path.lexists(path):
        old.rename(path)
        return f"restored {printable(path)}, which an interrupted command had set aside"
    if os.path.lexists(_as("new", old)):  # the successor did not come: somebody else took the name
        free = next(p for n in range(1, 1 << 20) if not os.path.lexists(p := path.with_name(f"{path.name}.former-{n}")))
        old.rename(free)
        return f"saved an earlier directory as {printable(free)}: a command was interrupted while it replaced it"
    _discard(old)
    return f"removed {printable(old)}, which an interrupted command had replaced"


def _recover_in(folder: pathlib.Path, name: str) -> list[str]:
    if not folder.is_dir():
        return []
    notes = []
    for placing in _unfinished(folder, "placing", name):
        _finish_placing(placing, folder)
        notes.append(f"finished replacing {printable(folder)}, which an interrupted command had begun")
    for old in _unfinished(folder, "old", name):
        if name == INSIDE:
            _move_entries(old, folder)
            old.rmdir()
            notes.append(f"restored {printable(folder)}, which an interrupted command had set aside")
        else:
            notes.append(_put_back(old, folder / name))
    for rest in (*_unfinished(folder, "new", name), *_unfinished(folder, "gone", name)):
        _delete(rest)
        done = "could not remove" if os.path.lexists(rest) else "removed"
        notes.append(f"{done} {printable(rest)}, which an interrupted command had left")
    if notes:
        fsync(folder)
    return notes


def recover(path: pathlib.Path) -> list[str]:
    """Cleans up after killed commands that wrote the file or directory ``path``. The caller holds its lock.

    A directory that was set aside is restored if its successor is not in place yet. If moving a complete successor was
    begun, the move is finished. Everything else unfinished under this name is deleted; other names are not touched.
    Returns a sentence for each action.
    """
    with writing(path):
        siblings = [] if filled_from_inside(path) else _recover_in(path.parent, path.name)
        return [*siblings, *_recover_in(path, INSIDE)]


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
                raise UserError(full(path))
        finally:
            os.close(descriptor)


def need_space(path: pathlib.Path, needed: int, what: str) -> None:
    """Refuses to begin what the disk has no room for: ``needed`` bytes below the existing directory ``path``."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise UserError(
            f"the disk that holds {path} is too full for {what}: {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free"
        )
