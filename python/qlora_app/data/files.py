"""Reads the rows of a data file one at a time, each with its place: file and line, or file and row."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from qlora_ext.untrusted import excerpt, parse_json, printable

from ..errors import UserError, first_line
from . import dictd
from .examples import COLUMNS, EXPECTED, QUESTIONS, named

Rows: TypeAlias = Iterator[tuple[str, Any]]  # of place and record

_MAX_LINE = 256 << 20  # bytes of a line, which is read into memory
_MAX_TEXT_BYTES = 4 << 30  # bytes of a file that must be read into memory at once
_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip", b"PAR1": "Parquet", b"PK\x03\x04": "zip"}
_MAX_BLANK_BYTES = 1 << 20  # bytes of consecutive blank lines, of which a decompression bomb has millions
_ARROW_FILE = b"ARROW1"  # the beginning of a file, which a stream lacks
_BATCH = 256  # rows of a table that are decoded at a time
_BLANKS = re.compile(r"[ \t\r\n]*")
_PIECE = 1 << 20  # approximate number of characters of a piece of text


def _expected(prompts: bool) -> str:
    """The columns that a table must have, for error messages."""
    return " or ".join((*QUESTIONS, "messages")) if prompts else EXPECTED


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
        raw = file.read(_MAX_TEXT_BYTES + 1)
    if len(raw) > _MAX_TEXT_BYTES:
        raise UserError(
            f"--data {printable(path)}: larger than the limit of {_MAX_TEXT_BYTES} bytes for this format; "
            "write it as .jsonl, one row per line"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{_at(path, line)}: not UTF-8 text (byte {error.start} of the file)") from error


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


class _Json:
    """An incremental JSON reader that yields the values of an array one at a time, and knows their lines."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._text = _full_text(path)
        self._at = 0
        self._line = 1
        self._counted = 0  # position up to which lines are counted
        self._decoder = json.JSONDecoder(strict=False, parse_int=float)
        self.skip_space()

    @property
    def place(self) -> str:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return _at(self._path, self._line)

    def skip_space(self) -> None:
        self._at = _BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]  # it also matches the empty string

    def peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def take(self, expected: str) -> str:
        """Reads one of the characters ``expected``."""
        found = self.peek()
        if not found or found not in expected:
            shown = excerpt(self._text[self._at : self._at + 40]) if found else "the end of the file"
            raise UserError(f"{self.place}: not JSON: expected {' or '.join(expected)}, got {shown}")
        self._at += 1
        self.skip_space()
        return found

    def value(self) -> Any:
        start, place = self._at, self.place
        try:
            _, self._at = self._decoder.raw_decode(self._text, start)
        except ValueError as error:  # its message has lines counted from the beginning of the file
            raise UserError(f"{place}: not JSON ({excerpt(str(error))})") from error
        except RecursionError:
            self._at = len(self._text)  # parse_json raises the error
        found = parse_json(self._text[start : self._at], place, lenient=True)
        self.skip_space()
        return found

    def array(self) -> Rows:
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            place = self.place
            yield place, self.value()
            if self.take(",]") == "]":
                return

    def member(self, wanted: str) -> Rows:
        """The values of the array ``wanted`` of an object."""
        while self.take("{,") and self.peek() != "}":
            name = self.value()
            self.take(":")
            if name == wanted:
                yield from self.array()
            else:
                self.value()
            if self.peek() == "}":
                break
        self.take("}")

    def end(self) -> None:
        if self.peek():
            raise UserError(
                f"{self.place}: not JSON: expected the end of the file, got {excerpt(self._text[self._at :])}"
            )


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
    text = _Json(path)
    if text.peek() == "[":
        yield from text.array()
    elif text.peek() == "{":
        place, record = text.place, _Json(path).value()
        arrays = [name for name, value in record.items() if isinstance(value, list) and name not in COLUMNS]
        wanted = arrays[0] if len(arrays) == 1 else split
        if not arrays:
            yield place, text.value()
        elif wanted in arrays:
            yield from text.member(wanted)
        else:
            known = ", ".join(map(excerpt, arrays))
            raise UserError(f"{place}: no split {excerpt(split)}; --split takes one of {known}")
    elif text.peek():
        raise UserError(f"{text.place}: expected an array of rows, or an object with one array per split")
    text.end()


def _columns(path: pathlib.Path, header: list[str], prompts: bool) -> list[str]:
    names = [name.strip() for name in header]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{_at(path, 1)}: the column {excerpt(twice[0])} appears {names.count(twice[0])} times")
    if not named(names, prompts):
        expected, got = _expected(prompts), excerpt(", ".join(names), 160)
        raise UserError(f"{_at(path, 1)}: expected a first line with the columns {expected}; got {got}")
    return names


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
            names = _columns(path, fields, prompts)
        elif len(fields) != len(names):
            raise UserError(
                f"{place}: expected {len(names)} fields ({excerpt(', '.join(names))}), got {len(fields)}; quote a "
                "field that contains a separator or a line break"
            )
        else:
            yield place, dict(zip(names, fields, strict=True))


def _table(path: pathlib.Path, names: list[str], batches: Callable[[list[str]], Iterator[Any]], prompts: bool) -> Rows:
    """The rows of a file with the columns ``names``.

    Args:
        batches: reads the columns that it gets, as batches of pyarrow.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"--data {printable(path)}: the column {excerpt(twice[0])} appears {names.count(twice[0])} times"
        )
    wanted = [name for name in names if prompts or name in COLUMNS]
    if not named(wanted, prompts):
        expected, got = _expected(prompts), excerpt(", ".join(names), 160)
        raise UserError(f"--data {printable(path)}: expected the columns {expected}; got {got}")
    number = 0
    for batch in batches(wanted):
        for record in batch.to_pylist():
            number += 1
            yield f"--data {printable(path)}, row {number}", record


@contextlib.contextmanager
def _reading(path: pathlib.Path, kind: str) -> Iterator[None]:
    """Turns errors of pyarrow, which may also be missing, into a ``UserError``."""
    try:
        from pyarrow import ArrowException
    except ImportError as error:
        raise UserError(f"--data {printable(path)}: reading {kind} needs pyarrow; pip install pyarrow") from error
    try:
        yield
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data {printable(path)}: damaged, or not {kind} ({first_line(error)})") from error


def _parquet(path: pathlib.Path, split: str, prompts: bool) -> Rows:
    with _reading(path, "Parquet"):
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            yield from _table(path, names, lambda wanted: file.iter_batches(_BATCH, columns=wanted), prompts)


def _arrow(path: pathlib.Path, split: str, prompts: bool) -> Rows:
    """The rows of an Arrow file, or of an Arrow stream, which datasets writes to files of the same name."""
    with _reading(path, "Arrow"):
        from pyarrow import ipc, memory_map

        with memory_map(str(path)) as source:
            is_file = source.read(len(_ARROW_FILE)) == _ARROW_FILE
            source.seek(0)
            reader = ipc.open_file(source) if is_file else ipc.open_stream(source)

            def batches(wanted: list[str]) -> Iterator[Any]:
                stored = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
                for batch in stored:
                    for start in range(0, batch.num_rows, _BATCH):
                        yield batch.select(wanted).slice(start, _BATCH)

            yield from _table(path, reader.schema.names, batches, prompts)


def _dictd(path: pathlib.Path, split: str, prompts: bool) -> Rows:
    return dictd.rows(path)


READERS: dict[str, Callable[[pathlib.Path, str, bool], Rows]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": _txt,
    ".dict.dz": _dictd,
}


def reader_of(path: pathlib.Path) -> Callable[[pathlib.Path, str, bool], Rows] | None:
    """The reader for a file name, or None. Text files may be compressed with gzip."""
    name = path.name.lower()
    packed = name.endswith(".gz")
    ending = next((ending for ending in READERS if name.removesuffix(".gz").endswith(ending)), None)
    return None if ending is None or (packed and ending in (".parquet", ".arrow", ".dict.dz")) else READERS[ending]
