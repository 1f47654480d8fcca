"""Campaigns of random problems in child processes. A crash is reported with its problem, and the campaign continues.

A child is a script that calls ``serve``: it names every problem before it runs it. QLORA_ATTACK (default 1) multiplies
the number of problems, QLORA_ATTACK_SEED (default 0) seeds them. A problem depends only on the seed, its number and the
name of the campaign. This repeats number 12 of seed 7:

    PYTHONPATH=tests/lib python tests/attack/guarded_problems.py guarded 7 12 13
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping

HERE = pathlib.Path(__file__).parent
SEED = int(os.environ.get("QLORA_ATTACK_SEED", "0"))
SECONDS_A_PROBLEM = 120
ENOUGH_FAULTS = 40

# A problem's description, and the function that runs it, which returns the error found, or None.
Problem = tuple[str, Callable[[], str | None]]


def count(problems: int) -> int:
    """``problems`` times QLORA_ATTACK, if set."""
    return problems * int(os.environ.get("QLORA_ATTACK", "1"))


def serve(problems: Mapping[str, Callable[[random.Random], Problem]]) -> None:
    """Runs in the child the problems from number ``first`` up to ``last`` that its arguments name."""
    kind, seed, first, last = sys.argv[1], *map(int, sys.argv[2:5])
    for i in range(first, last):
        name, run = problems[kind](random.Random(f"{kind} {seed} {i}"))
        print(f"problem {i} of seed {seed}: {name}", flush=True)
        faulthandler.dump_traceback_later(SECONDS_A_PROBLEM, exit=True)
        wrong = run()
        faulthandler.cancel_dump_traceback_later()
        if wrong:
            print(f"wrong: {wrong}", flush=True)


@dataclasses.dataclass
class Report:
    problems: int
    faults: list[str]


def ends_of(text: str, length: int = 1500) -> str:
    """The beginning of ``text``, where a sanitizer says what it found, and its end, where Python says where."""
    return text if len(text) <= 2 * length else f"{text[:length]}\n...\n{text[-length:]}"


def attack(script: str, kind: str, problems: int, **environment: str) -> Report:
    """Runs a campaign. After a crash, a new child continues with the next problem."""
    path = os.pathsep.join([str(HERE.parent / "lib"), *filter(None, [os.environ.get("PYTHONPATH")])])
    first, faults = 0, []
    while first < problems and len(faults) < ENOUGH_FAULTS:
        child = subprocess.run(
            [sys.executable, str(HERE / script), kind, str(SEED), str(first), str(problems)],
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            errors="replace",
        )
        current = None
        for line in child.stdout.splitlines():
            if line.startswith("problem "):
                current = line
            elif line.startswith("wrong: "):
                faults.append(f"{current}\n  {line}")
        if child.returncode == 0:
            return Report(problems, faults)
        end = signal.Signals(-child.returncode).name if child.returncode < 0 else f"exit status {child.returncode}"
        if current is None:
            raise AssertionError(f"{script} did not start: {end}\n{child.stderr}")
        faults.append(f"{current}\n  died: {end}\n{ends_of(child.stderr)}")
        first = int(re.match(r"problem (\d+)", current)[1]) + 1
    return Report(first, faults)


def assert_survived(report: Report) -> None:
    assert report.problems > 0
    assert not report.faults, f"{len(report.faults)} faults in {report.problems} problems:\n" + "\n".join(report.faults)
