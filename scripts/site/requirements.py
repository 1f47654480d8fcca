"""Prints what the extra "docs" of pyproject.toml asks for, one requirement per line; installing the extra itself would
compile the package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
found = re.search(r"^docs = (\[.*?^\])", project, flags=re.M | re.S)
if found is None:
    raise SystemExit("pyproject.toml: expected an extra 'docs', a list over several lines")
print("\n".join(ast.literal_eval(found[1])))
