"""Small programs that print what the plain C++ headers of cuda/ choose."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def printed_by(source: str, folder: pathlib.Path, given: str = "") -> Any:
    """The JSON that the program in ``source``, a path from the root of the tree, prints when it reads ``given``; it is
    built in ``folder``."""
    executable = folder / "print"
    options = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}"]
    subprocess.run(["g++", *options, ROOT / source, "-o", executable], check=True)
    return json.loads(subprocess.run([executable], input=given, check=True, capture_output=True, text=True).stdout)
