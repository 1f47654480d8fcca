"""A conversation with a model: what was said, and an answer that is shown while it is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TextStreamer

from ..data import Message, as_prompt, tokenizing
from ..errors import UserError
from ..models import validate_model
from .completion import complete


class _Streamer(TextStreamer):  # type: ignore[misc,unused-ignore]
    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.text else text.lstrip()
        self.text += text
        self._show(text)


class Conversation:
    """What the user and the model said to each other, in the form that ``finetune`` learns.

    Args:
        system: what the model is told before everything else, or "".
        max_new_tokens, temperature: as of ``complete``.
    """

    def __init__(self, model: Any, tokenizer: Any, system: str, max_new_tokens: int, temperature: float) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._temperature = temperature
        limit = validate_model.longest_input(model)
        self._new = min(max_new_tokens, limit // 2) if limit else max_new_tokens
        self._room = limit - self._new if limit else None  # for the prompt, in tokens
        self._said: list[Message] = []

    def reset(self) -> None:
        self._said = []

    def _prompt(self, said: list[Message]) -> list[int]:
        with tokenizing("the message"):
            text = as_prompt(self._tokenizer, [*self._system, *said])
            ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        validate_model.check_tokens(self._model, [ids])
        return ids

    def answer(self, message: str, show: Callable[[str], None]) -> int:
        """Has the model answer, and calls ``show`` with each piece of it.

        After KeyboardInterrupt, what was shown is part of the conversation.

        Returns: how many of the oldest questions were forgotten, for which the model has no room any more.

        Raises:
            UserError: the message alone is longer than the model takes, or cannot be encoded. It is not remembered.
        """
        said = [*self._said, {"role": "user", "content": message}]
        prompt = self._prompt(said)
        forgotten = 0
        while self._room is not None and len(prompt) > self._room:
            if len(said) == 1:
                raise UserError(
                    f"the message has {len(prompt)} tokens; the model has room for {self._room} before its answer"
                )
            said = said[2:]
            forgotten += 1
            prompt = self._prompt(said)
        streamer = _Streamer(self._tokenizer, show)
        try:
            complete(self._model, self._tokenizer, prompt, self._new, self._temperature, streamer)
        finally:
            self._said = [*said, {"role": "assistant", "content": streamer.text.strip()}]
        return forgotten
