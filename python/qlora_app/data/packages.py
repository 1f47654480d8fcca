"""Packages with openly licensed text."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

from qlora_ext.untrusted import Schema, check, excerpt, parse_json, printable, read_text

from ..errors import UserError
from ..models.sources import PACKAGE, package_files
from . import dictd
from .files import Rows

DEFAULT_DATA = f"{PACKAGE}chitchat-dataset"
_CHITCHAT: Schema = {"messages": [[{"text": str}]]}


def _chitchat() -> Rows:
    """chitchat-dataset (MIT): conversations of two people. The second person is the assistant."""
    paths = package_files("chitchat-dataset", "the text")
    path = next((p for p in paths if p.name == "dataset.json"), None)
    if path is None or not path.is_file():
        raise UserError(f"--data {DEFAULT_DATA}: the package has no dataset.json")
    found = parse_json(read_text(path), printable(path), dict)
    for name, conversation in found.items():
        check(conversation, _CHITCHAT, printable(path), excerpt(name))
        turns = [" ".join(line["text"] for line in turn) for turn in conversation["messages"]]
        if len(turns) > 1:
            messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
            yield f"{printable(path)}, {excerpt(name)}", {"messages": messages}


def _jargon() -> Rows:
    """The Jargon File (public domain), from Debian's package dict-jargon."""
    path = pathlib.Path("/usr/share/dictd/jargon.dict.dz")
    if not path.is_file():
        raise UserError(f"the text {PACKAGE}dict-jargon is not installed; install it with: apt-get install dict-jargon")
    return dictd.rows(path)


_PACKAGES: dict[str, Callable[[], Rows]] = {"chitchat-dataset": _chitchat, "dict-jargon": _jargon}


def rows(name: str) -> Rows:
    """The rows of ``--data package:NAME``.

    Raises:
        UserError: the package is unknown, or not installed.
    """
    package = name.removeprefix(PACKAGE)
    if package not in _PACKAGES:
        known = ", ".join(PACKAGE + p for p in _PACKAGES)
        raise UserError(
            f"--data {name}: unknown package; expected one of {known}, a file, a directory or a hub dataset"
        )
    return _PACKAGES[package]()
