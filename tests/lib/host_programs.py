"""Programs of a few lines that print what the plain C++ headers of cuda/ choose."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def printed_by(program: str, folder: pathlib.Path) -> Any:
    """The JSON that ``program``, C++ source that includes from the root of the tree, prints."""
    source, executable = folder / "print.cpp", folder / "print"
    source.write_text(program)
    options = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}"]
    subprocess.run(["g++", *options, source, "-o", executable], check=True)
    return json.loads(subprocess.run([executable], check=True, capture_output=True, text=True).stdout)
