"""Selects the files to read in a directory of data files."""

from __future__ import annotations

import pathlib
import re

from qlora_ext.untrusted import excerpt, printable

from ..errors import UserError
from ..outputs.files import is_unfinished_name
from ..outputs.ownership import MARKER, is_ours
from .examples import Rows
from .files import READERS, reader_of
from .hub import is_saved

_SPLITS = {"training": "train", "testing": "test", "valid": "validation", "val": "validation", "dev": "validation"}
_KNOWN = {"train", "test", "validation", *_SPLITS}


def _split_of(path: pathlib.Path) -> str | None:
    """The split that the name of a file or its folder gives: train for train-00000-of-00002.parquet."""
    words = [word for part in reversed(path.parts) for word in re.split("[^a-z]+", part.lower())]
    found = next((word for word in words if word in _KNOWN), None)
    return found and _SPLITS.get(found, found)


def rows(directory: pathlib.Path, split: str, prompts: bool) -> Rows:
    """The rows of all data files in a directory, sorted by name; of one split only, if the names contain splits.

    Directories with our marker, such as a run's output, are skipped.

    Raises:
        UserError: the directory has no data files, or none of that split.
    """
    shown = printable(directory)
    ours = {path.parent for path in directory.rglob(MARKER) if path.parent != directory and is_ours(path.parent)}

    def is_data(path: pathlib.Path) -> bool:
        """Whether ``path`` is a regular file, not hidden, and not written by one of our commands."""
        within = path.relative_to(directory)
        return (
            path.is_file()
            and not path.name.startswith((".", "dataset_info"))  # which datasets writes beside its data
            and not any(is_unfinished_name(part) for part in within.parts)
            and ours.isdisjoint(path.parents)
        )

    files = sorted(filter(is_data, directory.rglob("*")))
    readers = {path: reader for path in files if (reader := reader_of(path)) is not None}
    data = [*readers]
    if not data:
        raise UserError(f"--data {shown}: expected files in it that end in {', '.join(READERS)}; found none")
    if saved := next((path.parent for path in data if path.suffix == ".arrow" and is_saved(path.parent)), None):
        raise UserError(f"--data {shown}: {printable(saved)} was written by save_to_disk; name that directory alone")
    splits = {path: _split_of(path.relative_to(directory)) for path in data}
    named = {name for name in splits.values() if name}
    if named:
        wanted = _SPLITS.get(split, split)
        if wanted not in named:
            raise UserError(
                f"--data {shown}: no split {excerpt(split)}; --split takes one of {', '.join(sorted(named))}"
            )
        data = [path for path in data if splits[path] == wanted]
    outermost = sorted(path.relative_to(directory) for path in ours if ours.isdisjoint(path.parents))
    left_out = [f"{printable(path)}/ (written by qlora-ext)" for path in outermost]
    left_out += [printable(path.relative_to(directory)) for path in files if path not in data]
    print(
        f"reading {len(data)} files of {shown}"
        + (f"; left out: {excerpt(', '.join(left_out), 400)}" if left_out else "")
    )
    for path in data:
        yield from readers[path](path, split, prompts)
