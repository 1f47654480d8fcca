"""Reads the kernel simulator's counters of CUDA kernels: a file with one JSON line per launch.

A test file runs its cases in a separate process that executes the same file: `simulated(__file__, ...)`.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from own_process import run_file

needs_counters = [
    pytest.mark.cuda,
    pytest.mark.skipif("CUDASIM_TORCH_LIBRARY" not in os.environ, reason="counters come from the kernel simulator"),
]


class Launch(dict):
    """One launch's counters."""

    @property
    def slots(self) -> float:
        return self["warp_instructions"] * 32

    @property
    def bytes_read(self) -> int:
        return self["global_sectors_read"] * 32

    @property
    def moved(self) -> float:
        """Sectors moved over the minimum possible number."""
        sectors = self["global_sectors_read"] + self["global_sectors_written"]
        return sectors * 32 / (self["unique_bytes_read"] + self["unique_bytes_written"])

    @property
    def conflicts(self) -> float:
        """Share of shared memory wavefronts due to bank conflicts."""
        return 1 - self["shared_wavefronts_ideal"] / max(self["shared_wavefronts"], 1)

    @property
    def warps(self) -> int:
        x, y, z = self["block"]
        return x * y * z // 32


def launches_in(profile: Path) -> list[Launch]:
    return [Launch(json.loads(line)) for line in profile.read_text().splitlines()]


class Recorder:
    """Records in the simulated process which launches belong to which case."""

    def __init__(self, profile: Path) -> None:
        profile.touch()
        self._lines = profile.open()
        self.cases: dict[str, Any] = {}

    def __call__(self, name: str, call: Callable[..., Any], *args: object) -> Any:
        self._lines.readlines()  # of launches before this case
        out = call(*args)
        self.cases[name] = [json.loads(line) for line in self._lines.readlines()]
        return out


def simulated(script: str, arch: str, profile: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``script PROFILE`` simulating an architecture, without checks; writes the launches to ``profile``."""
    simulator = {"CUDASIM_ARCH": arch, "CUDASIM_PROFILE": str(profile), "CUDASIM_CHECK": ""}
    return run_file(script, profile, environment={**os.environ, **simulator, **environment})


def cases_printed(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The cases that a ``Recorder`` printed last in the process."""
    cases: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return cases
