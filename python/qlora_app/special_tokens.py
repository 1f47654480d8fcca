"""The special tokens with which a tokenizer begins and ends a text.

``special_tokens`` decides for every way into a model: rows to train on, prompts, chats, servers and exports.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def special_tokens(tokenizer: Any, formatted: bool = False) -> tuple[list[int], list[int]]:
    """The token ids that belong before and after a text of ``tokenizer``: those that it adds itself.

    Args:
        formatted: whether a chat template wrote the text. It writes all special tokens, so that none are added.
    """
    if formatted:
        return [], []
    plain, full = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    for begin in range(len(full) - len(plain), -1, -1):
        if full[begin : begin + len(plain)] == plain:
            return full[:begin], full[begin + len(plain) :]
    return [], []


def with_beginning(ids: list[int], beginning: list[int]) -> list[int]:
    """The token ids with ``beginning`` before them, unless they have it already."""
    return ids if ids[: len(beginning)] == beginning else beginning + ids


def prompt_tokens(tokenizer: Any, text: str, formatted: bool = False) -> list[int]:
    """The token ids of a text that a model continues. It gets the tokenizer's beginning, but not its end.

    Args:
        formatted: as in ``special_tokens``.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return with_beginning(ids, special_tokens(tokenizer, formatted)[0])


def sequences(ids: list[int], length: int, beginning: list[int]) -> Iterator[list[int]]:
    """Cuts token ids into sequences of ``length``, the last of which may be shorter. Each has the beginning."""
    beginning = beginning[: length - 1]
    start = 0
    while start < len(ids):
        has_beginning = ids[start : start + len(beginning)] == beginning
        end = start + length - (0 if has_beginning else len(beginning))
        yield with_beginning(ids[start:end], beginning)
        start = end
