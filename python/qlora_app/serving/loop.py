"""Runs a decoder in a thread, and reports the progress of its sequences."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol

from ..errors import first_line


class DecodingRequest(Protocol):
    """A sequence of the decoder; see ``qlora_app.decoding.Request``."""

    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    prompt_logprobs: list[float]
    prompt_top_logprobs: list[list[tuple[int, float]]]
    finish_reason: str | None
    error: Exception | None

    def cancel(self) -> None: ...


class Decoder(Protocol):
    """The part of ``qlora_app.decoding.BatchDecoder`` that is used here."""

    capacity: int
    sequences: int

    @property
    def end_tokens(self) -> tuple[int, ...]: ...

    def submit(self, prompt_ids: list[int], sampling: Any, adapter: str) -> DecodingRequest: ...

    def step(self) -> bool: ...


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
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a step of the decoder added to a sequence.

    Attributes:
        tokens: without the stop token.
        written: the number of all tokens so far, the stop token included.
        finish_reason: as in ``qlora_app.decoding.Request``; None while the sequence runs.
        error: why it ended, if ``finish_reason`` is "error".
        prompt: the tokens of the prompt, in the first progress of a sequence whose prompt has log probabilities.
    """

    tokens: list[Token]
    written: int
    finish_reason: str | None = None
    error: BaseException | None = None
    prompt: list[Token] = dataclasses.field(default_factory=list)


Listener = Callable[[Progress], None]


class LoopEnded(Exception):
    """The loop takes no more sequences."""


class RunningSequence:
    """A sequence that the loop watches.

    Args:
        prompt: its tokens, if they have log probabilities.
    """

    def __init__(self, request: DecodingRequest, listener: Listener, prompt: list[int]) -> None:
        self._request = request
        self._listener = listener
        self._prompt = prompt
        self._reported = 0  # tokens

    def cancel(self) -> None:
        self._request.cancel()

    def report(self) -> bool:
        """Reports what is new, and returns whether the sequence still runs."""
        request, first = self._request, self._reported
        reason = request.finish_reason
        self._reported = len(request.tokens)
        if self._reported == first and reason is None:
            return True
        new = range(first, self._reported - (reason == "stop"))
        tops = request.top_logprobs or [[]] * self._reported
        tokens = [Token(request.tokens[i], request.logprobs[i], tops[i]) for i in new]
        self._tell(Progress(tokens, self._reported, reason, request.error, self._take_prompt()))
        return reason is None

    def _take_prompt(self) -> list[Token]:
        """The prompt with its log probabilities, at the first call; they are complete when there is a token."""
        prompt, self._prompt = self._prompt, []
        if not prompt:
            return []
        # Incomplete if the sequence failed.
        scores = zip(prompt[1:], self._request.prompt_logprobs, self._request.prompt_top_logprobs, strict=False)
        return [Token(prompt[0], None, []), *(Token(*score) for score in scores)]

    def end(self, error: BaseException | None) -> None:
        """Reports that the sequence ends here, because of ``error`` or because the loop ends."""
        self.cancel()
        self._tell(Progress([], self._reported, "cancelled" if error is None else "error", error))

    def _tell(self, progress: Progress) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop of the listener is closed
            self._listener(progress)


class DecodingLoop:
    """The thread that calls ``decoder.step()`` while sequences run, and calls their listeners.

    If a step fails, all sequences end with that error, and the decoder goes on with those that come later.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._sequences: set[RunningSequence] = set()
        self._ended = False
        self._lock = threading.Lock()  # of the two attributes above
        self._awake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after its current step. Sequences that still run are reported as cancelled."""
        self._closing = True
        self._awake.set()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def active(self) -> int:
        """How many sequences run or wait."""
        return len(self._sequences)

    def submit(self, prompt: list[int], sampling: Any, adapter: str, listener: Listener) -> RunningSequence:
        """Adds a sequence.

        Raises:
            LoopEnded: the loop was closed. ValueError: the decoder rejects the sequence.
        """
        with self._lock:
            if self._ended:
                raise LoopEnded
            request = self.decoder.submit(prompt, sampling, adapter)
            sequence = RunningSequence(request, listener, prompt if sampling.prompt_logprobs else [])
            self._sequences.add(sequence)
        self._awake.set()
        return sequence

    def cancel(self, sequence: RunningSequence) -> None:
        """Ends a sequence after the current step, unless it has ended."""
        sequence.cancel()
        self._awake.set()

    def _run(self) -> None:
        while not self._closing:
            self._awake.wait()
            self._awake.clear()
            try:
                while not self._closing and self._step():
                    pass
            except Exception as error:
                print(f"qlora-ext: the decoder failed: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
                self._end_all(error)
        self._end_all(None)

    def _end_all(self, error: Exception | None) -> None:
        with self._lock:
            self._ended = self._closing
            left, self._sequences = self._sequences, set()
        for sequence in left:
            sequence.end(error)

    def _step(self) -> bool:
        more = self.decoder.step()
        with self._lock:
            watched = list(self._sequences)
        done = {sequence for sequence in watched if not sequence.report()}
        with self._lock:
            self._sequences -= done
        return more
