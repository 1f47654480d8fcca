"""Untrusted input: checks files before they are used, and makes their text printable before it is shown."""

from __future__ import annotations

import json
import os
import pathlib
import re
import stat
from collections.abc import Mapping
from typing import Any, NoReturn, TypeAlias

try:
    from re import _parser as _parsing  # type: ignore[attr-defined,unused-ignore]
except ImportError:  # Python 3.10
    import sre_parse as _parsing  # type: ignore[no-redef,unused-ignore]

# The expected value: a type, one of several types, a list of a schema, or an object with fields of schemas. A field
# whose name ends in "?" may be absent or null. ``int`` means 64 bits, ``float`` any number; a bool is not a number.
Schema: TypeAlias = "type | tuple[type, ...] | list[Any] | Mapping[str, Any]"

_MAX_BYTES = 256 << 20  # the largest tokenizers known are a tenth of that
_MAX_DEPTH = 64
_MAX_DIGITS = 300  # of an integer that fits into a float; tokenizers write 10^30 for "no limit"
_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "an integer of 64 bits",
    float: "a number",
    bool: "true or false",
}
# Control characters, halves of surrogate pairs, and characters that reverse the order of those around them.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


# Limits of regular expressions.
_MAX_LENGTH = 4096
_NAME = 100  # characters of a module's name
_MAX_WAYS = 1e12  # five repetitions of any length in a row, with a few alternatives


class UserError(Exception):
    """A user's mistake, or a limit of the machine. Its message is shown without a traceback."""


class FileError(UserError, ValueError):
    """A file that is damaged or of an unexpected kind. The message names the file and the fault."""


def printable(text: object, lines: bool = False) -> str:
    r"""``text`` with every character that controls a terminal written as an escape, such as \x1b.

    Args:
        lines: keep line feeds and tabs.
    """

    def escaped(match: re.Match[str]) -> str:
        character = match[0]
        if lines and character in "\n\t":
            return character
        return character.encode("unicode_escape").decode("ascii")

    return _CONTROLS.sub(escaped, str(text))


def excerpt(value: object, limit: int = 80) -> str:
    """The printable beginning of ``value``, at most ``limit`` characters, for quotes of files in messages."""
    text = printable(value if isinstance(value, str) else repr(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has no message.

    If the first line ends in a colon, the second one is appended. The result is limited to 400 characters, because a
    library's message may quote a complete file.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    line = f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return excerpt(line.rstrip(".:"), 400)


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _check_form(value: Any, source: str) -> None:
    """Rejects deep nesting, and halves of surrogate pairs, which JSON can represent but UTF-8 cannot."""
    level, depth = [value], 0
    while level:
        if depth > _MAX_DEPTH:
            raise FileError(f"{source}: expected JSON nested at most {_MAX_DEPTH} levels deep, got more")
        for text in level:
            if isinstance(text, str) and _SURROGATE.search(text):
                raise FileError(f"{source}: expected text, got half of a surrogate pair in {excerpt(text)}")
        inner = [(*outer, *outer.values()) if isinstance(outer, dict) else outer for outer in level]
        level = [part for parts in inner if isinstance(parts, tuple | list) for part in parts]
        depth += 1


def _is(value: Any, kind: type) -> bool:
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is int and isinstance(value, int) and not -(2**63) <= value < 2**63:
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def check(value: Any, schema: Schema, source: str, name: str = "") -> None:
    """Checks that ``value``, read from ``source``, matches a schema.

    Raises:
        FileError: it does not match; the message names ``source`` and the field.
    """

    def refuse(expected: str) -> NoReturn:
        what = f"{name} to be {expected}" if name else expected
        raise FileError(f"{source}: expected {what}, got {excerpt(value)}")

    if isinstance(schema, Mapping):
        if not isinstance(value, dict):
            refuse(_NAMES[dict])
        for field, kind in schema.items():
            key = field.removesuffix("?")
            if value.get(key) is None and field != key:
                continue
            if key not in value:
                raise FileError(f"{source}: expected {f'{name}.' if name else ''}{key} in it, found none")
            check(value[key], kind, source, f"{name}.{key}" if name else key)
    elif isinstance(schema, list):
        if not isinstance(value, list):
            refuse(_NAMES[list])
        for i, inner in enumerate(value):
            check(inner, schema[0], source, f"{name}[{i}]")
    else:
        kinds = schema if isinstance(schema, tuple) else (schema,)
        if not any(_is(value, kind) for kind in kinds):
            refuse(" or ".join(_NAMES[kind] for kind in kinds))


def parse_json(text: str, source: str, schema: Schema | None = None, lenient: bool = False) -> Any:
    """The value of the JSON ``text`` that was read from ``source``, checked against a schema.

    Args:
        lenient: accept control characters in strings, which standard JSON must escape.

    Raises:
        FileError: it is not JSON, is nested too deeply, is not UTF-8, or does not match the schema.
    """
    try:
        value = json.loads(text, parse_int=_integer, strict=not lenient)
    except RecursionError:
        raise FileError(f"{source}: expected JSON nested at most {_MAX_DEPTH} levels deep, got more") from None
    except ValueError as error:
        raise FileError(f"{source}: not JSON ({excerpt(str(error))})") from error
    _check_form(value, source)
    if schema is not None:
        check(value, schema, source)
    return value


def regular_only(path: str, flags: int) -> int:
    """An opener for ``open`` that rejects anything but a regular file. It does not wait for the writer of a FIFO.

    Raises:
        FileError: the file is of another kind. OSError: it cannot be opened.
    """
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "Is a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise FileError(f"cannot read {printable(path)}: {kind}")
    return descriptor


def read_text(path: pathlib.Path, limit: int = _MAX_BYTES) -> str:
    """The text of a UTF-8 file of at most ``limit`` bytes.

    Raises:
        FileError: it cannot be read, is not a regular file, is larger, or is not UTF-8.
    """
    try:
        with open(path, "rb", opener=regular_only) as file:
            raw = file.read(limit + 1)
        if len(raw) > limit:
            raise FileError(f"{printable(path)}: larger than the limit of {limit} bytes")
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{printable(path)}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise FileError(f"cannot read {printable(path)}: {error.strerror}") from error


def read_json(path: str | os.PathLike[str], schema: Schema | None = None) -> Any:
    """The JSON in the file ``path``, checked against a schema.

    Raises:
        FileError: it cannot be read, is not JSON, is too large or too deep, or does not match the schema.
    """
    path = pathlib.Path(path)
    return parse_json(read_text(path), printable(path), schema)


def _ways(parsed: Any) -> float:
    """The number of ways, at most, in which a parsed expression can match a part of a name."""
    total = 1.0
    for operator, value in parsed:
        kind = str(operator)
        if kind == "BRANCH":
            total *= sum(map(_ways, value[1]))
        elif kind.endswith("_REPEAT"):
            least, most, inner = value
            most = min(most, _NAME)
            total *= (most - min(least, most) + 1) * _ways(inner) ** most
        elif kind == "GROUPREF_EXISTS":
            total *= sum(_ways(part) for part in value[1:] if part is not None)
        elif kind in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
            total *= _ways(value[-1])
        elif kind == "ATOMIC_GROUP":
            total *= _ways(value)
    return total


def compiled_pattern(text: str, source: str) -> re.Pattern[str]:
    """The regular expression ``text``, which was read from ``source``.

    Python's matcher backtracks, so some regular expressions take years to match a short name.

    Raises:
        FileError: it is none, or matching it to a name may take very long, as with a repetition inside another.
    """
    try:
        if len(text) > _MAX_LENGTH or _ways(_parsing.parse(text)) > _MAX_WAYS:
            raise OverflowError
        return re.compile(text)
    except OverflowError:
        raise FileError(
            f"{source}: expected regular expressions of at most {_MAX_LENGTH} characters, with at most five "
            f"repetitions and none inside another (more may take years to match), got {excerpt(text)}"
        ) from None
    except (re.error, RecursionError) as error:
        raise FileError(f"{source}: expected regular expressions, got {excerpt(text)} ({error})") from None
