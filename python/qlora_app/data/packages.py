"""The package with openly licensed text."""

from __future__ import annotations

from qlora_ext.untrusted import Schema, check, excerpt, parse_json, printable, read_text

from ..errors import UserError
from ..models.sources import PACKAGE, package_files
from .examples import Rows

DEFAULT_DATA = f"{PACKAGE}chitchat-dataset"
_CHITCHAT: Schema = {"messages": [[{"text": str}]]}


def rows(name: str) -> Rows:
    """The rows of ``--data package:chitchat-dataset`` (MIT): conversations; the second person is the assistant.

    Raises:
        UserError: the package is another one, or not installed.
    """
    if name != DEFAULT_DATA:
        raise UserError(
            f"--data {name}: unknown package; expected {DEFAULT_DATA}, a file, a directory or a hub dataset"
        )
    path = next((p for p in package_files("chitchat-dataset", "the text") if p.name == "dataset.json"), None)
    if path is None or not path.is_file():
        raise UserError(f"--data {DEFAULT_DATA}: the package has no dataset.json")
    found = parse_json(read_text(path), printable(path), dict)
    for name, conversation in found.items():
        check(conversation, _CHITCHAT, printable(path), excerpt(name))
        turns = [" ".join(line["text"] for line in turn) for turn in conversation["messages"]]
        if len(turns) > 1:
            messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
            yield f"{printable(path)}, {excerpt(name)}", {"messages": messages}
