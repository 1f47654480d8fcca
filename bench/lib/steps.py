"""Runs programs one after another, each in its own process group, and reports what became of each. No torch here."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GRACE = 20.0  # seconds in which an interrupted program may print what it has found; pytest-xdist waits 10 for workers


class Outcome(enum.Enum):
    PASSED = "passed"
    FAILED = "failed"
    MAY_FAIL = "failed, as it may"
    NOT_RUN = "not run"


@dataclasses.dataclass
class Step:
    """A program.

    Attributes:
        share: weight of this step when the time that is left is divided among the steps that are left.
        missing: why the step cannot run here.
        may_fail: whether a failure is only reported, and leaves the exit status as it is.
    """

    name: str
    command: list[str]
    share: float = 1.0
    missing: str | None = None
    may_fail: bool = False


@dataclasses.dataclass
class Result:
    step: Step
    outcome: Outcome
    reason: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.step.name}: {self.outcome.value}" + (f": {self.reason}" if self.reason else "")


def signal_group(group: int, number: signal.Signals) -> None:
    """Sends a signal to every process of a group, if there is one left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _take_interrupts() -> None:
    """Has a new process end at an interrupt, which it would ignore below a background job of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(step: Step, seconds: float | None = None) -> Result:
    """Runs a step for at most `seconds`. No process that it started in its group survives it.

    At the limit, the group is interrupted first, as by Ctrl-C, so that pytest still prints its failures.
    """
    if step.missing is not None:
        return Result(step, Outcome.NOT_RUN, step.missing)
    start = time.perf_counter()
    process = subprocess.Popen(step.command, cwd=ROOT, start_new_session=True, preexec_fn=_take_interrupts)
    reason = ""
    try:
        status = process.wait(seconds)
        reason = f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        reason = f"stopped after {seconds:.0f} s"
        signal_group(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        signal_group(process.pid, signal.SIGKILL)
        process.wait()
    outcome = Outcome.PASSED
    if reason:
        outcome = Outcome.MAY_FAIL if step.may_fail else Outcome.FAILED
    return Result(step, outcome, reason, time.perf_counter() - start)


def run_all(
    steps: Sequence[Step], seconds: float | None = None, save: Callable[[Result], None] = lambda result: None
) -> list[Result]:
    """Runs the steps in order, and prints and saves the result of each. `seconds` limits all of them together."""
    start, results = time.perf_counter(), []
    for i, step in enumerate(steps):
        spent = time.perf_counter() - start
        print(f"\n== {step.name} ({spent:.0f} s)", flush=True)
        limit = None
        if seconds is not None:
            limit = max(0.0, seconds - spent) * step.share / sum(later.share for later in steps[i:])
        results.append(run(step, limit))
        print(results[-1], flush=True)
        save(results[-1])
    return results


def summary(results: Sequence[Result]) -> int:
    """Prints how many steps passed and names the others. Returns the exit status: 0 if all passed, or may fail."""
    count = {outcome: sum(r.outcome is outcome for r in results) for outcome in Outcome}
    print(f"\n== of {len(results)} steps, " + ", ".join(f"{n} {outcome.value}" for outcome, n in count.items() if n))
    for result in results:
        if result.outcome is not Outcome.PASSED:
            print(f"   {result}")
    return 1 if count[Outcome.FAILED] or count[Outcome.NOT_RUN] else 0
