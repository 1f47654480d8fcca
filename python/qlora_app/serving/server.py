"""Listens on a socket, and runs the application on it until a signal ends it."""

from __future__ import annotations

import functools
import ipaddress
import os
import socket

import anyio
import uvicorn
from starlette.types import ASGIApp

from qlora_ext.untrusted import excerpt

from ..errors import UserError
from .connections import Connection
from .loop import DecodingLoop

# Longer than clients keep idle connections (OpenAI's 5 seconds), which otherwise send requests while we close them.
_IDLE = 75  # seconds
_LINGER = 5  # seconds that connections get to send what is left when the server ends


def bind(host: str, port: int) -> socket.socket:
    """A socket for connections, which are refused until it listens; port 0 lets the system choose one.

    Raises:
        UserError: the address does not exist or is in use.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family)
        try:
            if os.name == "posix":  # elsewhere it would let two servers share a port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:  # the latter for a name that cannot be one of a host
        reason = error.strerror if isinstance(error, OSError) else "not the name of a host"
        raise UserError(f"--host {excerpt(host)} --port {port}: {reason}") from error
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can connect."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def url(listener: socket.socket) -> str:
    """The URL that clients of OpenAI's API call their base."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


class _Server(uvicorn.Server):  # type: ignore[misc,unused-ignore]
    """Ends the decoder first, so that requests which still run get an error, and their connections close."""

    def __init__(self, config: uvicorn.Config, loop: DecodingLoop) -> None:
        super().__init__(config)
        self._decoding = loop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await anyio.to_thread.run_sync(self._decoding.close)
        await super().shutdown(sockets)


def make(application: ASGIApp, loop: DecodingLoop) -> uvicorn.Server:
    """A server of the application, whose ``run(sockets=[listener])`` returns after SIGINT, SIGTERM or ``should_exit``.

    It then closes ``loop``, and raises the signal again, as it would act without a server.
    """
    config = uvicorn.Config(
        application,
        http=functools.partial(Connection, waiting={}),
        access_log=False,
        log_config=None,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=_LINGER,
    )
    return _Server(config, loop)
