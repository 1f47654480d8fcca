"""Prints what an extra of pyproject.toml requires, one per line. Installing the extra would compile the package."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def required(extra: str) -> Iterator[str]:
    for requirement in project["optional-dependencies"][extra]:
        own = re.fullmatch(rf"{project['name']}\[(.*)\]", requirement)
        if own:
            for name in own[1].split(","):
                yield from required(name)
        else:
            yield requirement


print("\n".join(required(sys.argv[1])))
