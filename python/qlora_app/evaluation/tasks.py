"""What models are asked: the questions of a task, and how answers are graded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from ..data import Message

_ANSWER, _END = "<answer>", "</answer>"
_THOUGHT = "</think>"


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of a task.

    Attributes:
        prompt: messages, which get the chat template, or a text that the model continues as it is.
        expected: the right answer, or one of several, for the record.
        grade: makes the score of an answer, 0 to 1. An answer is right if its score is 1.
        stops: texts that end an answer. They are not part of it.
    """

    prompt: list[Message] | str
    expected: Any
    grade: Callable[[str], float]
    stops: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions, and the name under which ``--task`` asks them."""

    name: str
    questions: list[Question]

    @property
    def digest(self) -> str:
        """SHA-256 over the questions."""
        return digest_of([question.prompt, question.expected] for question in self.questions)


def digest_of(questions: Iterable[Any]) -> str:
    """SHA-256 over JSON values."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps(question, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


Find: TypeAlias = "Callable[[str, int | None, int], Task]"  # the name, the most questions, and the seed


def final_answer(text: str) -> str:
    """The answer in a model's ``text``: after its thoughts, and in the last <answer> tags, if there are any."""
    text = text.rpartition(_THOUGHT)[2]
    _, tag, rest = text.rpartition(_ANSWER)
    return (rest.partition(_END)[0] if tag else text).strip()
