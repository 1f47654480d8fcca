"""Small programs that print the choices of the plain C++ headers in cuda/."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def built(source: str, folder: pathlib.Path) -> pathlib.Path:
    """Builds the program ``source`` (a path from the root of the tree) in ``folder``."""
    executable = folder / "print"
    options = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}"]
    subprocess.run(["g++", *options, ROOT / source, "-o", executable], check=True)
    return executable


def printed_by(executable: pathlib.Path, given: str = "") -> Any:
    """The JSON that a program prints for the input ``given``."""
    return json.loads(subprocess.run([executable], input=given, check=True, capture_output=True, text=True).stdout)
