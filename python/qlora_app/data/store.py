"""A sequence that may be larger than memory, with its values in a temporary file."""

from __future__ import annotations

import array
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar, overload

from ..errors import UserError

T = TypeVar("T")
_IN_MEMORY = 64 << 20  # smaller sequences, in bytes, stay in memory


class Stored(Sequence[T], Generic[T]):
    """A sequence of JSON values. Each read returns a new object.

    The temporary file has no name, and is deleted with the sequence.
    """

    def __init__(self, values: Iterable[T] = ()) -> None:
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115  # closed with its last reference
        self._ends = array.array("Q", [0])
        for value in values:
            self.append(value)

    def append(self, value: T) -> None:
        """Adds a value.

        Raises:
            UserError: the disk is full.
        """
        try:
            self._file.seek(self._ends[-1])
            self._ends.append(self._ends[-1] + self._file.write(json.dumps(value).encode()))
        except OSError as error:
            raise UserError(
                f"cannot keep the data in a temporary file in {tempfile.gettempdir()}: {error.strerror}; "
                "TMPDIR names another directory"
            ) from error

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        self._file.seek(self._ends[index])
        value: T = json.loads(self._file.read(self._ends[index + 1] - self._ends[index]))
        return value

    def __iter__(self) -> Iterator[T]:
        return (self[i] for i in range(len(self)))
