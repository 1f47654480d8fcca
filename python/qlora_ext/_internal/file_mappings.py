"""The files that this process has mapped into its memory."""

from __future__ import annotations

import sys
from typing import NamedTuple


class FileMapping(NamedTuple):
    """The addresses from ``begin`` to ``end`` hold the content of the file ``path`` from ``offset`` on."""

    begin: int
    end: int
    offset: int
    inode: int
    path: str


def file_mappings() -> list[FileMapping]:
    """Every mapping of a file in this process; none except on Linux."""
    if sys.platform != "linux":
        return []
    found = []
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/"):
                begin, _, end = fields[0].partition("-")
                found.append(FileMapping(int(begin, 16), int(end, 16), int(fields[2], 16), int(fields[4]), fields[5]))
    return found
