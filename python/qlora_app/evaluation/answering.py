"""Answers to many questions by batched decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ..data import as_prompt, formatted_tokens, tokenizing
from ..decoding import BREAK_EVEN_TOKENS, BatchDecoder, DecodeRequest, Sampling
from ..errors import UserError
from ..models import validate_model
from ..special_tokens import prompt_tokens
from .tasks import Question, Task


@dataclasses.dataclass
class _Asked:
    task: Task
    number: int
    ids: list[int]  # of the prompt
    sampling: Sampling

    @property
    def question(self) -> Question:
        return self.task.questions[self.number]


def answered(
    model: Any,
    tokenizer: Any,
    questions: Iterable[tuple[Task, int]],
    *,
    system: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    sequences: int,
    compiled: bool | None,
    progress: Callable[[str], object],
) -> Iterator[dict[str, Any]]:
    """The line of each answer for an ``AnswerFile``, in the order in which answers end.

    Args:
        questions: a task and the number of a question in it, for each.
        system: the system prompt, or "".
        max_new_tokens, temperature: of an answer. Answers are shorter where the model's context ends.
        seed: of the sampling of the first question of each task.
        sequences: answers that are written at once.
        compiled: as for ``BatchDecoder``, except that None compiles only if that saves time.
        progress: as for ``BatchDecoder``.

    Raises:
        UserError: the tokenizer cannot encode a question, it leaves no room for an answer, or the model computes NaN.
    """
    limit = validate_model.longest_input(model)
    asked = []
    for task, number in questions:
        place = f"--task {task.name}, question {number + 1}"
        with tokenizing(place):
            ids = _prompt(tokenizer, task.questions[number].prompt, system)
        room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(ids))
        if not ids or room < 1:
            raise UserError(
                f"{place}: expected 1 to {(limit or 2) - 1} tokens, got {len(ids)}; the model reads {limit}"
            )
        asked.append(_Asked(task, number, ids, Sampling(room, temperature, seed=seed + number)))
    if not asked:
        return
    validate_model.check_tokens(model, [one.ids for one in asked])
    if compiled is None and max_new_tokens * len(asked) // sequences < BREAK_EVEN_TOKENS:
        compiled = False
    capacity = max(len(one.ids) + (one.sampling.max_new_tokens or 0) for one in asked)
    try:  # reproducible, so that a resumed run gives the answers of an uninterrupted one
        engine = BatchDecoder(model, sequences, capacity, compiled, progress, reproducible=True)
    except ValueError as error:
        raise UserError(f"--model: {str(error).removeprefix('model: ')}") from error
    yield from _decoded(engine, tokenizer, asked)


def _prompt(tokenizer: Any, prompt: Any, system: str) -> list[int]:
    if isinstance(prompt, str):
        return prompt_tokens(tokenizer, prompt)
    if system and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}, *prompt]
    return formatted_tokens(tokenizer, as_prompt(tokenizer, prompt))


def _decoded(engine: BatchDecoder, tokenizer: Any, asked: Sequence[_Asked]) -> Iterator[dict[str, Any]]:
    waiting = iter(asked)
    running: dict[DecodeRequest, _Asked] = {}
    while True:
        while len(running) < engine.sequences and (one := next(waiting, None)) is not None:
            running[engine.submit(one.ids, one.sampling, on_token=_stopper(tokenizer, one.question.stops))] = one
        if not running:
            return
        engine.step()
        for request in [request for request in running if request.done]:
            yield _record(running.pop(request), request, tokenizer)


def _stopper(tokenizer: Any, stops: tuple[str, ...]) -> Callable[[DecodeRequest, int], None] | None:
    if not stops:
        return None

    def stop(request: DecodeRequest, token: int) -> None:
        if any(text in _text(tokenizer, request) for text in stops):
            request.cancel()

    return stop


def _text(tokenizer: Any, request: DecodeRequest) -> str:
    text: str = tokenizer.decode(request.tokens, skip_special_tokens=True)
    return text


def _record(asked: _Asked, request: DecodeRequest, tokenizer: Any) -> dict[str, Any]:
    if request.error is not None:
        raise UserError(f"--task {asked.task.name}, question {asked.number + 1}: {request.error}") from request.error
    question, text = asked.question, _text(tokenizer, request)
    end = min((text.index(stop) for stop in question.stops if stop in text), default=len(text))
    text = text[:end]
    score = question.grade(text)
    return {
        "task": asked.task.name,
        "id": asked.number,
        "prompt": question.prompt,
        "expected": question.expected,
        "answer": text,
        "tokens": len(request.tokens),
        "finish_reason": "stop" if request.finish_reason == "cancelled" else request.finish_reason,
        "score": score,
        "correct": score == 1,
    }
