"""Regular expressions from files. Python's matcher backtracks, so some of them take years to match a short name."""

from __future__ import annotations

import re
from typing import Any

from .untrusted import FileError, excerpt

try:
    from re import _parser as _parsing  # type: ignore[attr-defined,unused-ignore]
except ImportError:  # Python 3.10
    import sre_parse as _parsing  # type: ignore[no-redef,unused-ignore]

_MAX_LENGTH = 4096
_NAME = 100  # characters of a module's name
_MAX_WAYS = 1e12  # five repetitions of any length in a row, with a few alternatives


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


def compiled(text: str, source: str) -> re.Pattern[str]:
    """The regular expression ``text``, which was read from ``source``.

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
