"""The answers to a request, as their pieces arrive from the decoder."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ..decoding import DecodeRequest
from .errors import APIError
from .grammar import JSONGrammar
from .loop import DecodingLoop, Listener, LoopEnded, Progress
from .requests import CompletionRequest
from .text import AnswerText
from .tools import ToolCall, ToolCallText

_FINISH_REASONS = ("stop", "length")  # of OpenAI's and ours


@dataclasses.dataclass(frozen=True)
class Token:
    """A token, its log probability, and the most likely tokens at its position.

    Attributes:
        logprob: None for the first token of a prompt.
        offset: the place in the text of the answer at which the token begins.
    """

    id: int
    logprob: float | None
    top: list[tuple[int, float]]
    offset: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an answer: text, the tokens whose text it begins, and why the answer ends after it, if it does."""

    index: int
    text: str
    tokens: list[Token]
    finish_reason: str | None
    calls: list[ToolCall] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """The tokens of a prompt.

    Attributes:
        echo: the text with which the answers begin.
        places: the place in ``echo`` at which each token begins.
    """

    tokens: list[int]
    echo: str = ""
    places: list[int] = dataclasses.field(default_factory=list)


class _Answer:
    """One of the answers to a request.

    Attributes:
        request: its sequence in the decoder, after that got it.
        written: the number of its tokens so far.
    """

    request: DecodeRequest

    def __init__(self, index: int, prompt: EncodedPrompt, text: AnswerText, tools: ToolCallText | None) -> None:
        self.index = index
        self.written = 0
        self.done = False
        self._prompt, self._text, self._tools = prompt, text, tools
        self._echo: str | None = prompt.echo  # until it is a part of a piece
        self._tokens: list[Token] = []  # those whose text has not been returned

    def add(self, progress: Progress) -> Piece | None:
        """The next piece of the answer, if there is text to show or the answer ends."""
        if self.done:  # by a stop string; the decoder has written more in the meantime
            return None
        request, text = self.request, ""
        if self._echo is not None:
            text, self._echo = self._echo, None
            self._tokens += self._prompt_tokens()
        for i in range(self.written, progress.written - (progress.finish_reason == "stop")):
            token, top = request.tokens[i], request.top_logprobs[i] if request.top_logprobs else []
            offset = len(self._prompt.echo) + self._text.decoded
            self._tokens.append(Token(token, request.logprobs[i], top, offset))
            text += self._text.push(token)
            if self._text.stopped:
                self.written = i + 1
                return self._piece(text, "stop")
        self.written = progress.written
        if progress.finish_reason is None:
            return self._piece(text, None)
        if progress.finish_reason not in _FINISH_REASONS:
            raise _error(progress)
        text += self._text.finish()
        return self._piece(text, "stop" if self._text.stopped else progress.finish_reason)

    def _prompt_tokens(self) -> list[Token]:
        """Those of the prompt, if they have log probabilities. If the sequence failed, some are missing."""
        request = self.request
        if not request.sampling.prompt_logprobs:
            return []
        scores = [(None, []), *zip(request.prompt_logprobs, request.prompt_top_logprobs, strict=False)]
        scored = zip(request.prompt, scores, self._prompt.places, strict=False)
        return [Token(token, *score, place) for token, score, place in scored]

    def _piece(self, text: str, finish_reason: str | None) -> Piece | None:
        calls: list[ToolCall] = []
        if self._tools is not None:
            text, calls = self._tools.push(text, last=finish_reason is not None)
            if self._tools.ended or (self._tools.found and finish_reason == "stop"):
                finish_reason = "tool_calls"
        if not text and not calls and finish_reason is None:
            return None
        self.done = finish_reason is not None
        tokens, self._tokens = self._tokens, []
        return Piece(self.index, text, tokens, finish_reason, calls)


def _error(progress: Progress) -> APIError:
    if progress.finish_reason == "cancelled":
        return APIError(503, "the server is shutting down")
    if isinstance(progress.error, FloatingPointError):
        return APIError(500, "the model computed NaN or infinity for this request")
    return APIError(500, f"the decoder failed ({type(progress.error).__name__})")


class Answers:
    """The answers to one request: ``n`` for each of its prompts, in the order of the prompts.

    Args:
        prompts: each leaves room for a token, if the request asks for one.
        adapter: as in ``BatchDecoder.submit``.
        calls: whether calls of tools are to be found in the answers.
        grammar: limits each answer.

    Raises:
        APIError: the decoder rejects a sequence.
    """

    def __init__(
        self,
        request: CompletionRequest,
        prompts: Sequence[EncodedPrompt],
        adapter: str,
        tokenizer: Any,
        loop: DecodingLoop,
        calls: bool = False,
        grammar: JSONGrammar | None = None,
    ) -> None:
        self.prompt_tokens = sum(len(prompt.tokens) for prompt in prompts)
        self._loop = loop
        self._progress: asyncio.Queue[tuple[_Answer, Progress]] = asyncio.Queue()
        self._answers: list[_Answer] = []
        seed = secrets.randbits(63) if request.seed is None else request.seed
        try:
            for prompt in prompts:
                room = loop.decoder.capacity - len(prompt.tokens)
                most = room if request.max_tokens is None else min(request.max_tokens, room)
                for _ in range(request.n):
                    text = AnswerText(tokenizer, prompt.tokens, request.stop)
                    tools = ToolCallText(request.parallel_tool_calls) if calls else None
                    answer = _Answer(len(self._answers), prompt, text, tools)
                    sampling = dataclasses.replace(
                        request.sampling,
                        max_new_tokens=most,
                        seed=(seed + answer.index) % 2**63,
                        allowed_tokens=grammar and grammar.copy(),
                    )
                    answer.request = loop.submit(prompt.tokens, sampling, adapter, self._listener(answer))
                    self._answers.append(answer)
        except BaseException as error:
            self.cancel()
            if isinstance(error, LoopEnded):
                raise APIError(503, "the server is shutting down") from error
            if isinstance(error, ValueError):
                raise APIError(400, str(error)) from error
            raise

    def _listener(self, answer: _Answer) -> Listener:
        events, progress = asyncio.get_running_loop(), self._progress
        return lambda new: events.call_soon_threadsafe(progress.put_nowait, (answer, new))

    @property
    def written(self) -> int:
        """How many tokens were written for all answers so far."""
        return sum(answer.written for answer in self._answers)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of all answers as they come, until each has ended.

        Raises:
            APIError: the decoder failed, or ended.
        """
        while not all(answer.done for answer in self._answers):
            answer, progress = await self._progress.get()
            piece = answer.add(progress)
            if piece is not None:
                if piece.finish_reason is not None:
                    self._loop.cancel(answer.request)  # which may have gone on after a stop string
                yield piece

    def cancel(self) -> None:
        """Ends the sequences that still run."""
        for answer in self._answers:
            self._loop.cancel(answer.request)
