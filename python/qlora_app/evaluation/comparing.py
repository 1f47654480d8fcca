"""``evaluate compare``: whether two models differ, by their answers to the same questions."""

from __future__ import annotations

import os
from typing import Any

from qlora_ext.untrusted import excerpt

from ..errors import UserError, as_arguments, path_named
from .answer_file import AnswerFile
from .statistics import mcnemar


def compare(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> dict[str, Any]:
    """Compares two models by their answers to the same questions, with McNemar's exact test.

    Args:
        first, second: files that ``evaluate(output=...)`` wrote, with the same tasks.

    Returns:
        ``models``, and for each of the ``tasks`` the number of ``questions``, the ``accuracies``, how many questions
        ``only_first`` and ``only_second`` answered correctly, and the two-sided ``p`` value.

    Raises:
        ValueError: a file is missing or damaged, or answers are missing; or the files have other tasks or questions.

    Example:
        >>> from qlora_app.evaluation import compare
        >>> def is_worse(quantized, dense):
        ...     task = compare(quantized, dense)["tasks"][0]
        ...     return task["only_first"] < task["only_second"] and task["p"] < 0.05
    """
    try:
        return compared(os.fspath(first), os.fspath(second))
    except UserError as error:
        raise ValueError(as_arguments(str(error))) from error


def compared(first: str, second: str) -> dict[str, Any]:
    """Like ``compare``.

    Raises:
        UserError: instead of the ValueError.
    """
    files = [AnswerFile.read(path_named(name, "compare")) for name in (first, second)]
    for file in files:
        file.require_complete()
    one, other = (file.tasks for file in files)
    for name in one.keys() ^ other.keys():
        raise UserError(
            f"compare: only one file has answers to {excerpt(name)}; evaluate both models on the same tasks"
        )
    found = []
    for name, answers in one.items():
        if answers.digest != other[name].digest:
            raise UserError(
                f"compare: the files have other questions of {excerpt(name)}; use the same --seed, --limit and versions"
            )
        both = [(record["correct"], other[name].records[i]["correct"]) for i, record in answers.records.items()]
        only = both.count((True, False)), both.count((False, True))
        found.append(
            {
                "task": name,
                "questions": answers.questions,
                "accuracies": [each.correct / each.questions for each in (answers, other[name])],
                "only_first": only[0],
                "only_second": only[1],
                "p": mcnemar(*only),
            }
        )
    return {"models": [_title(file) for file in files], "test": "McNemar, exact, two-sided", "tasks": found}


def _title(file: AnswerFile) -> str:
    adapter = file.head.get("adapter")
    return f"{file.head['model']} with {adapter}" if adapter else str(file.head["model"])
