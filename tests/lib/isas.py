"""Runs a test file again for each other instruction set of the CPU, in a separate process that forces it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from qlora_ext import _C

FORCED = os.environ.get("QLORA_CPU_ISA")


def run_on(isa: str, request: pytest.FixtureRequest, **environment: str) -> None:
    """The tests of the requesting file."""
    selection = request.config.getoption("markexpr")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", selection, "-p", "no:cacheprovider", str(request.path)],
        env={**os.environ, "QLORA_CPU_ISA": isa, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def on_the_others(test: Callable[..., None]) -> Callable[..., None]:
    """Parametrizes a test by ``isa`` with each instruction set except the default one."""
    forced = pytest.mark.skipif(FORCED is not None, reason="QLORA_CPU_ISA is set: only that instruction set is tested")
    return forced(pytest.mark.parametrize("isa", [isa for isa in _C.cpu_isas() if isa != _C.cpu_isa()])(test))


@on_the_others
def test_on(isa: str, request: pytest.FixtureRequest) -> None:
    """A file opts in with `test_on = isas.test_on`. In this process, its tests use the default instruction set."""
    run_on(isa, request)


@pytest.mark.skipif(FORCED is None, reason="no instruction set is forced: nothing to confirm")
def test_forced_instruction_set_runs() -> None:
    assert _C.cpu_isa() == FORCED
