"""Turns tokens into text while they are written: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from typing import Any

_CONTEXT = 4  # tokens before the answer, because some tokenizers drop the space at the beginning of a text
_MAX_BYTES = 4  # of a character in UTF-8
_MAX_INCOMPLETE = 32  # tokens that are held. More than a character has, because some decoders join a run of bytes
_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not a whole character


class _Decoder:
    """Decodes an answer token by token.

    The text of a token depends on the tokens before it, so each is decoded twice: the last tokens with and without it.

    Args:
        prompt: the tokens before.
        special: whether special tokens have text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], special: bool = False) -> None:
        self._tokenizer, self._special = tokenizer, special
        for count in range(_CONTEXT, _CONTEXT + _MAX_BYTES):  # until the context does not begin inside a character
            self._tokens = list(prompt[-count:])
            self._before = self._text(self._tokens)
            if _REPLACEMENT not in self._before:
                break
        self._decoded = len(self._tokens)  # how many of the tokens have been returned as text

    def _text(self, tokens: list[int]) -> str:
        options = {"skip_special_tokens": not self._special, "clean_up_tokenization_spaces": False}
        text: str = self._tokenizer.decode(tokens, **options)
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
        decoded: how many characters have been decoded, also of stop strings.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._decoder = _Decoder(tokenizer, prompt)
        self._stops = _shortest(tuple(stops))
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False
        self.decoded = 0

    def push(self, token: int) -> str:
        """The text that is now certain to belong to the answer."""
        return self._release(self._decoder.push(token))

    def finish(self) -> str:
        """The rest of the text, when no token follows."""
        text = self._release(self._decoder.finish())
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, new: str) -> str:
        self.decoded += len(new)
        if self.stopped:
            return ""
        text, certain = self._held + new, None
        for place in range(len(text) if self._stops else 0):
            rest = text[place:]
            # In this order, the last string up to the rest is the only one that the rest can begin with, and those that
            # begin with the rest follow.
            index = bisect.bisect_right(self._stops, rest)
            if index > 0 and rest.startswith(self._stops[index - 1]):
                self.stopped = True
                self._held = ""
                return text[:place]
            if certain is None and index < len(self._stops) and self._stops[index].startswith(rest):
                certain = place
        self._held = "" if certain is None else text[certain:]
        return text[:certain]


@functools.lru_cache(maxsize=1)  # the answers to a request have the same ones
def _shortest(stops: tuple[str, ...]) -> list[str]:
    """The stop strings in order, without those that begin with another one, which would end the answer before."""
    shortest: list[str] = []
    for stop in sorted(stops):
        if not shortest or not stop.startswith(shortest[-1]):
            shortest.append(stop)
    return shortest


def token_places(tokenizer: Any, tokens: Sequence[int], text: str | None) -> tuple[str, list[int]]:
    """The text of a prompt, and the place in it at which each token begins.

    Args:
        text: the text from which the tokens were made, if they were. What a tokenizer adds before it has no text.
    """
    decoder, places, decoded = _Decoder(tokenizer, [], special=True), [], ""
    for token in tokens:
        places.append(len(decoded))
        decoded += decoder.push(token)
    decoded += decoder.finish()
    if text is None:
        return decoded, places
    added = len(decoded) - len(text)
    return text, [min(max(place - added, 0), len(text)) for place in places]
