"""``OUTPUT.weights`` and ``OUTPUT.calibration`` retain intermediate results until OUTPUT is written.

After an interruption by a kill, a full disk or Ctrl-C, the same command resumes with them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from ..errors import NO_SPACE, UserError, full, writing
from .directory import Output, relation
from .files import (
    WAITS_INSIDE,
    contents,
    delete,
    filled_from_inside,
    recover,
    staged_directory,
    unfinished_in,
    write_json,
)
from .lock import locked
from .ownership import MARKER, foreign_in, is_result, read_marker

_DONE = {"weights": "quantized", "calibration": "calibrated"}


def _check_ours(directory: pathlib.Path, marker: dict[str, Any], kind: str) -> dict[str, Any]:
    """Rejects a directory without the marker of that output, or with foreign files.

    Returns:
        Its marker.
    """
    advice = (
        f"{_DONE[kind]} weights are kept there until --output is written; move it elsewhere, or name another --output"
    )
    found: dict[str, Any] = {}
    if not directory.is_symlink() and directory.is_dir() and not directory.is_mount():
        with contextlib.suppress(UserError):
            found = read_marker(directory)
    if any(found.get(key) != value for key, value in marker.items()):
        raise UserError(f"{directory} was not written by this command: {advice}")
    for name in unfinished_in(directory):
        if is_result(kind)(name):
            recover(directory / name)
    foreign = foreign_in(directory, is_result(kind))
    if foreign is not None:
        raise UserError(f"{directory} holds {foreign!a}, which qlora-ext did not write: {advice}")
    return found


def _open(directory: pathlib.Path, output: Output, kind: str, key: dict[str, Any] | None) -> None:
    """Opens or creates the directory of intermediate results."""
    from qlora_ext.version import VERSION

    marker = {"waiting": kind, "output": output.path.name}
    recover(directory)
    key = json.loads(json.dumps(key))
    found = _check_ours(directory, marker, kind) if os.path.lexists(directory) else {}
    for option, name in output.inputs:
        if relation(directory, option, name) == "is or holds":  # a new directory inside an input is harmless
            raise UserError(
                f"{directory} is or holds {option} {name} and would be deleted at the end; name another --output"
            )
    if found and found.get("key") != key:
        delete(directory, output.path, lambda path: foreign_in(path, is_result(kind)))
    if not os.path.lexists(directory):
        with staged_directory(directory) as partial:
            write_json(partial / MARKER, {"command": "qlora-ext", "version": VERSION, **marker, "key": key})


def _names(directory: pathlib.Path) -> set[str]:
    """The names of the intermediate results, without those of marker files."""
    found = {path.name for path in contents(directory)} if directory.is_dir() else set()
    return found - {MARKER, "calibration.json"}


@dataclasses.dataclass
class Waiting:
    """A directory with intermediate results.

    Attributes:
        found: the names of the results that an earlier command left there.
        useless: whether the same command would fail again, so that the results are not retained.
    """

    directory: pathlib.Path
    kind: str
    found: set[str]
    useless: bool = False

    def explained(self, error: BaseException, written: bool) -> BaseException:
        """The exception to raise instead of ``error``. It mentions the retained results if this command added any.

        Args:
            written: whether writing the output had begun.
        """
        if isinstance(error, UserError) and not written and _names(self.directory) <= self.found:
            return error
        note = f"the weights {_DONE[self.kind]} so far are kept in {self.directory}: run the same command to resume"
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return UserError(f"the disk that holds {self.directory} is full; {note}")
        if isinstance(error, (UserError, KeyboardInterrupt)):
            return type(error)(f"{error}; {note}" if str(error) else note)
        print(note, flush=True)
        return error


@contextlib.contextmanager
def waiting(output: Output, kind: str, key: dict[str, Any] | None = None) -> Iterator[Waiting | None]:
    """Yields the locked directory OUTPUT.KIND, new or from an earlier command, and deletes it at the end.

    After an exception, the directory stays unless it is empty, and the exception mentions it.

    An OUTPUT that is filled from inside, such as a mount point, can have no sibling. Calibrations are then retained
    inside it. Weights are not retained, because quantizing them again takes only minutes.

    Args:
        kind: a key of ``ownership.WAITING``.
        key: identifies the command. Results with another key are deleted.

    Returns:
        None if the directory cannot be created.

    Raises:
        UserError: the directory or an entry in it is foreign, it is or contains an input, or another process uses it.
            Nothing is changed then.
    """
    inside = filled_from_inside(output.path)
    if inside and kind == "weights":
        yield None
        return
    directory = output.path / WAITS_INSIDE if inside else output.path.with_name(f"{output.path.name}.{kind}")
    with contextlib.nullcontext() if inside else locked(directory):  # inside, the lock of OUTPUT is held
        with writing(directory):
            _open(directory, output, kind, key)
        found = Waiting(directory, kind, _names(directory))
        try:
            yield found
        except BaseException as error:
            if found.useless or not _names(directory):
                _delete(found, output)
                if isinstance(error, OSError) and error.errno in NO_SPACE:
                    raise UserError(full(directory)) from error
                raise
            explained = found.explained(error, output.begun)
            if explained is error:
                raise
            raise explained from error
        _delete(found, output)


def _delete(found: Waiting, output: Output) -> None:
    if not os.path.lexists(found.directory):
        return
    try:
        with writing(found.directory):
            delete(found.directory, output.path, lambda path: foreign_in(path, is_result(found.kind)))
    except UserError as error:  # a foreign entry in it; the command's result is complete anyway
        print(f"note: {error}", flush=True)
