"""Turns tokens into text while they are written: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT = 4  # tokens before the answer, because some tokenizers drop the space at the beginning of a text
_MAX_BYTES = 4  # of a character in UTF-8
_MAX_INCOMPLETE = 32  # tokens that are held. More than a character has, because some decoders join a run of bytes
_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not a whole character


class _Decoder:
    """Decodes an answer token by token.

    The text of a token depends on the tokens before it, so each is decoded twice: the last tokens with and without it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        for count in range(_CONTEXT, _CONTEXT + _MAX_BYTES):  # until the context does not begin inside a character
            self._tokens = list(prompt[-count:])
            self._before = self._text(self._tokens)
            if _REPLACEMENT not in self._before:
                break
        self._decoded = len(self._tokens)  # how many of the tokens have been returned as text

    def _text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def push(self, token: int) -> str:
        """The text that ends with ``token``; empty inside a character."""
        self._tokens.append(token)
        text = self._text(self._tokens)
        incomplete = text.endswith(_REPLACEMENT) or len(text) <= len(self._before)
        if incomplete and len(self._tokens) - self._decoded < _MAX_INCOMPLETE:
            return ""
        return self._advance(text)

    def finish(self) -> str:
        """The text of the tokens that end inside a character."""
        return self._advance(self._text(self._tokens))

    def _advance(self, text: str) -> str:
        new = text[len(self._before) :]
        self._tokens = self._tokens[self._decoded :] or self._tokens
        self._decoded = len(self._tokens)
        self._before = self._text(self._tokens)
        return new


class AnswerText:
    """The text of an answer, up to the first stop string, which is not part of it.

    Args:
        prompt: the tokens before the answer.
        stops: the stop strings.

    Attributes:
        stopped: whether a stop string was found.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._decoder = _Decoder(tokenizer, prompt)
        self._stops = stops
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is now certain to belong to the answer."""
        return self._release(self._decoder.push(token))

    def finish(self) -> str:
        """The rest of the text, when no token follows."""
        text = self._release(self._decoder.finish())
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` with which ``stop`` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
