"""``qlora-ext serve``: who may connect, and clients that are slow, many, or gone."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

import pytest

from openai_server import MODELS, FakeDecoder, Server, chat, closed_gate, running, wait_until


def test_requests_that_never_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_app.serving.application._BODY_SECONDS", 0.05)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for raw, status in (
        (head + "Content-Length: 100\r\n\r\n{", b"408"),
        (head + "Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", b"408"),
        (head + "Content-Length: -1\r\n\r\n", b"400"),
        ("\x00\xff\r\n\r\n", b"400"),
    ):
        with socket.create_connection(("127.0.0.1", server.port), 20) as connection:
            connection.sendall(raw.encode("latin-1"))
            assert connection.recv(64).split()[1] == status
    assert server.chat("hello").status == 200


def half_a_request(server: Server) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), 20)
    connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
    return connection


def is_closed(connection: socket.socket, more: bytes) -> bool:
    """Whether the server closes a connection to which ``more`` is sent again and again."""
    connection.settimeout(0.05)
    deadline = time.monotonic() + 10
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < deadline:
            try:
                if not connection.recv(4096):
                    return True
            except TimeoutError:
                connection.sendall(more)
        return False
    return True


def test_headers_that_never_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a client that sends a byte now and then, after another request, or instead of a body."""
    monkeypatch.setattr("qlora_app.serving.connections._HEADER_SECONDS", 0.3)
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    for begin in (b"", b"G", head + b"\r\nG", head + b"Content-Length: 999\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), 20) as connection:
            connection.sendall(begin)
            assert is_closed(connection, b"a" if begin else b""), begin
    with contextlib.closing(server.connect()) as connection:  # a request in time keeps its connection
        for _ in range(2):
            connection.request("GET", "/health")
            assert connection.getresponse().read()
            time.sleep(0.4)


def test_many_connections_lock_nobody_out(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait for their clients are closed, the oldest first, and none that waits for the server."""
    monkeypatch.setattr("qlora_app.serving.connections._WAITING", 5)
    with contextlib.ExitStack() as stack:
        with closed_gate(server):
            asked = server.connect()
            asked.request("POST", "/v1/chat/completions", json.dumps(chat()), {"Content-Type": "application/json"})
            wait_until(lambda: len(server.decoder.requests) == 1)
            held = [stack.enter_context(half_a_request(server)) for _ in range(20)]
            assert server.send("GET", "/health").status == 200
            with contextlib.suppress(ConnectionResetError):
                assert held[0].recv(1) == b""
            held[-1].sendall(b"1\r\nHost: localhost\r\n\r\n")
            assert held[-1].recv(64).split()[1] == b"200"
        assert asked.getresponse().status == 200
        asked.close()


def test_a_client_that_does_not_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_app.serving.connections._READ_SECONDS", 0.1)
    monkeypatch.setattr("qlora_app.serving.application.Application._model", lambda *_: {"id": "x" * (16 << 20)})
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client, served = connection.getsockname(), server._server.server_state.connections
        wait_until(lambda: client in [one.client for one in served])
        wait_until(lambda: client not in [one.client for one in served])
        wait_until(lambda: not server._server.server_state.tasks)


def test_other_hosts_are_rejected(server: Server) -> None:
    assert server.send("GET", "/v1/models", Host="localhost:8000").status == 200
    assert server.send("GET", "/v1/models", Host="[::1]:8000").status == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "[", "", "localhost@evil.example"):
        reply = server.send("GET", "/v1/models", Host=host)
        assert reply.status == 403, host
        assert "localhost" in reply.error["message"]


def test_an_api_key(tokenizer: Any) -> None:
    decoder = FakeDecoder(lambda prompt: [65])
    with running(decoder, tokenizer, MODELS, key="secret") as server:
        for headers in (
            {},
            {"Authorization": "Bearer secre"},
            {"Authorization": "Bearer \xe9"},
            {"Authorization": "secret"},
        ):
            reply = server.send("POST", "/v1/chat/completions", chat(), **headers)
            assert reply.status == 401
            assert reply.error["code"] == "invalid_api_key"
            assert "secret" not in reply.error["message"]
        headers = {"Authorization": "Bearer secret", "Host": "elsewhere.example"}
        assert server.send("POST", "/v1/chat/completions", chat(), **headers).status == 200
        assert server.send("GET", "/health").status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(server: Server, stream: bool) -> None:
    with closed_gate(server):
        connection = server.connect()
        data = json.dumps(chat(n=3, stream=stream))
        connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
        wait_until(lambda: len(server.decoder.requests) == 3)
        connection.close()
        wait_until(lambda: all(request.cancelled for request in server.decoder.requests))
    wait_until(lambda: server.loop.active == 0)
    assert server.chat("hello").status == 200


def test_a_full_queue(server: Server) -> None:
    with closed_gate(server):
        connection = server.connect()
        data = json.dumps(chat(n=64))
        connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
        wait_until(lambda: server.loop.active == 64)
        reply = server.chat("hello", n=3)
        assert reply.status == 429
        assert reply.headers["retry-after"] == "1"
        assert reply.error["code"] == "rate_limit_exceeded"
        assert len(server.decoder.requests) == 64
        connection.close()
    wait_until(lambda: server.loop.active == 0)


def test_a_step_that_fails(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    """Its requests get an error, later ones an answer."""
    server.decoder.failure = RuntimeError("some detail")
    reply = server.chat("hello", n=2)
    assert reply.status == 500
    assert reply.error["type"] == "server_error"
    assert "RuntimeError" in reply.error["message"]
    assert "detail" not in reply.error["message"]
    assert "qlora-ext: the decoder failed: RuntimeError: some detail\n" in capfd.readouterr().err
    server.decoder.failure = None
    assert server.chat("hello").status == 200
    wait_until(lambda: server.loop.active == 0)
    assert all(request.finish_reason for request in server.decoder.requests)


def test_requests_that_run_when_the_server_ends(tokenizer: Any) -> None:
    decoder = FakeDecoder(lambda prompt: [65] * 150)
    with running(decoder, tokenizer, MODELS) as server:
        decoder.gate.clear()
        connections = [server.connect(), server.connect()]
        for connection, stream in zip(connections, (False, True), strict=True):
            data = json.dumps(chat(stream=stream))
            connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
        wait_until(lambda: len(decoder.requests) == 2)
        server._server.should_exit = True
        wait_until(lambda: server.loop._closing)
        decoder.gate.set()
        whole, stream = (connection.getresponse() for connection in connections)
        assert whole.status == 503
        last = stream.read().decode().split("\n\n")[-2]
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is shutting down"
        server._thread.join(10)
        with pytest.raises(ConnectionRefusedError):
            server.connect().connect()


def test_pages_of_other_origins(tokenizer: Any) -> None:
    page = {"Origin": "http://localhost:3000"}
    asks = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,x-stainless-os"}
    decoder = FakeDecoder(lambda prompt: [65])
    with running(decoder, tokenizer, MODELS, key="secret", origins=[page["Origin"]]) as one:
        reply = one.send("OPTIONS", "/v1/chat/completions", **page, **asks)
        assert reply.status == 200
        assert reply.headers["access-control-allow-origin"] == page["Origin"]
        assert "x-stainless-os" in reply.headers["access-control-allow-headers"]
        assert one.send("POST", "/v1/chat/completions", chat(), **page).headers["access-control-allow-origin"]
        assert "access-control-allow-origin" not in one.send("GET", "/health", Origin="http://evil.example").headers
        assert one.send("OPTIONS", "/v1/models", **{**asks, "Origin": "http://evil.example"}).status == 400


def test_without_cors_no_page_gets_permission(server: Server) -> None:
    reply = server.send("GET", "/v1/models", Origin="http://localhost:3000")
    assert "access-control-allow-origin" not in reply.headers
