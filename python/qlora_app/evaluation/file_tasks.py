"""A file of prompts with answers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from qlora_ext.untrusted import excerpt

from ..data import Example, Message, read_examples
from ..errors import UserError
from .tasks import Question, Task, final_answer

_ANSWERS = ("answer", "completion", "response", "output")  # columns, in the order in which they are looked for


def find(name: str, limit: int | None) -> Task:
    """The prompts of a file, or other data that ``finetune --method grpo`` accepts.

    Raises:
        UserError: the data cannot be read, or a row has no answer.
    """
    try:
        examples = read_examples(name, prompts=True)
    except UserError as error:
        raise UserError(str(error).replace("--data", "--task")) from error
    return Task(name, [_question(example, f"--task {name}, row {i}") for i, example in enumerate(examples[:limit], 1)])


def _question(example: Example, place: str) -> Question:
    row: dict[str, Any] = example  # type: ignore[assignment]
    prompt: list[Message] = row["prompt"]
    column = next((name for name in _ANSWERS if row["columns"].get(name) is not None), None)
    if column is None:
        raise UserError(f"{place}: expected an answer in the column {' or '.join(_ANSWERS)}, found none")
    expected = row["columns"][column]
    accepted = expected if isinstance(expected, list) else [expected]
    if not accepted or not all(isinstance(one, str | int | float) and _plain(str(one)) for one in accepted):
        raise UserError(
            f"{place}: expected {column} to be a text, or a list of accepted texts, got {excerpt(expected)}"
        )
    return Question(prompt, expected, functools.partial(_grade, [str(one) for one in accepted]))


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _grade(accepted: Sequence[str], text: str) -> float:
    given = _plain(final_answer(text))
    return float(any(given == _plain(one) for one in accepted))
