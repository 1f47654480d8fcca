"""Random damage to the bytes of files, and to the values of their JSON."""

from __future__ import annotations

import json
import random
from typing import Any

_HOSTILE = (
    b"\x00",
    b"\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\x1b[2J",
    b'"',
    b"{",
    b"]",
    b"\n",
    b"\xe2\x80\xa8",
)


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _values(draw: random.Random) -> Any:
    return draw.choice(
        [
            None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63 - 1, 2**63, -(2**64), 10**30, 0.5, -1e308, 1e-320,
            float("nan"), float("inf"), "", "a", "0", "\x00", "\x1b[2J", "\ud800", "../..", "/", "x" * 300,
            "x" * 100_000, [], [[]], {}, {"a": {}}, [None], _nested(70), _nested(900),
        ]
    )  # fmt: skip


def mutate_bytes(draw: random.Random, data: bytes, within: int | None = None) -> bytes:
    """``data`` with one to three changes within its first ``within`` bytes."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        end = min(len(changed), within or len(changed))
        if not end:
            break
        at = draw.randrange(end)
        size = min(draw.choice((1, 2, 8, 64, 1000)), end - at)
        kind = draw.randrange(6)
        if kind == 0:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            del changed[at : at + size]
        elif kind == 3:
            changed[at:at] = changed[at : at + size]
        elif kind == 4:
            changed[at:at] = draw.choice(_HOSTILE)
        else:
            hostile = draw.choice(_HOSTILE)
            changed[at : at + len(hostile)] = hostile
    return bytes(changed)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """All containers in ``value``, with each of their keys."""
    found: list[tuple[Any, Any]] = []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        found.append((value, key))
        found += _places(part)
    return found


def mutate_json(draw: random.Random, data: bytes) -> bytes:
    """JSON ``data`` with a value replaced, removed or doubled; every fourth time its bytes are damaged instead."""
    if draw.random() < 0.25:
        return mutate_bytes(draw, data)
    value = json.loads(data)
    places = _places(value)
    if not places or draw.random() < 0.1:
        return json.dumps(_values(draw)).encode()
    for _ in range(draw.randint(1, 2)):
        container, key = draw.choice(places)
        if (isinstance(container, dict) and key not in container) or (
            isinstance(container, list) and key >= len(container)
        ):
            continue  # removed by the previous mutation
        kind = draw.randrange(4)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[draw.choice((key + "x", "\x1b[2J", ""))] = container.pop(key)
        elif kind == 1:
            container.append(container[key])
        else:
            container[key] = _values(draw)
    return json.dumps(value).encode()
