"""Commands on another simulated card than that of the tests."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def simulate(options: list[str], command: list[str | pathlib.Path]) -> subprocess.CompletedProcess[str]:
    """Runs a command under cudasim with these options. Python scripts of this folder need no path."""
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD" and not k.startswith("CUDASIM_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    if "CUDASIM_BUILD" in os.environ:
        environment["CUDASIM_BUILD"] = os.environ["CUDASIM_BUILD"]
    if str(command[0]).endswith(".py"):
        command = [sys.executable, HERE / command[0], *command[1:]]
    return subprocess.run(
        [HERE.parents[1] / "cudasim", *options, *command], env=environment, capture_output=True, text=True
    )
