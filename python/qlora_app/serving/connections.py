"""Connections that close when their client takes too long, so that nobody can lock other clients out."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

_WAITING = 512  # connections that wait for their clients; beyond them, the one that waits longest is closed
_HEADER_SECONDS = 10  # from the beginning of a connection, or of its next request, to the end of the headers
_READ_SECONDS = 60  # within which a client has to read what has been sent


class _Timer:
    """Closes a connection unless it is stopped in time."""

    def __init__(self) -> None:
        self._handle: asyncio.TimerHandle | None = None

    def start(self, connection: Connection, seconds: float) -> None:
        if self._handle is None:
            self._handle = connection.loop.call_later(seconds, connection.transport.abort)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class Connection(H11Protocol):  # type: ignore[misc,unused-ignore]
    """A connection with deadlines, which uvicorn lacks: a client that sends a byte now and then is never idle.

    Args:
        waiting: the connections of this server that wait for their clients, the oldest first: those without a request
            and those whose request is still arriving.
    """

    def __init__(self, *arguments: Any, waiting: dict[Connection, None], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._waiting = waiting
        self._headers, self._reading = _Timer(), _Timer()

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._follow(begun=True)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._follow(begun=True)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._follow(begun=False)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading.start(self, _READ_SECONDS)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reading.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._headers.stop()
        self._reading.stop()
        self._waiting.pop(self, None)

    def _follow(self, begun: bool) -> None:
        """Notes whom the connection waits for now.

        Args:
            begun: whether the client has connected or sent something.
        """
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering:
            self._headers.stop()
        elif begun:
            self._headers.start(self, _HEADER_SECONDS)
        if self.transport.is_closing() or (answering and not self.cycle.more_body):
            self._waiting.pop(self, None)
            return
        self._waiting[self] = None
        if len(self._waiting) > _WAITING:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.transport.abort()
