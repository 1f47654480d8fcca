"""A test file run again on each of the CPU's other instruction sets, in a process of its own that forces it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qlora_ext import _C

FORCED = os.environ.get("QLORA_CPU_ISA")


@pytest.mark.skipif(FORCED is not None, reason="QLORA_CPU_ISA is set: only that instruction set is tested")
@pytest.mark.parametrize("isa", [isa for isa in _C.cpu_isas() if isa != _C.cpu_isa()])
def test_on(isa: str, request: pytest.FixtureRequest) -> None:
    """A file takes part by `test_on = isas.test_on`; its tests run in this process on the set in use by default."""
    selection = request.config.getoption("markexpr")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", selection, "-p", "no:cacheprovider", str(request.path)],
        env={**os.environ, "QLORA_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.mark.skipif(FORCED is None, reason="no instruction set is forced: nothing to confirm")
def test_forced_instruction_set_runs() -> None:
    assert _C.cpu_isa() == FORCED
