"""A server of ``qlora-ext serve`` in this process, over a decoder that writes what a test tells it to."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

for library in ("starlette", "uvicorn"):
    pytest.importorskip(library, reason=f"{library} is not installed")

from qlora_app.serving import server
from qlora_app.serving.application import Application, build
from qlora_app.serving.loop import DecodingLoop

ANSWER = "Grüße, 世界! 😀 1 2 3"
MODELS = {"base": "__base__", "tuned": "adapter_1"}
END = 256  # the end-of-text token of ``tiny_models.save_tiny_llama``


@dataclasses.dataclass(eq=False)
class FakeRequest:
    prompt: list[int]
    sampling: Any
    adapter: str
    script: list[int]  # the tokens of the answer
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
    prompt_top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True

    def step(self) -> None:
        if self.cancelled:
            self.finish_reason = "cancelled"
            return
        if self.sampling.prompt_logprobs and not self.prompt_logprobs:
            self.prompt_logprobs = [-0.25] * (len(self.prompt) - 1)
            top = [[(token, -0.25)] if self.sampling.top_logprobs else [] for token in self.prompt]
            self.prompt_top_logprobs = top[1:]
        if self.sampling.max_new_tokens == 0:
            self.finish_reason = "length"
            return
        allowed = self.sampling.allowed_tokens
        token = self.script[len(self.tokens)] if allowed is None else int(allowed(self.tokens).nonzero().max())
        self.tokens.append(token)
        self.logprobs.append(-0.5)
        if self.sampling.top_logprobs:
            self.top_logprobs.append([(self.tokens[-1], -0.5), (0, float("-inf"))])
        if self.tokens[-1] == END:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.sampling.max_new_tokens:
            self.finish_reason = "length"


class FakeDecoder:
    """Writes ``answer(prompt)``, or the last tokens that a grammar allows; a token of each sequence per step.

    Attributes:
        gate: a step waits until it is set.
        failure: the error that a step raises.
    """

    capacity = 200
    sequences = 2
    end_tokens = (END,)

    def __init__(self, answer: Callable[[list[int]], list[int]]) -> None:
        self.answer = answer
        self.gate = threading.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self.requests: list[FakeRequest] = []

    def submit(self, prompt_ids: list[int], sampling: Any, adapter: str) -> FakeRequest:
        request = FakeRequest(prompt_ids, sampling, adapter, [*self.answer(prompt_ids), END])
        self.requests.append(request)
        return request

    def step(self) -> bool:
        self.gate.wait(30)
        if self.failure is not None:
            raise self.failure
        for request in [r for r in self.requests if r.finish_reason is None][: self.sequences]:
            request.step()
        return any(r.finish_reason is None for r in self.requests)


@dataclasses.dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, which has all fields of OpenAI's API."""
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        return error

    @property
    def events(self) -> list[Any]:
        """The events of a stream, without the last one."""
        assert self.headers["content-type"].startswith("text/event-stream")
        lines = self.body.decode().split("\n\n")
        assert lines[-1] == ""
        assert all(line.startswith("data: ") for line in lines[:-1])
        assert lines[-2] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


class Server:
    """A server in a thread."""

    def __init__(
        self,
        decoder: Any,
        tokenizer: Any,
        models: dict[str, str],
        key: str | None = None,
        origins: Sequence[str] = (),
    ) -> None:
        self.decoder = decoder
        self.loop = DecodingLoop(decoder)
        self.socket = server.bind("127.0.0.1", 0)
        self.url = server.url(self.socket)
        self.port = self.socket.getsockname()[1]
        self.application = Application(models, tokenizer, END + 1, self.loop)
        application = build(self.application, key, True, origins)
        self._server = server.make(application, self.loop)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """Sends a request, whose ``body`` becomes JSON unless it consists of bytes."""
        connection = self.connect()
        with contextlib.closing(connection):
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            usual = {"Content-Type": "application/json"} if data is not None else {}
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, data, {**usual, **given})
            reply = connection.getresponse()
            return Reply(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())

    def chat(self, content: str = "hello", **fields: Any) -> Reply:
        return self.send("POST", "/v1/chat/completions", chat(content, **fields))

    def complete(self, prompt: Any = "hello", **fields: Any) -> Reply:
        return self.send("POST", "/v1/completions", {"model": "base", "prompt": prompt, **fields})

    def start(self) -> None:
        self.loop.start()
        self.socket.listen()
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


def chat(content: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "base", "messages": [{"role": "user", "content": content}], **fields}


@contextlib.contextmanager
def running(*arguments: Any, **options: Any) -> Iterator[Server]:
    one = Server(*arguments, **options)
    one.start()
    try:
        yield one
    finally:
        one.decoder.gate.set()
        one.stop()


@contextlib.contextmanager
def closed_gate(server: Server) -> Iterator[None]:
    server.decoder.gate.clear()
    try:
        yield
    finally:
        server.decoder.gate.set()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
