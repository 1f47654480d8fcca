"""A conversation with a model, whose answers are shown while they are generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TextStreamer

from ..data import Message, as_prompt, formatted_tokens, tokenizing
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
    """The messages of a user and a model, formatted as in ``finetune``.

    Args:
        system: the system prompt, or "".
        max_new_tokens, temperature: as in ``complete``.
    """

    def __init__(self, model: Any, tokenizer: Any, system: str, max_new_tokens: int, temperature: float) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._temperature = temperature
        limit = validate_model.longest_input(model)
        self._new = min(max_new_tokens, limit // 2) if limit else max_new_tokens
        self._max_prompt = limit - self._new if limit else None  # for the prompt, in tokens
        self._messages: list[Message] = []

    def reset(self) -> None:
        self._messages = []

    def _prompt(self, messages: list[Message]) -> list[int]:
        with tokenizing("the message"):
            ids = formatted_tokens(self._tokenizer, as_prompt(self._tokenizer, [*self._system, *messages]))
        validate_model.check_tokens(self._model, [ids])
        return ids

    def answer(self, message: str, show: Callable[[str], None]) -> int:
        """Generates an answer, and calls ``show`` with each piece of it.

        After a KeyboardInterrupt, the part that was shown belongs to the conversation.

        Returns:
            The number of the oldest questions that were dropped because they no longer fit the model's context.

        Raises:
            UserError: the message alone is too long for the model, or cannot be encoded. The conversation is unchanged.
        """
        messages = [*self._messages, {"role": "user", "content": message}]
        prompt = self._prompt(messages)
        forgotten = 0
        while self._max_prompt is not None and len(prompt) > self._max_prompt:
            if len(messages) == 1:
                raise UserError(
                    f"the message has {len(prompt)} tokens; the model has room for {self._max_prompt} before its answer"
                )
            messages = messages[2:]
            forgotten += 1
            prompt = self._prompt(messages)
        streamer = _Streamer(self._tokenizer, show)
        try:
            complete(self._model, self._tokenizer, prompt, self._new, self._temperature, streamer)
        finally:
            self._messages = [*messages, {"role": "assistant", "content": streamer.text.strip()}]
        return forgotten
