"""Runs a decoder in a thread, and reports the progress of its sequences."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

from ..decoding import BatchDecoder, DecodeRequest, Sampling
from ..errors import first_line


class Progress(NamedTuple):
    """How far a sequence is.

    Attributes:
        written: the number of all tokens so far, the stop token included.
        finish_reason: as in ``DecodeRequest``; None while the sequence runs.
        error: why it ended, if ``finish_reason`` is "error".
    """

    written: int
    finish_reason: str | None = None
    error: BaseException | None = None


Listener = Callable[[Progress], object]


class LoopEnded(Exception):
    """The loop takes no more sequences."""


@dataclasses.dataclass(eq=False)
class _Watched:
    """A sequence whose progress the loop reports."""

    request: DecodeRequest
    listener: Listener
    written: int = 0  # tokens that have been reported

    def report(self) -> bool:
        """Reports what is new, and returns whether the sequence still runs."""
        reason, written = self.request.finish_reason, len(self.request.tokens)
        if written > self.written or reason is not None:
            self.written = written
            self._tell(Progress(written, reason, self.request.error))
        return reason is None

    def end(self, error: BaseException | None) -> None:
        """Reports that the sequence ends here, because of ``error`` or because the loop ends."""
        self.request.cancel()
        self._tell(Progress(self.written, "cancelled" if error is None else "error", error))

    def _tell(self, progress: Progress) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop of the listener is closed
            self.listener(progress)


class DecodingLoop:
    """The thread that calls ``decoder.step()`` while sequences run, and calls their listeners.

    If a step fails, all sequences end with that error, and the decoder goes on with those that come later.
    """

    def __init__(self, decoder: BatchDecoder) -> None:
        self.decoder = decoder
        self._watched: set[_Watched] = set()
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
        return len(self._watched)

    def submit(self, prompt: list[int], sampling: Sampling, adapter: str, listener: Listener) -> DecodeRequest:
        """Adds a sequence, whose ``listener`` is called after each step that wrote a token of it or ended it.

        Raises:
            LoopEnded: the loop was closed. ValueError: the decoder rejects the sequence.
        """
        with self._lock:
            if self._ended:
                raise LoopEnded
            request = self.decoder.submit(prompt, sampling, adapter)
            self._watched.add(_Watched(request, listener))
        self._awake.set()
        return request

    def cancel(self, request: DecodeRequest) -> None:
        """Ends a sequence after the current step, unless it has ended."""
        request.cancel()
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
            left, self._watched = self._watched, set()
        for watched in left:
            watched.end(error)

    def _step(self) -> bool:
        more = self.decoder.step()
        with self._lock:
            all_watched = list(self._watched)
        done = {watched for watched in all_watched if not watched.report()}
        with self._lock:
            self._watched -= done
        return more
