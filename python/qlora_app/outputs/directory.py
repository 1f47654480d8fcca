"""Output directories: which paths are allowed, and what ``--overwrite`` may replace."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from ..errors import UserError, check_text, first_line, path_named
from .files import (
    contents,
    filled_from_inside,
    is_unfinished_name,
    nothing_may_be_there,
    parents_made,
    recover,
    staged_directory,
    unfinished_in,
    write_json,
)
from .lock import locked
from .ownership import MARKER, WAITING, foreign_in_output, is_ours, may_be_unfinished
from .ownership import read_marker as read_marker


def _resolved(name: str) -> pathlib.Path:
    if not name.strip():
        raise UserError("--output: expected the name of a directory, got an empty name")
    try:
        path = pathlib.Path(name).expanduser().resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # raises for names that are too long, and for cycles of links, which Python 3.13 resolves
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
    """Adds ``path``, its parents, and recursively the targets of their links and their parents to ``seen``."""
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
    """How the directory ``path`` overlaps the input ``name`` of ``option``, with links resolved; None if they do not.

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
    """The file that ``option`` names. The command may replace an earlier one that it wrote itself.

    Args:
        mark: text near the beginning of every file that the command writes.
        inputs: options, and the paths they read.

    Raises:
        UserError: the directory does not exist; or the file exists and is an input, is inside one, or has no ``mark``.
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


def _check_ours(path: pathlib.Path) -> None:
    """Rejects a directory with entries that qlora-ext did not write."""
    advice = "--overwrite does not delete it; name another directory, or delete it yourself"
    if not (path / MARKER).is_file():
        raise UserError(f"--output {path}: not written by qlora-ext (it has no {MARKER}); {advice}")
    try:
        foreign = foreign_in_output(path)
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
            continue  # the working directory was deleted
        if path.exists() and _identity(path) in {_identity(p) for p in (place, *place.parents)}:
            raise UserError(f"--output {path} is the {what} directory or contains it; name a separate directory")


@dataclasses.dataclass
class Output:
    """The directory that ``--output`` names, locked for this process. It may not exist yet.

    Attributes:
        path: absolute, with links resolved.
        overwrite: whether an earlier output of the command may be replaced.
        inputs: options and the paths that they read, see ``protect``.
        begun: whether the results are complete, and writing has begun.
    """

    path: pathlib.Path
    overwrite: bool
    inputs: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    begun: bool = dataclasses.field(default=False, init=False)

    def protect(self, option: str, *names: str | None) -> None:
        """Records that ``option`` reads the files or directories ``names``. None and names of no file are ignored."""
        self.inputs += [(option, name) for name in names if name]

    def check(self) -> None:
        """Checks that results may be written to the directory.

        Raises:
            UserError: it is or contains the home or the working directory; without ``--overwrite``, it is not empty;
                with ``--overwrite``, it overlaps an input, or has entries that qlora-ext did not write.
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
    def written(self, command: str, **begun_with: Any) -> Iterator[pathlib.Path]:
        """Yields an empty directory to fill, which then replaces the output directory. It gets a marker.

        Args:
            command: the name of the command, for the marker.
            begun_with: for the marker of an output that is not finished yet: digests of a run's inputs, or the names
                of a sweep's runs.
        """
        self.begun = True
        with staged_directory(self.path, foreign_in_output if self.overwrite else nothing_may_be_there) as partial:
            yield partial
            mark(partial, command, begun_with)
            self.check()  # again, because other processes may have written there


def _recover_left(path: pathlib.Path) -> list[str]:
    """Cleans up after killed commands: ``path``, whose lock is held, its intermediate results, and the runs in it.

    Names other than ``path`` are recovered under their own lock, and skipped if another process holds it.
    """
    notes = recover(path)
    siblings = set() if filled_from_inside(path) else unfinished_in(path.parent)
    left = [path.with_name(name) for kind in WAITING if (name := f"{path.name}.{kind}") in siblings]
    marker = read_marker(path) if path.is_dir() and is_ours(path) else {}
    if marker:
        names = sorted(unfinished_in(path))
        left += [path / name for name in names if may_be_unfinished(marker.get("command"), name)]
    for unfinished in left:
        with contextlib.suppress(UserError), locked(unfinished):
            notes += recover(unfinished)
    runs = marker.get("runs") or ()
    for run in contents(path) if runs else ():
        if run.name in runs and run.is_dir() and not run.is_symlink():
            with contextlib.suppress(UserError), locked(run):
                notes += _recover_left(run)
    return notes


def check_name(path: pathlib.Path) -> None:
    """Rejects reserved names of unfinished files, and outputs inside intermediate results, which are deleted later."""
    if any(is_unfinished_name(part) for part in path.parts):
        raise UserError(f"--output {path}: names of this form are reserved for unfinished files; choose another name")
    for parent in path.parents:
        if parent.is_dir() and is_ours(parent) and "waiting" in read_marker(parent):
            raise UserError(
                f"--output {path}: {parent} holds unfinished work and will be deleted; name another directory"
            )


@contextlib.contextmanager
def claim(name: str, overwrite: bool, inputs: Sequence[tuple[str, str]] = ()) -> Iterator[Output]:
    """The directory of ``--output name``, locked, after cleaning up after killed commands.

    Missing parent directories are created, and removed at the end if they are still empty.

    Args:
        inputs: options and the files or directories that they read, see ``Output.protect``.

    Raises:
        UserError: the name is not a valid directory, it is not writable, or another process is writing there.
    """
    path = _resolved(name)
    check_name(path)
    missing = [parent for parent in path.parents if not parent.exists()]
    place = path if path.is_dir() else (missing[-1] if missing else path).parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"--output {path}: no permission to write there")
    with parents_made(path), locked(path):
        for sentence in _recover_left(path):
            print(sentence, flush=True)
        yield Output(path, overwrite, [*inputs])


def mark(directory: pathlib.Path, command: str, begun_with: dict[str, Any]) -> None:
    """Writes the marker of ``directory``, see ``Output.written``."""
    from qlora_ext.version import VERSION

    record: dict[str, Any] = {"command": command, "version": VERSION, **begun_with}
    if not begun_with:
        files = (p for p in directory.rglob("*") if not p.is_dir())
        record["files"] = sorted(p.relative_to(directory).as_posix() for p in files)
    write_json(directory / MARKER, record)
