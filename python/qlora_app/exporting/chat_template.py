"""Translates a model's chat template, which is Jinja, into the templates of Go that Ollama reads.

Most templates put each message between two constant texts. Those texts are cut out of rendered conversations, put into
a Go template, and checked on other conversations. A template that does more than that is not translated.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .. import data
from ..special_tokens import special_tokens

Message = data.Message

# Texts that no template contains, for a system message, questions and answers.
_SYSTEM, _QUESTION, _ANSWER, _NEXT = (f"qlora{name}text" for name in ("system", "question", "answer", "next"))


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _system(text: str) -> Message:
    return {"role": "system", "content": text}


_TALK = [
    _user("How far is the moon?"), _assistant("About 384,000 km:\none light second."), _user("And \"the sun\"?"),
    _assistant("500 light seconds."), _user("Thanks."),
]  # fmt: skip
_SAMPLES = (_TALK[:1], _TALK[:3], _TALK)
_RULES = _system("Answer briefly.\nUse metric units.")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A conversation as constant texts around its messages.

    Attributes:
        default: what precedes the first question if there is no system message.
        system: what surrounds the system message; None if the model has none. If ``in_question``, the message is inside
            the first question, and the second text separates them.
        user, assistant: what surrounds a question and an answer.
        end: what begins the next answer.
    """

    default: str
    system: tuple[str, str] | None
    in_question: bool
    user: tuple[str, str]
    assistant: tuple[str, str]
    end: str

    def render(self, messages: list[Message]) -> str:
        """The prompt of a conversation, as the Go template renders it."""
        system = next((m["content"] for m in messages if m["role"] == "system"), "")
        has_system = bool(system) and self.system is not None
        before, after = self.system or ("", "")
        found = before + ("" if self.in_question else system + after) if has_system else self.default
        first = f"{system}{after}" if has_system and self.in_question else ""
        for m in messages:
            if m["role"] == "user":
                found, first = found + self.user[0] + first + m["content"] + self.user[1], ""
            elif m["role"] == "assistant":
                found += self.assistant[0] + m["content"] + self.assistant[1]
        return found + self.end

    @property
    def go(self) -> str:
        """The template in Go's language."""
        user, assistant = (f"{before}{{{{ .Content }}}}{after}" for before, after in (self.user, self.assistant))
        begin = self.default
        if self.system is not None:
            before, after = self.system
            otherwise = f"{{{{ else }}}}{self.default}" if self.default else ""
            if not self.in_question:
                begin = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{otherwise}{{{{ end }}}}"
            else:
                begin = f"{{{{ if .System }}}}{before}{otherwise}{{{{ end }}}}" if before or otherwise else ""
                begin += "{{ $first := true }}"
                user = (
                    f"{self.user[0]}{{{{ if and $first $.System }}}}{{{{ $.System }}}}{after}{{{{ end }}}}"
                    f"{{{{ $first = false }}}}{{{{ .Content }}}}{self.user[1]}"
                )
        return (
            f'{begin}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{user}'
            f'{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}{{{{ end }}}}{self.end}'
        )

    @property
    def texts(self) -> tuple[str, ...]:
        """All constant texts."""
        return self.default, *(self.system or ()), *self.user, *self.assistant, self.end


class _Unfit(Exception):
    """The template is more than constant texts around messages."""


def fit(tokenizer: Any) -> ChatTemplate | None:
    """The chat template of a tokenizer, or None if it has none, or one that does not fit.

    A beginning that the tokenizer adds to every text is left out, because Ollama adds it too.
    """
    if not tokenizer.chat_template or "strftime_now" in str(tokenizer.chat_template):
        return None  # the date of the export would be in the template
    beginning, _ = special_tokens(tokenizer)
    bos = tokenizer.bos_token if beginning[:1] == [tokenizer.bos_token_id] else None

    def render(messages: list[Message], begin: bool = True) -> str | None:
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begin)
        except Exception:  # templates raise arbitrary errors for roles that they do not know
            return None
        return str(text).removeprefix(bos or "")

    try:
        found = _cut(render)
    except _Unfit:
        return None
    samples = [*_SAMPLES, *([_RULES, *talk] for talk in _SAMPLES if found.system is not None)]
    fits = all(render(sample) == found.render(sample) for sample in samples)
    return found if fits and not any(mark in text for text in found.texts for mark in ("{{", "}}", '"""')) else None


def _cut(render: Any) -> ChatTemplate:
    """The constant texts in rendered conversations.

    Raises:
        _Unfit: a message is missing in one, or does not have the same surroundings everywhere.
    """
    before, opened = _parts(render([_user(_QUESTION)]), _QUESTION)
    _, closed = _parts(render([_user(_QUESTION)], False), _QUESTION)
    end = _without(opened, closed, at_end=False)
    first, answered, between, last = _parts(
        render([_user(_QUESTION), _assistant(_ANSWER), _user(_NEXT)]), _QUESTION, _ANSWER, _NEXT
    )
    _, _, answer_end = _parts(render([_user(_QUESTION), _assistant(_ANSWER)], False), _QUESTION, _ANSWER)
    if first != before or last != opened:
        raise _Unfit
    user = _without(between, answer_end, at_end=False), closed
    assistant = _without(answered, closed, at_end=False), answer_end
    default = _without(before, user[0], at_end=True)
    with_system = render([_system(_SYSTEM), _user(_QUESTION)])
    if with_system is None or _SYSTEM not in with_system:
        return ChatTemplate(default, None, False, user, assistant, end)
    begin, middle, _ = _parts(with_system, _SYSTEM, _QUESTION)
    if middle.endswith(user[0]) and user[0]:
        system = begin, _without(middle, user[0], at_end=True)
        return ChatTemplate(default, system, False, user, assistant, end)
    return ChatTemplate(default, (_without(begin, user[0], at_end=True), middle), True, user, assistant, end)


def _parts(text: str | None, *messages: str) -> list[str]:
    """The texts before, between and after the messages, each of which occurs once."""
    found = []
    for message in messages:
        before, separator, text = (text or "").partition(message)
        if not separator:
            raise _Unfit
        found.append(before)
    return [*found, text or ""]


def _without(text: str, part: str, at_end: bool) -> str:
    """``text`` without the ``part`` at its end or beginning."""
    if not (text.endswith(part) if at_end else text.startswith(part)):
        raise _Unfit
    return text.removesuffix(part) if at_end else text.removeprefix(part)
