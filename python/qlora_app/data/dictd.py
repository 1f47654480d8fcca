"""Dictionaries in dictd's format: definitions in a gzip file, and an index next to it."""

from __future__ import annotations

import gzip
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

from qlora_ext.untrusted import excerpt, printable, read_text

from ..errors import UserError, first_line

_MAX_BYTES = 16 << 30  # of a dictionary, which is read into memory


def _number(digits: str) -> int:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    value = 0
    for digit in digits:
        value = value * 64 + alphabet.index(digit)
    return value


def _entry(line: str) -> tuple[int, int]:
    """The offset and size of an entry, from a line of the index (term, offset, size)."""
    _, start, size = line.split("\t")[:3]
    if not (start and size):
        raise ValueError(line)
    return _number(start), _number(size)


def rows(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """The rows of a dictd dictionary (.dict.dz and .index): the term is the question, the definition the answer."""
    index = path.with_name(path.name.removesuffix(".dz").removesuffix(".dict") + ".index")
    try:
        with gzip.open(path) as file:
            body = file.read(_MAX_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"--data {path}: cannot read the dictionary ({first_line(error)})") from error
    entries = set()
    # Split at line feeds only, because terms may contain other line separators.
    for number, line in enumerate(read_text(index).removesuffix("\n").split("\n"), 1):
        try:
            offset, size = _entry(line.removesuffix("\r"))
        except ValueError:
            raise UserError(
                f"--data {index}, line {number}: expected an entry of a dictd index, got {excerpt(line)}"
            ) from None
        if offset + size > len(body):
            raise UserError(
                f"--data {index}, line {number}: expected an entry inside {path.name}, got one beyond its end"
            )
        entries.add((offset, size))
    for offset, size in sorted(entries):
        entry = body[offset : offset + size].decode("utf-8", "replace")
        term, _, definition = entry.partition("\n")
        definition = re.sub(r"\s+", " ", definition).strip()
        if definition and not term.startswith("00-database"):
            yield f"--data {printable(path)}, byte {offset}", {"question": term.strip(), "answer": definition}
