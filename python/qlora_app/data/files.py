"""Reads the rows of a data file one at a time, each with its place: file and line, or file and row."""

from __future__ import annotations

import collections
import contextlib
import csv
import gzip
import io
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator

from qlora_ext.untrusted import excerpt, parse_json, printable

from ..errors import UserError, first_line
from . import hub
from .examples import COLUMNS, Rows

_MAX_LINE = 256 << 20  # bytes of a line, which is read into memory
_MAX_JSON_BYTES = 1 << 30  # bytes of a .json file, whose rows are in memory at once
_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip", b"PAR1": "Parquet", b"PK\x03\x04": "zip"}
_MAX_BLANK_BYTES = 1 << 20  # bytes of consecutive blank lines, of which a decompression bomb has millions
_BATCH = 256  # rows of a table that are decoded at a time
_PIECE = 1 << 20  # approximate number of characters of a piece of text


def _at(path: pathlib.Path, line: int) -> str:
    return f"--data {printable(path)}, line {line}"


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[gzip.GzipFile | io.BufferedReader]:
    """The bytes of a file, decompressed if its name ends in .gz.

    Raises:
        UserError: the file cannot be read, is damaged, or begins like a file of another format.
    """
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            start = file.read(4)
            for mark, kind in _MARKS.items():
                if start.startswith(mark):
                    raise UserError(f"--data {printable(path)}: expected UTF-8 text, got {kind}")
            file.seek(0)
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"--data {printable(path)}: truncated or damaged gzip ({first_line(error)})") from error
    except OSError as error:
        raise UserError(f"--data cannot read {printable(path)}: {error.strerror or first_line(error)}") from error


def _decoded(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 text (byte {error.start} is {raw[error.start]:#04x})") from error


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, numbered from 1, with their line feeds, without a byte-order mark."""
    with _opened(path) as file:
        number = blank = 0
        while raw := file.readline(_MAX_LINE + 1):
            number += 1
            blank = 0 if raw.strip() else blank + len(raw)
            if blank > _MAX_BLANK_BYTES:
                raise UserError(
                    f"{_at(path, number)}: expected at most {_MAX_BLANK_BYTES} bytes of blank lines before this line"
                )
            if len(raw) > _MAX_LINE:
                raise UserError(f"{_at(path, number)}: longer than the limit of {_MAX_LINE} bytes per line")
            line = _decoded(raw, _at(path, number))
            yield number, line.removeprefix("\ufeff") if number == 1 else line


def _full_text(path: pathlib.Path) -> str:
    """The entire text of a UTF-8 file."""
    with _opened(path) as file:
        raw = file.read(_MAX_JSON_BYTES + 1)
    if len(raw) > _MAX_JSON_BYTES:
        raise UserError(
            f"--data {printable(path)}: larger than the limit of {_MAX_JSON_BYTES} bytes for this format; "
            "write it as .jsonl, one row per line"
        )
    return _decoded(raw, f"--data {printable(path)}").removeprefix("\ufeff")


def _jsonl(path: pathlib.Path, split: str, prompts: bool) -> Rows:
    for number, line in _lines(path):
        if line.strip():
            place = _at(path, number)
            yield place, parse_json(line, place, lenient=True)


def _txt(path: pathlib.Path, split: str, prompts: bool) -> Rows:
    """The text in pieces of complete lines, because a tokenizer processes a text at once."""
    piece: list[str] = []
    size = first = 0
    for number, line in _lines(path):
        first = first if piece else number
        piece.append(line)
        size += len(line)
        if size >= _PIECE:
            yield _at(path, first), {"text": "".join(piece)}
            piece, size = [], 0
    if "".join(piece).strip():
        yield _at(path, first), {"text": "".join(piece)}


def _is_json_lines(path: pathlib.Path) -> bool:
    """Whether a .json file is really JSON Lines, with one object per line."""
    lines = (line for _, line in _lines(path) if line.strip())
    first, second = next(lines, ""), next(lines, "")
    try:
        return isinstance(json.loads(first, strict=False), dict) and bool(second.strip())
    except (ValueError, RecursionError):
        return False


def _json(path: pathlib.Path, split: str, prompts: bool) -> Rows:
    """The rows of a .json file: an array, an object with one array per split, one row, or JSON Lines."""
    if _is_json_lines(path):
        yield from _jsonl(path, split, prompts)
        return
    shown = f"--data {printable(path)}"
    rows = parse_json(_full_text(path), shown, lenient=True)
    if isinstance(rows, dict):
        arrays = [name for name, value in rows.items() if isinstance(value, list) and name not in COLUMNS]
        wanted = arrays[0] if len(arrays) == 1 else split
        if arrays and wanted not in arrays:
            known = ", ".join(map(excerpt, arrays))
            raise UserError(f"{shown}: no split {excerpt(split)}; --split takes one of {known}")
        rows = rows[wanted] if arrays else [rows]
    if not isinstance(rows, list):
        raise UserError(f"{shown}: expected an array of rows, or an object with one array per split")
    for number, record in enumerate(rows, 1):
        yield f"{shown}, row {number}", record


def _check_names(names: list[str], place: str) -> None:
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{place}: the column {excerpt(twice[0])} appears {names.count(twice[0])} times")


def _delimiter(path: pathlib.Path) -> str:
    """The delimiter of the columns: the one of comma, semicolon and tab that gives the most known column names."""
    first = next((line for _, line in _lines(path) if line.strip()), "")

    def known(delimiter: str) -> int:
        return len(COLUMNS.intersection(name.strip(' "\r\n') for name in first.split(delimiter)))

    return max(("\t",) if ".tsv" in path.suffixes else (",", ";", "\t"), key=known)


def _csv(path: pathlib.Path, split: str, prompts: bool) -> Rows:
    csv.field_size_limit(_MAX_LINE)  # the module's default is 128 KiB
    # Split at all of CSV's line ends. The reader joins lines inside quotes again.
    lines = (part for _, line in _lines(path) for part in re.split(r"(?<=\r)(?!\n)", line) if part)
    reader = csv.reader(lines, delimiter=_delimiter(path), strict=True)
    names: list[str] | None = None
    while True:
        place = _at(path, reader.line_num + 1)
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{place}: not CSV ({first_line(error)})") from error
        if fields is None:
            return
        if not fields:
            continue  # an empty line
        if names is None:
            names = [name.strip() for name in fields]
            _check_names(names, place)
        elif len(fields) != len(names):
            raise UserError(
                f"{place}: expected {len(names)} fields ({excerpt(', '.join(names))}), got {len(fields)}; quote a "
                "field that contains a separator or a line break"
            )
        else:
            yield place, dict(zip(names, fields, strict=True))


def _parquet(path: pathlib.Path, split: str, prompts: bool) -> Rows:
    shown = f"--data {printable(path)}"
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"{shown}: reading Parquet needs pyarrow; pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_names(names, shown)
            wanted = [name for name in names if prompts or name in COLUMNS] or names
            records = (row for batch in file.iter_batches(_BATCH, columns=wanted) for row in batch.to_pylist())
            for number, record in enumerate(records, 1):
                yield f"{shown}, row {number}", record
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{shown}: damaged, or not Parquet ({first_line(error)})") from error


READERS: dict[str, Callable[[pathlib.Path, str, bool], Rows]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": lambda path, split, prompts: hub.saved_rows(path, split),
    ".txt": _txt,
}


def reader_of(path: pathlib.Path) -> Callable[[pathlib.Path, str, bool], Rows] | None:
    """The reader for a file name, or None. Text files may be compressed with gzip."""
    name = path.name.lower()
    packed = name.endswith(".gz")
    ending = next((ending for ending in READERS if name.removesuffix(".gz").endswith(ending)), None)
    return None if ending is None or (packed and ending in (".parquet", ".arrow")) else READERS[ending]
