"""``--teacher-cache``: a file with the teacher's most likely tokens for every learnt token of a run's rows.

It is an SQLite database, whose transactions make an interrupted computation resumable. A row is found by the digest of
its tokens, so runs whose rows overlap may share a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from qlora_ext.divergence import TopK
from qlora_ext.untrusted import excerpt, printable

from ..data import Row
from ..errors import UserError, first_line

_APPLICATION = 0x716C6F72  # SQLite's mark of the program that a file belongs to
_TABLES = (
    "CREATE TABLE made (key TEXT)",
    "CREATE TABLE rows (digest TEXT PRIMARY KEY, targets BLOB, checksum TEXT) WITHOUT ROWID",
)
_NAMES = {"teacher": "teacher", "load": "--teacher-load", "top_k": "--teacher-top-k", "vocabulary": "vocabulary"}


def _digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def _learnt(row: Row) -> int:
    return sum(label != -100 for label in row["labels"][1:])


class TeacherCache:
    """The cache in the file ``path``, which is created if it does not exist.

    Args:
        key: what the log-probabilities depend on, besides the rows: the digest of the "teacher", how it was loaded
            ("load"), "top_k" and "vocabulary".

    Raises:
        UserError: the file is damaged, or is not a cache of that ``key``.
    """

    def __init__(self, path: pathlib.Path, key: Mapping[str, Any]) -> None:
        self._path, self._key = path, json.dumps(dict(key), sort_keys=True)
        self._top_k, self._vocabulary = int(key["top_k"]), int(key["vocabulary"])
        with self._reading():
            begun = path.exists() and path.stat().st_size > 0
            self._file = sqlite3.connect(path)
            if not begun:
                with self._file:
                    for statement in (f"PRAGMA application_id = {_APPLICATION}", *_TABLES):
                        self._file.execute(statement)
                    self._file.execute("INSERT INTO made VALUES (?)", [self._key])
            (application,) = self._file.execute("PRAGMA application_id").fetchone()
            if application != _APPLICATION:
                raise self._error("expected a file that --teacher-cache wrote, got one of another program")
            made = self._file.execute("SELECT key FROM made").fetchall()
        self._check_key(made)

    def _error(self, text: str) -> UserError:
        return UserError(f"--teacher-cache {printable(self._path)}: {text}; name another file")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise self._error(f"cannot be read or written ({first_line(error)})") from error

    def _check_key(self, made: list[tuple[Any]]) -> None:
        try:
            ((text,),) = made
            found = dict(json.loads(text))
        except (TypeError, ValueError):
            raise self._error("is damaged") from None
        for name, wanted in json.loads(self._key).items():
            if found.get(name) != wanted:
                raise self._error(
                    f"has the log-probabilities of another {_NAMES[name]}: expected {excerpt(wanted)}, got "
                    f"{excerpt(found.get(name))}"
                )

    def _name(self, row: Row) -> str:
        return _digest(json.dumps([row[name] for name in ("input_ids", "labels", "position_ids")]).encode())

    def _checksum(self, name: str, targets: bytes) -> str:
        return _digest(self._key.encode(), name.encode(), targets)

    def missing(self, rows: Sequence[Row]) -> list[int]:
        """The indices of the rows that the file does not have yet.

        Raises:
            UserError: another of the rows is damaged.
        """
        return [i for i, row in enumerate(rows) if self._read(row) is None]

    def add(self, rows: Sequence[Row], targets: TopK) -> None:
        """Stores the targets of the learnt tokens of ``rows``, in order."""
        sizes = [_learnt(row) for row in rows]
        ids, logprobs = targets.ids.int().cpu().split(sizes), targets.logprobs.cpu().split(sizes)
        with self._reading(), self._file:
            for row, *tensors in zip(rows, ids, logprobs, strict=True):
                name, data = self._name(row), b"".join(t.numpy().tobytes() for t in tensors)
                values = [name, data, self._checksum(name, data)]
                self._file.execute("INSERT OR REPLACE INTO rows VALUES (?, ?, ?)", values)

    def read(self, rows: Sequence[Row]) -> TopK:
        """The targets of the learnt tokens of ``rows``, which are in the file.

        Raises:
            UserError: the file is damaged.
        """
        found = [targets for row in rows if (targets := self._read(row)) is not None]
        if len(found) < len(rows):
            raise self._error("is damaged: a row is missing")
        return TopK(torch.cat([row.ids for row in found]), torch.cat([row.logprobs for row in found]))

    def _read(self, row: Row) -> TopK | None:
        """The targets of a row; None if the file does not have it."""
        name, count, k = self._name(row), _learnt(row), self._top_k
        with self._reading():
            stored = self._file.execute("SELECT targets, checksum FROM rows WHERE digest = ?", [name]).fetchone()
        if stored is None:
            return None
        data, split, size = stored[0], 4 * count * k, 4 * count * (2 * k + 1)
        if not isinstance(data, bytes) or len(data) != size or stored[1] != self._checksum(name, data):
            raise self._error("is damaged: a row has changed since it was written")
        ids = torch.frombuffer(bytearray(data[:split]), dtype=torch.int32).view(count, k).long()
        logprobs = torch.frombuffer(bytearray(data[split:]), dtype=torch.float32).view(count, k + 1)
        if not (((ids >= 0) & (ids < self._vocabulary)).all() and logprobs.isfinite().all()):
            raise self._error("is damaged: it has tokens outside the vocabulary, or log-probabilities that are NaN")
        return TopK(ids, logprobs)
