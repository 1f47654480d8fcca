"""What may be an output directory, and what ``--overwrite`` may replace: nothing but what the command wrote itself."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from ..errors import UserError, check_text, first_line, path_named, writing
from .files import (
    contents,
    filled_from_inside,
    is_unfinished_name,
    make_parents,
    nothing_may_be_there,
    recover,
    remove_empty,
    staged_directory,
    unfinished_in,
    write_json,
)
from .lock import locked
from .ownership import MARKER, WAITING, foreign_in_run, foreign_to, is_ours, may_be_unfinished_in_run
from .ownership import read_marker as read_marker


def _resolved(name: str) -> pathlib.Path:
    if not name.strip():
        raise UserError("--output: expected the name of a directory, got an empty name")
    try:
        path = pathlib.Path(name).expanduser().resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # here says so a name that is too long, or a circle of links, which Python 3.13 resolves
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise UserError(f"--output {name[:80]!r}: not a valid name of a directory ({reason})") from error
    check_text(path, "--output")
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {path}: a file of that name exists; name a directory")
    return path


def _identity(path: pathlib.Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _trail(path: pathlib.Path, seen: set[pathlib.Path]) -> None:
    """Adds to ``seen`` all that lies on the way to ``path``: what is above it, and the same of where its links lead."""
    for part in (*reversed(path.parents), path):
        if part not in seen:
            seen.add(part)
            with contextlib.suppress(OSError):
                _trail(part.parent / part.readlink(), seen)


def _on_the_way(path: pathlib.Path) -> set[tuple[int, int] | None]:
    seen: set[pathlib.Path] = set()
    _trail(path.absolute(), seen)
    _trail(path.resolve(), seen)
    if path.is_dir():
        for entry in path.iterdir():
            if entry.is_symlink():
                _trail(entry.absolute(), seen)
    return {_identity(p) for p in seen} - {None}


def relation(path: pathlib.Path, option: str, name: str) -> Literal["is or holds", "lies inside"] | None:
    """How the directory ``path`` overlaps the input ``name`` of ``option``, with links resolved; None: they do not
    overlap.

    Raises:
        UserError: the paths cannot be compared.
    """
    try:
        source = pathlib.Path(name).expanduser()
        if not source.exists():
            return None  # a name on the hub, or a package's
        if _identity(path) in _on_the_way(source):
            return "is or holds"
        return "lies inside" if _identity(source) in {_identity(p) for p in (path, *path.parents)} else None
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{option} {name}: {first_line(error)}") from error


def _check_input(path: pathlib.Path, option: str, name: str) -> None:
    found = relation(path, option, name)
    if found is not None:
        end = "which --overwrite would delete" if found == "is or holds" else "in which --overwrite deletes nothing"
        raise UserError(f"--output {path} {found} {option} {name}, {end}; name another --output")


def output_file(option: str, name: str, mark: str, inputs: Sequence[tuple[str, str | None]]) -> pathlib.Path:
    """The file that ``option`` names. The command writes it at its end and may replace an earlier one of its own.

    Args:
        mark: text near the beginning of every such file. inputs: options and the paths they read.

    Raises:
        UserError: there is no such directory, or the file is there and is an input, part of one, or has no ``mark``.
    """
    path = path_named(name, option).absolute()
    if not path.parent.is_dir():
        raise UserError(f"{option} {name}: there is no directory {path.parent}")
    if not os.path.lexists(path):
        return path
    for source, read in inputs:
        if read and relation(path, source, read) is not None:
            raise UserError(
                f"{option} {name} is a file of {source} {read}, which this command does not replace; name another file"
            )
    beginning = b""
    if path.is_file() and not path.is_symlink():
        with path.open("rb") as file:
            beginning = file.read(4096)
    if mark.encode() not in beginning:
        raise UserError(
            f"{option} {name}: the file exists and this command did not write it; name another file, or delete it"
        )
    return path


def _foreign(directory: pathlib.Path) -> str | None:
    """The first entry of a directory with a marker that the command named in the marker did not write.

    Raises:
        UserError: the marker is damaged, or is not that of a finished output.
    """
    marker = read_marker(directory)
    if marker.get("command") == "finetune":
        return foreign_in_run(directory)
    if "files" not in marker or "waiting" in marker:
        raise UserError(f"{MARKER} is damaged, or belongs to an unfinished output")
    return foreign_to([*marker["files"], MARKER])(directory)


def _check_ours(path: pathlib.Path) -> None:
    """Refuses a directory in which there is anything that the command did not write."""
    advice = "--overwrite does not delete it; name another directory, or delete it yourself"
    if not (path / MARKER).is_file():
        raise UserError(f"--output {path}: not written by qlora-ext (it has no {MARKER}); {advice}")
    try:
        foreign = _foreign(path)
    except UserError as error:
        raise UserError(f"--output {path}: {error}; {advice}") from error
    if foreign is not None:
        raise UserError(
            f"--output {path}: --overwrite would also delete {foreign!a}, which qlora-ext did not write; "
            "move it elsewhere, or name another directory"
        )


def _check_place(path: pathlib.Path) -> None:
    for what, name in (("working", "."), ("home", "~")):
        try:
            place = pathlib.Path(os.path.realpath(os.path.expanduser(name)))
        except FileNotFoundError:
            continue  # a working directory that somebody deleted
        if path.exists() and _identity(path) in {_identity(p) for p in (place, *place.parents)}:
            raise UserError(f"--output {path} is the {what} directory or contains it; name a separate directory")


class Output:
    """A directory that ``--output`` names, this process's alone; it may not exist yet.

    Attributes:
        path: absolute, links followed.
        overwrite: whether an earlier output of the command may be replaced.
        begun: whether what was computed is complete, and being written.
    """

    def __init__(self, path: pathlib.Path, overwrite: bool) -> None:
        self.path = path
        self.begun = False
        self.overwrite = overwrite
        self.inputs: list[tuple[str, str]] = []

    def protect(self, option: str, *names: str | None) -> None:
        """Notes that ``option`` reads the files or directories ``names``; None and names of no file are passed over."""
        self.inputs += [(option, name) for name in names if name]

    def check(self) -> None:
        """Checks that the directory can become a new one of results.

        Raises:
            UserError: it is one to live in (the root, the home directory, the working directory or one above it); it is
                not empty, without ``--overwrite``; or, with it, it is, holds or lies inside an input, or holds anything
                that the command did not write.
        """
        _check_place(self.path)
        if self.overwrite:
            for option, name in self.inputs:
                _check_input(self.path, option, name)
        if self.path.is_dir() and contents(self.path):
            if not self.overwrite:
                raise UserError(
                    f"--output {self.path} exists and is not empty; name another directory, or add --overwrite"
                )
            _check_ours(self.path)

    @contextlib.contextmanager
    def written(self, command: str, **begun_with: str) -> Iterator[pathlib.Path]:
        """Yields an empty directory to fill, which then takes the place of the output directory, with a marker in it.

        Args:
            command: who writes. begun_with: what a run that is not finished yet began with.
        """
        self.begun = True
        with staged_directory(self.path, _foreign if self.overwrite else nothing_may_be_there) as partial:
            yield partial
            _mark(partial, command, begun_with)
            self.check()  # others may have put something there meanwhile


def _recover_left(path: pathlib.Path) -> list[str]:
    """Recovers what killed commands left of ``path``, whose lock is held, of what waits beside it, and of a run in it.

    Each other name is recovered under its own lock, and skipped if another process holds that lock.
    """
    notes = recover(path)
    siblings = set() if filled_from_inside(path) else unfinished_in(path.parent)
    left = [path.with_name(name) for kind in WAITING if (name := f"{path.name}.{kind}") in siblings]
    if path.is_dir() and is_ours(path) and read_marker(path).get("command") == "finetune":
        left += [path / name for name in sorted(unfinished_in(path)) if may_be_unfinished_in_run(name)]
    for unfinished in left:
        with contextlib.suppress(UserError), locked(unfinished):
            notes += recover(unfinished)
    return notes


def _check_name(path: pathlib.Path) -> None:
    """Rejects names reserved for unfinished files, and places inside intermediate results, which are deleted later."""
    if any(is_unfinished_name(part) for part in path.parts):
        raise UserError(f"--output {path}: names of this form are reserved for unfinished files; choose another name")
    for parent in path.parents:
        if parent.is_dir() and is_ours(parent) and "waiting" in read_marker(parent):
            raise UserError(
                f"--output {path}: {parent} holds unfinished work and will be deleted; name another directory"
            )


@contextlib.contextmanager
def claim(name: str, overwrite: bool, inputs: Sequence[tuple[str, str]] = ()) -> Iterator[Output]:
    """The directory of ``--output name``, locked, and free of what a kill left behind.

    Directories above it that are missing are made, and go again if nothing came into them.

    Args:
        inputs: options and the files or directories that they read, as ``Output.protect`` takes them.

    Raises:
        UserError: it cannot be a directory, cannot be written to, or another process is at work there.
    """
    path = _resolved(name)
    _check_name(path)
    missing = [parent for parent in path.parents if not parent.exists()]
    place = path if path.is_dir() else (missing[-1] if missing else path).parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"--output {path}: no permission to write there")
    made: list[pathlib.Path] = []
    try:
        with writing(path):
            made += make_parents(path)
        with locked(path):
            for sentence in _recover_left(path):
                print(sentence, flush=True)
            output = Output(path, overwrite)
            output.inputs += inputs
            yield output
    finally:
        remove_empty(made)


def _mark(directory: pathlib.Path, command: str, begun_with: dict[str, str]) -> None:
    from ..._internal.version import VERSION

    record: dict[str, Any] = {"command": command, "version": VERSION, **begun_with}
    if not begun_with:
        files = (p for p in directory.rglob("*") if not p.is_dir())
        record["files"] = sorted(p.relative_to(directory).as_posix() for p in files)
    write_json(directory / MARKER, record)
