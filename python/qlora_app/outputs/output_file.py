"""Outputs that are a single file: which paths are allowed, and what ``--overwrite`` may replace."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator

from ..errors import UserError, path_named
from .directory import Output, check_name, output_file
from .files import recover, staged_file
from .lock import locked


@dataclasses.dataclass
class OutputFile(Output):
    """The file that ``--output`` names, locked for this process. It may not exist yet.

    Attributes:
        mark: text near the beginning of every file that the command writes.
    """

    mark: str = dataclasses.field(kw_only=True)

    def check(self) -> None:
        """Checks that the file may be written.

        Raises:
            UserError: without ``--overwrite``, it exists; with ``--overwrite``, it is or is inside an input, or
                qlora-ext did not write it.
        """
        if os.path.lexists(self.path) and not self.overwrite:
            raise UserError(f"--output {self.path} exists; name another file, or add --overwrite")
        output_file("--output", str(self.path), self.mark, self.inputs)

    @contextlib.contextmanager
    def written(self, command: str, **begun_with: str) -> Iterator[pathlib.Path]:
        """Yields an empty file to fill, which then replaces the output."""
        self.begun = True
        with staged_file(self.path) as partial:
            yield partial
            self.check()  # again, because other processes may have written there


@contextlib.contextmanager
def claim_file(name: str, overwrite: bool, suffix: str, mark: str) -> Iterator[OutputFile]:
    """The file of ``--output name``, locked, after cleaning up after killed commands.

    Raises:
        UserError: the name does not end in ``suffix``, its directory does not exist or is not writable, or another
            process is writing there.
    """
    path = path_named(name, "--output").absolute()
    if path.suffix != suffix or path.is_dir():
        raise UserError(f"--output {name}: expected the name of a file that ends in {suffix}")
    check_name(path)
    if not path.parent.is_dir():
        raise UserError(f"--output {name}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"--output {path}: no permission to write there")
    with locked(path):
        for sentence in recover(path):
            print(sentence, flush=True)
        yield OutputFile(path, overwrite, mark=mark)
