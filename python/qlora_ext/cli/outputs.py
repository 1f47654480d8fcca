"""What may be an output directory, and what ``--overwrite`` may replace: nothing but what the command wrote itself."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from .._outside import Schema, read_json
from .errors import UserError, first_line, writing
from .files import contents, recover, staged_directory, write_json
from .lock import locked
from .sources import ModelSource

# In every directory that the command writes: which command, and what it wrote or what it was begun with.
MARKER = "qlora_output.json"
_MARKER: Schema = {"command?": str, "files?": [str]}
_RUN = re.compile(r"settings\.json|before\.json|metrics\.jsonl|loss\.png|adapter|checkpoint-\d+|" + re.escape(MARKER))


def _resolved(name: str) -> pathlib.Path:
    if not name.strip():
        raise UserError("--output: expected the name of a directory, got an empty one")
    try:
        path = pathlib.Path(name).expanduser().resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # here says so a name that is too long, or a circle of links, which Python 3.13 resolves
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise UserError(f"--output {name[:80]!r}: no directory can have that name ({reason})") from error
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


def input_of(source: ModelSource) -> str | None:
    """The directory or file of a model on this machine, to be protected from ``--overwrite``."""
    path = os.path.join(source.path, source.gguf_file or "")
    return path if os.path.exists(path) else None


def _check_input(path: pathlib.Path, option: str, name: str) -> None:
    try:
        source = pathlib.Path(name).expanduser()
        if not source.exists():
            return  # a name on the hub, or a package's
        if _identity(path) in _on_the_way(source):
            raise UserError(f"--output {path} is or holds {option} {name}, which --overwrite would delete")
        if _identity(source) in {_identity(p) for p in (path, *path.parents)}:
            raise UserError(f"--output {path} lies inside {option} {name}, in which --overwrite deletes nothing")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{option} {name}: {first_line(error)}") from error


def _check_ours(path: pathlib.Path) -> None:
    """Refuses a directory in which there is anything that the command did not write."""
    advice = "--overwrite does not delete it; name another directory, or delete it yourself"
    if not (path / MARKER).is_file():
        raise UserError(f"--output {path}: not written by qlora-ext (it has no {MARKER}); {advice}")
    marker = read_marker(path)
    if marker.get("command") == "finetune":
        foreign = [p.name for p in contents(path) if not _RUN.fullmatch(p.name)]
    else:
        written = marker.get("files")
        if written is None:
            raise UserError(f"--output {path}: {MARKER} is damaged; {advice}")
        files = (p for top in contents(path) for p in (top, *(top.rglob("*") if top.is_dir() else ())))
        names = (p.relative_to(path).as_posix() for p in files if p.is_symlink() or not p.is_dir())
        foreign = [name for name in names if name not in {*written, MARKER}]
    if foreign:
        raise UserError(
            f"--output {path}: --overwrite would delete {foreign[0]!a} too, which qlora-ext did not write; "
            "move it elsewhere, or name another directory"
        )


def _check_place(path: pathlib.Path) -> None:
    for what, name in (("working", "."), ("home", "~")):
        try:
            place = pathlib.Path(os.path.realpath(os.path.expanduser(name)))
        except FileNotFoundError:
            continue  # a working directory that somebody deleted
        if path.exists() and _identity(path) in {_identity(p) for p in (place, *place.parents)}:
            raise UserError(f"--output {path} is the {what} directory or one above it; name a directory of its own")


class Output:
    """A directory that ``--output`` names, this process's alone; it may not exist yet.

    Attributes:
        path: absolute, links followed.
    """

    def __init__(self, path: pathlib.Path, overwrite: bool) -> None:
        self.path = path
        self._overwrite = overwrite
        self._inputs: list[tuple[str, str]] = []

    def protect(self, option: str, *names: str | None) -> None:
        """Notes that ``option`` reads the files or directories ``names``; None and names of no file are passed over."""
        self._inputs += [(option, name) for name in names if name]

    def check(self) -> None:
        """Checks that the directory can become a new one of results.

        Raises:
            UserError: it is one to live in (the root, the home directory, the working directory or one above it); it is
                not empty, without ``--overwrite``; or, with it, it is, holds or lies inside an input, or holds anything
                that the command did not write.
        """
        _check_place(self.path)
        if self._overwrite:
            for option, name in self._inputs:
                _check_input(self.path, option, name)
        if self.path.is_dir() and contents(self.path):
            if not self._overwrite:
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
        with staged_directory(self.path) as partial:
            yield partial
            _mark(partial, command, begun_with)
            self.check()  # others may have put something there meanwhile


@contextlib.contextmanager
def claim(name: str, overwrite: bool) -> Iterator[Output]:
    """The directory of ``--output name``, locked, and free of what a kill left behind.

    Directories above it that are missing are made, and go again if nothing came into them.

    Raises:
        UserError: it cannot be a directory, cannot be written to, or another process is at work there.
    """
    path = _resolved(name)
    missing = [parent for parent in path.parents if not parent.exists()]
    place = path if path.is_dir() else (missing[-1] if missing else path).parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"--output {path}: no permission to write there")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            for sentence in recover(path):
                print(sentence, flush=True)
            yield Output(path, overwrite)
    finally:
        with contextlib.suppress(OSError):
            for parent in missing:
                parent.rmdir()


def _mark(directory: pathlib.Path, command: str, begun_with: dict[str, str]) -> None:
    from .. import __version__

    record: dict[str, Any] = {"command": command, "version": __version__, **begun_with}
    if not begun_with:
        files = (p for p in directory.rglob("*") if not p.is_dir())
        record["files"] = sorted(p.relative_to(directory).as_posix() for p in files)
    write_json(directory / MARKER, record)


def read_marker(directory: pathlib.Path) -> dict[str, Any]:
    """Who wrote ``directory``, and the files it wrote or what it began with; empty where nothing says so.

    Raises:
        UserError: it is damaged.
    """
    path = directory / MARKER
    marker: dict[str, Any] = read_json(path, _MARKER) if path.is_file() else {}
    return marker
