"""A plugin of pytest: a test that loses its CUDA context ends its worker of pytest-xdist.

After an illegal access, for example, every later CUDA call of the process fails. pytest-xdist replaces the worker, and
goes on with the next test. Without workers, nothing is done. No torch here.
"""

from __future__ import annotations

import os
import re

import pytest

# The runtime's words for errors after which a context is lost (CUDA runtime API, cudaError).
LOST = re.compile(
    "illegal memory access|unspecified launch failure|device-side assert|misaligned address|illegal instruction"
    "|invalid program counter|operation not supported on global/shared address space|hardware stack error"
    "|launch timed out|uncorrectable ECC error"
)
_reported: set[str] = set()  # in the process that reports: tests that have ended their worker
_is_worker = False


def pytest_configure(config: pytest.Config) -> None:
    """Asks the session itself, because a test may start pytest, which inherits PYTEST_XDIST_WORKER from its worker."""
    global _is_worker
    _is_worker = hasattr(config, "workerinput")


@pytest.hookimpl(trylast=True)  # the report has been sent
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not report.failed or not LOST.search(report.longreprtext):
        return
    if _is_worker:
        os._exit(1)
    _reported.add(report.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str, report: pytest.TestReport) -> None:
    """Has a test that ended its worker reported once: by its own failure, not as a crash too."""
    if crashitem in _reported:
        report.outcome, report.when = "passed", "teardown"  # which is counted nowhere
