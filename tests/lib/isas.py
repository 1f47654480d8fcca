"""Runs test files again for each other instruction set of the CPU, in a separate process that forces it."""

from __future__ import annotations

import functools
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest

from cpu_sources import PROCESSORS
from qlora_ext import _C

FORCED = os.environ.get("QLORA_CPU_ISA")
# Sets that have another set's kernels except for a few, and the files that test those.
PARTIAL = {
    "avx_vnni": (
        "test_kernels_cpu",
        "test_linear_few_tokens_cpu",
        "test_linear_many_tokens_int_cpu",
        "test_int8_activations",
    )
}


def _run(isa: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, arguments)],
        env={**os.environ, "QLORA_CPU_ISA": isa, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def run_on(isa: str, request: pytest.FixtureRequest, **environment: str) -> None:
    """The tests of the requesting file."""
    run = _run(isa, "-x", "-m", request.config.getoption("markexpr"), request.path, **environment)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@functools.cache
def _tests(isa: str, selection: str, files: tuple[pathlib.Path, ...]) -> list[ElementTree.Element]:
    """Runs the tests of the files. Returns what JUnit's format says of each."""
    with tempfile.TemporaryDirectory() as directory:
        report = pathlib.Path(directory, "report.xml")
        run = _run(isa, "-m", selection, f"--junit-xml={report}", *files)
        assert run.returncode in (0, 1), run.stdout[-4000:] + run.stderr[-2000:]
        return [*ElementTree.parse(report).iter("testcase")]


def _adds_to(isa: str, path: pathlib.Path) -> bool:
    """Whether the set has kernels of its own that the file tests."""
    return path.stem in PARTIAL.get(isa, (path.stem,))


def _files(request: pytest.FixtureRequest, isa: str) -> tuple[pathlib.Path, ...]:
    """The files of this run that are tested on ``isa``: one process imports torch for all of them. The workers of
    pytest-xdist each have other files, so they start a process for a file."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return (request.path,)
    tests = (item for item in request.session.items if getattr(item, "function", None) is test_on)
    return tuple(
        sorted({test.path for test in tests if test.callspec.params["isa"] == isa and _adds_to(isa, test.path)})
    )


def on_the_others(test: Callable[..., None]) -> Callable[..., None]:
    """Parametrizes a test by ``isa`` with each other instruction set. The sets that this build lacks are skipped."""
    isas: list[Any] = [isa for isa in _C.cpu_isas() if isa != _C.cpu_isa()]
    for isa in PROCESSORS.get(platform.machine(), []):
        if isa not in _C.build_info()["cpu_isas_built"]:
            isas.append(pytest.param(isa, marks=pytest.mark.skip(reason=f"QLORA_CPU_ISAS left {isa} out")))
    forced = pytest.mark.skipif(FORCED is not None, reason="QLORA_CPU_ISA is set: only that instruction set is tested")
    return forced(pytest.mark.parametrize("isa", isas)(test))


@on_the_others
def test_on(isa: str, request: pytest.FixtureRequest) -> None:
    """A file opts in with `test_on = isas.test_on`. In this process, its tests use the default instruction set."""
    if not _adds_to(isa, request.path):
        pytest.skip(f"{isa} has another set's kernels here")
    tests = _tests(isa, request.config.getoption("markexpr"), _files(request, isa))
    own = [test for test in tests if test.get("classname", "").endswith(f".{request.path.stem}")]
    assert own, f"{request.path.name} has no tests on {isa}"
    failures = [outcome for test in own for outcome in test if outcome.tag in ("failure", "error")]
    assert not failures, f"{len(failures)} tests failed, the first with:\n{(failures[0].text or '')[-4000:]}"


@pytest.mark.skipif(FORCED is None, reason="no instruction set is forced: nothing to confirm")
def test_forced_instruction_set_runs() -> None:
    assert _C.cpu_isa() == FORCED
