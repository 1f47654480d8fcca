"""Python scripts on another simulated card than that of the tests."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def run_script(options: list[str], script: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a script of this folder under cudasim with these options."""
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD" and not k.startswith("CUDASIM_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    if "CUDASIM_BUILD" in os.environ:
        environment["CUDASIM_BUILD"] = os.environ["CUDASIM_BUILD"]
    command = [HERE.parents[1] / "cudasim", *options, sys.executable, HERE / script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)
