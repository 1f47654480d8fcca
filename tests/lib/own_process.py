"""Runs a test file as a program in a separate process, for state that a process reads once, counts or logs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping


def run_file(
    file: str, *arguments: object, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Runs ``python file arguments`` with the module path of this process."""
    run = subprocess.run(
        [sys.executable, file, *map(str, arguments)],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run
