"""``qlora-ext serve``: what clients of OpenAI's API get, over a decoder whose tokens a test chooses."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("starlette", reason="starlette is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

import chat_templates
from commands import Paths
from openai_server import FakeDecoder, Server, chat, running
from qlora_ext.cli.serving.text import token_places

ANSWER = "Grüße, 世界! 😀 1 2 3"
MODELS = {"base": "__base__", "tuned": "adapter_1"}


@pytest.fixture(scope="module")
def tokenizer(paths: Paths) -> Any:
    """One token per byte."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(paths["model"])
    tokenizer.chat_template = chat_templates.PLAIN
    return tokenizer


@pytest.fixture(scope="module")
def shared(tokenizer: Any) -> Iterator[Server]:
    decoder = FakeDecoder(lambda prompt: tokenizer(ANSWER)["input_ids"])
    with running(decoder, tokenizer, MODELS) as server:
        yield server


@pytest.fixture
def server(shared: Server) -> Server:
    shared.decoder.requests.clear()
    return shared


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def test_a_chat(server: Server, tokenizer: Any) -> None:
    reply = server.chat("hello")
    assert reply.status == 200
    asked = tokenizer("<user>hello</><assistant>")["input_ids"]
    (request,) = server.decoder.requests
    assert request.prompt == asked
    body = reply.json
    assert body["object"] == "chat.completion"
    assert body["model"] == "base"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert body["usage"] == usage(len(asked), len(ANSWER.encode()) + 1)


def test_a_streamed_chat_has_whole_characters(server: Server) -> None:
    events = server.chat("hello", stream=True, stream_options={"include_usage": True}).events
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    *chunks, last = events
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(ANSWER.encode()) + 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert [delta["content"] for delta in deltas[1:-1]] == list(ANSWER)  # a token is a byte
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk["usage"] is None for chunk in chunks)


def test_a_completion(server: Server) -> None:
    body = server.complete("hello", max_tokens=4).json
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == "Grü"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"] == usage(5, 4)
    events = server.complete("hello", max_tokens=5, stream=True).events
    assert "".join(event["choices"][0]["text"] for event in events) == "Grü\ufffd"  # ends inside of ß
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_stop_strings_are_never_sent(server: Server) -> None:
    """Also not their beginning, nor that of a character; the sequence ends."""
    for stream in (False, True):
        reply = server.chat("hello", stop=["x", "界! 😀", "1 2"], stream=stream)
        if stream:
            text = "".join(event["choices"][0]["delta"].get("content", "") for event in reply.events)
        else:
            text = reply.json["choices"][0]["message"]["content"]
        assert text == "Grüße, 世"
    wait_until(lambda: all(request.finish_reason for request in server.decoder.requests))
    many = [f"not {i}" for i in range(10_000)]
    assert server.chat("hello", stop=[*many, "世界"]).json["choices"][0]["message"]["content"] == "Grüße, "
    assert server.chat("hello", stop="3!").json["choices"][0]["message"]["content"] == ANSWER
    body = server.chat("hello", stop="ü").json
    assert body["usage"]["completion_tokens"] == len("Grü".encode())
    assert body["choices"][0]["finish_reason"] == "stop"


def test_sampling_reaches_the_decoder(server: Server) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 5, "max_completion_tokens": 3}
    assert server.chat("hello", n=2, **fields).status == 200
    first, second = (request.sampling for request in server.decoder.requests)
    assert (first.temperature, first.top_p, first.top_k, first.min_p) == (0.5, 0.9, 7, 0.1)
    assert (first.max_new_tokens, first.seed, second.seed) == (3, 5, 6)
    server.chat("hello", max_tokens=10**18, temperature=0, top_k=-1, seed=-1)
    large = server.decoder.requests[-1]
    assert large.sampling.max_new_tokens == server.decoder.capacity - len(large.prompt)
    assert (large.sampling.temperature, large.sampling.top_k) == (0, 0)
    assert large.sampling.seed >= 0


def test_several_prompts_with_several_answers(server: Server, tokenizer: Any) -> None:
    body = server.complete(["a", "bc"], n=2, max_tokens=1).json
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"] == usage(3, 4)
    server.complete([[65, 66], [67]], max_tokens=1)
    server.complete([68, 69], max_tokens=1)
    assert [r.prompt for r in server.decoder.requests[-3:]] == [[65, 66], [67], [68, 69]]
    events = server.chat("hello", n=3, stream=True, max_tokens=2).events
    texts = {i: [e["choices"][0] for e in events if e["choices"][0]["index"] == i] for i in range(3)}
    assert {i: "".join(c["delta"].get("content", "") for c in own) for i, own in texts.items()} == dict.fromkeys(
        range(3), "Gr"
    )


def test_log_probabilities(server: Server) -> None:
    whole = server.chat("hello", logprobs=True, top_logprobs=2, max_tokens=2).json["choices"][0]["logprobs"]["content"]
    g = {"token": "G", "logprob": -0.5, "bytes": [71]}
    assert whole[0] == {**g, "top_logprobs": [g, {**whole[0]["top_logprobs"][1], "logprob": -9999.0}]}
    events = server.chat("hello", logprobs=True, max_tokens=4, stream=True).events
    pieces = [e["choices"][0]["logprobs"]["content"] for e in events if e["choices"][0]["logprobs"]]
    assert [[entry["token"] for entry in piece] for piece in pieces] == [["G"], ["r"], ["\ufffd", "\ufffd"]]
    assert pieces[2][0]["bytes"] is None  # of a part of a character
    old = server.complete("hello", logprobs=1, max_tokens=2).json["choices"][0]["logprobs"]
    assert (old["tokens"], old["token_logprobs"], old["text_offset"]) == (["G", "r"], [-0.5, -0.5], [0, 1])
    assert old["top_logprobs"][0]["G"] == -0.5
    assert server.chat("hello").json["choices"][0]["logprobs"] is None


def test_echo(server: Server, tokenizer: Any) -> None:
    """As lm-eval asks for log probabilities of prompts."""
    asked = {"echo": True, "logprobs": 1, "temperature": 0, "seed": 1}
    tokens = tokenizer("aü")["input_ids"]
    for prompt in ("aü", tokens):
        for most, answer in ((0, []), (1, ["G"])):
            body = server.complete(prompt, max_tokens=most, **asked).json
            (choice,) = body["choices"]
            assert choice["text"] == "".join(["aü", *answer])
            assert choice["finish_reason"] == "length"
            found = choice["logprobs"]
            assert found["tokens"] == ["a", "\ufffd", "\ufffd", *answer]
            assert found["token_logprobs"] == [None, -0.25, -0.25, *(-0.5 for _ in answer)]
            assert found["text_offset"] == [0, 1, 1, *(2 for _ in answer)]
            assert found["top_logprobs"][:2] == [None, {"\ufffd": -0.25}]
            assert body["usage"] == usage(3, most)
            assert server.decoder.requests[-1].prompt == tokens
    several = server.complete(["a", "bc"], max_tokens=0, **asked).json["choices"]
    assert [choice["text"] for choice in several] == ["a", "bc"]
    assert [len(choice["logprobs"]["tokens"]) for choice in several] == [1, 2]
    events = server.complete("bc", max_tokens=2, stream=True, **asked).events
    assert "".join(event["choices"][0]["text"] for event in events) == "bcGr"
    places = [place for event in events for place in event["choices"][0]["logprobs"]["text_offset"]]
    assert places == [0, 1, 2, 3]
    plain = server.complete("a", max_tokens=1, echo=True).json["choices"][0]
    assert (plain["text"], plain["logprobs"]) == ("aG", None)
    assert server.complete([65] * 200, max_tokens=0, **asked).status == 200  # fills the context


def test_places_of_special_tokens_in_a_prompt() -> None:
    """A text prompt is returned as it was sent, without what the tokenizer adds."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    tokenizer.backend_tokenizer.decoder = __import__("tokenizers").decoders.Fuse()
    assert token_places(tokenizer, [0, 1, 2], "ab") == ("ab", [0, 0, 1])
    assert token_places(tokenizer, [0, 1, 2], None) == ("<s>ab", [0, 3, 4])
    assert token_places(tokenizer, [0, 0, 2], "<s>b") == ("<s>b", [0, 0, 3])


def test_the_model_chooses_the_adapter(server: Server) -> None:
    listed = server.send("GET", "/v1/models").json["data"]
    assert [model["id"] for model in listed] == ["base", "tuned"]
    assert listed[1]["parent"] == "base"
    assert server.send("GET", "/v1/models/tuned").json == listed[1]
    for model, adapter in MODELS.items():
        assert server.chat("hello", model=model).json["model"] == model
        assert server.decoder.requests[-1].adapter == adapter
    for reply in (server.chat("hello", model="Tuned"), server.send("GET", "/v1/models/nobody")):
        assert reply.status == 404
        assert reply.error["code"] == "model_not_found"
        assert "expected one of base, tuned" in reply.error["message"]


def test_parts_and_roles_of_messages(server: Server, tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []}
    messages = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}, answer]
    assert server.send("POST", "/v1/chat/completions", {"model": "base", "messages": messages}).status == 200
    text = "<system>s</><user>a\nb</><assistant>c</><assistant>"  # templates know no developers
    assert tokenizer.decode(server.decoder.requests[-1].prompt) == text


def test_defaults_that_clients_send_are_accepted(server: Server) -> None:
    same = {
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "me", "tools": [], "stop": None,
        "response_format": {"type": "text"}, "tool_choice": "auto", "store": False, "logprobs": False,
        "metadata": {"a": "b"}, "parallel_tool_calls": True, "reasoning_effort": "none",
    }  # fmt: skip
    assert server.chat("hello", **same).status == 200
    nothing = dict.fromkeys((*same, *REJECTED, "max_tokens", "suffix", "unknown"))
    assert server.chat("hello", **{**nothing, **chat()}).status == 200
    assert server.complete("hello", **{**nothing, "model": "base"}).status == 200


REJECTED: dict[str, dict[str, Any]] = {
    "model": {"model": None},
    "messages": {"messages": []},
    "messages[0]": {"messages": ["hello"]},
    "messages[0].role": {"messages": [{"role": "function", "content": "a"}]},
    "messages[0].content": {"messages": [{"role": "user"}]},
    "messages[0].content[0]": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    "messages[0].tool_calls": {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]},
    "messages[0].name": {"messages": [{"role": "user", "content": "", "name": 3}]},
    "temperature": {"temperature": float("nan")},
    "top_p": {"top_p": 0},
    "top_k": {"top_k": 1.5},
    "min_p": {"min_p": float("inf")},
    "max_tokens": {"max_tokens": -1},
    "max_completion_tokens": {"max_completion_tokens": True},
    "seed": {"seed": 2**64},
    "n": {"n": 10**9},
    "stop": {"stop": ["a", ""]},
    "stream": {"stream": "yes"},
    "stream_options": {"stream_options": {"include_usage": True}},
    "include_usage": {"stream": True, "stream_options": {"include_usage": 1}},
    "logprobs": {"logprobs": 3},
    "top_logprobs": {"logprobs": True, "top_logprobs": 21},
    "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},  # which the template ignores
    "tools[0]": {"tools": [{"type": "retrieval"}]},
    "tools[0].function": {"tools": [{"type": "function", "function": {"description": "f"}}]},
    "tools[0].function.parameters": {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
    "tool_calls": {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
    "tool_choice": {"tool_choice": "required"},
    "parallel_tool_calls": {"parallel_tool_calls": 1},
    "response_format": {"response_format": {"type": "grammar"}},
    "response_format.json_schema.schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
    "echo": {"echo": True},
    "logit_bias": {"logit_bias": {"50256": -100}},
    "presence_penalty": {"presence_penalty": 1},
    "top_a": {"top_a": 0.1},
}


@pytest.mark.parametrize("param", REJECTED)
def test_wrong_fields_are_rejected_by_name(param: str, server: Server) -> None:
    reply = server.chat("hello", **REJECTED[param])
    assert reply.status == 400
    assert reply.error["param"] == param
    assert reply.error["message"].startswith(f"{param}: ")
    assert reply.error["type"] == "invalid_request_error"
    assert server.decoder.requests == []


def test_more_values_that_are_rejected(server: Server) -> None:
    for fields in (
        {"temperature": 1e-30}, {"temperature": "1"}, {"temperature": -1}, {"top_p": 1.1}, {"max_tokens": 0},
        {"stop": ""}, {"stop": [1]}, {"stop": {"a": 1}}, {"stop": ["x" * 1001]}, {"seed": 1.0}, {"n": 0}, {"n": 65},
        {"max_tokens": 1, "max_completion_tokens": 2}, {"stream_options": 1}, {"top_logprobs": 1}, {"model": ["a"]},
        {"messages": {"role": "user"}}, {"messages": [{"role": ["user"], "content": "a"}]}, {"\x1b": 1},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "user", "content": [[]]}]}, {"messages": [{"role": "user", "content": "\ud800"}]},
    ):  # fmt: skip
        reply = server.chat("hello", **fields)
        assert reply.status == 400, fields
        assert reply.error["type"] == "invalid_request_error"
    for prompt in (None, "", [], [[]], [1, "a"], [257], [-1], [True], [2**70], {"a": 1}, "x" * 200, [[1], "a"]):
        assert server.complete(prompt).status == 400, prompt
    assert server.complete("x" * 200).error["code"] == "context_length_exceeded"
    assert server.complete(["a"] * 65).error["param"] == "n"
    assert server.complete("a", tools=[1]).error["param"] == "tools"
    assert server.complete([65] * 201, max_tokens=0).error["code"] == "context_length_exceeded"
    assert server.complete("a", messages=[]).status == 400
    assert server.decoder.requests == []


def test_bodies_that_are_no_json(server: Server) -> None:
    path = "/v1/chat/completions"
    for body in (
        b"", b"{", b"[]", b"null", b"\xff\xfe{}", b'{"model": "\xc3"}', b"[" * 100_000,
        b'{"a":' * 1000 + b"1" + b"}" * 1000, b'{"model": "base", "seed": ' + b"9" * 5000 + b"}",
        b"\x00", b'{"model": "base"} x',
    ):  # fmt: skip
        reply = server.send("POST", path, body)
        assert reply.status == 400, body[:20]
        assert reply.error["message"]
    assert server.send("POST", path, b" " * (3 << 20)).status == 413
    assert server.send("POST", path, b"{}", Content_Type="text/plain").status == 415
    assert server.send("POST", path, b"{}", Content_Type="application/json; charset=utf-8").status == 400
    assert server.send("GET", path).status == 405
    assert server.send("GET", "/v1/embeddings").status == 404
    assert server.send("GET", "/v1/embeddings").error["message"]
    assert server.send("GET", "/health").json == {"status": "ok"}


def test_requests_that_never_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_ext.cli.serving.application._BODY_SECONDS", 0.05)
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
    monkeypatch.setattr("qlora_ext.cli.serving.connections._HEADER_SECONDS", 0.3)
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
    monkeypatch.setattr("qlora_ext.cli.serving.connections._WAITING", 5)
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
    monkeypatch.setattr("qlora_ext.cli.serving.connections._READ_SECONDS", 0.1)
    monkeypatch.setattr("qlora_ext.cli.serving.application.Application._model", lambda *_: {"id": "x" * (16 << 20)})
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client, served = connection.getsockname(), server._server.server_state.connections
        wait_until(lambda: client in [one.client for one in served])
        wait_until(lambda: client not in [one.client for one in served])
        wait_until(lambda: not server._server.server_state.tasks)


def test_a_template_that_rejects_messages(server: Server, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    reply = server.chat("hello")
    assert reply.status == 400
    assert "roles must alternate" in reply.error["message"]


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


@contextlib.contextmanager
def closed_gate(server: Server) -> Iterator[None]:
    server.decoder.gate.clear()
    try:
        yield
    finally:
        server.decoder.gate.set()


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


FUNCTION = {"name": "find", "parameters": {"type": "object", "properties": {"name": {"type": "string"}}}}
CALL = {"name": "find", "arguments": {"name": "Grüße"}}
HERMES = chat_templates.TOOLS.replace("call>", "tool_call>")


@pytest.fixture
def calling(server: Server, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Sets the answer of the model, which has a template with tools, and returns the client's question."""
    monkeypatch.setattr(tokenizer, "chat_template", HERMES)
    monkeypatch.setattr(server.decoder, "capacity", 2000, raising=False)

    def ask(answer: str, **fields: Any) -> Any:
        monkeypatch.setattr(server.decoder, "answer", lambda prompt: tokenizer(answer)["input_ids"])
        return server.chat("hello", tools=[{"type": "function", "function": FUNCTION}], **fields)

    return ask


def test_calls_of_tools(server: Server, tokenizer: Any, calling: Any) -> None:
    written = f"<tool_call>\n{json.dumps(CALL, ensure_ascii=False)}\n</tool_call>"
    (choice,) = calling(f"I ask.\n{written}\n{written}\n").json["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] == "I ask."
    assert [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]] == [CALL["arguments"]] * 2
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["find"] * 2
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    prompt = tokenizer.decode(server.decoder.requests[-1].prompt)
    assert prompt.startswith(f"<tools>{json.dumps({'type': 'function', 'function': FUNCTION})}</tools>")
    # The client sends the calls back, with their results.
    result = {"role": "tool", "content": "found", "tool_call_id": message["tool_calls"][0]["id"]}
    more = [{"role": "user", "content": "hello"}, {**message, "content": None}, result]
    assert calling("Yes.", messages=more).json["choices"][0]["message"]["content"] == "Yes."
    assert "</tool_call></><tool>found</>" in tokenizer.decode(server.decoder.requests[-1].prompt)

    one = calling(f"{written}\n{written}", parallel_tool_calls=False).json["choices"][0]
    assert (one["message"]["content"], one["finish_reason"]) == (None, "tool_calls")
    assert len(one["message"]["tool_calls"]) == 1
    events = calling(f"I <ask>. {written} ", stream=True).events
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == "I <ask>."
    ((call,),) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert (call["index"], json.loads(call["function"]["arguments"])) == (0, CALL["arguments"])
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    "text", ["<tool_call>{}</tool_call>", "a <tool_call>{", "a <tool", "<tool_call>\n[1]</tool_call> b\n ", "a\n"]
)
def test_answers_that_are_no_calls(text: str, calling: Any) -> None:
    (choice,) = calling(text).json["choices"]
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == "stop"
    deltas = [event["choices"][0]["delta"] for event in calling(text, stream=True).events]
    assert "".join(delta.get("content", "") for delta in deltas) == text


def test_no_choice_of_tools(server: Server, tokenizer: Any, calling: Any) -> None:
    """The model does not see the tools."""
    written = f"<tool_call>{json.dumps(CALL)}</tool_call>"
    assert calling(written, tool_choice="none").json["choices"][0]["message"]["content"] == written
    assert tokenizer.decode(server.decoder.requests[-1].prompt).startswith("<user>")
    named = {"type": "function", "function": {"name": "find"}}
    assert calling("", tool_choice=named).error["param"] == "tool_choice"


def test_answers_in_json(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    schema = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    choices = server.chat("hello", response_format=form, n=2).json["choices"]
    assert [json.loads(choice["message"]["content"]) for choice in choices] == [{"a": "x"}] * 2
    assert [choice["finish_reason"] for choice in choices] == ["stop"] * 2
    begun = server.chat("hello", response_format={"type": "json_object"}, max_tokens=1).json["choices"][0]
    assert begun["message"]["content"] == "{"
    wrong = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "sentence"}}}
    assert "sentence" in server.chat("hello", response_format=wrong).error["message"]
    tools = [{"type": "function", "function": FUNCTION}]
    assert server.chat("hello", response_format=form, tools=tools).error["param"] == "response_format"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    server.application._grammars = None
    assert "llguidance, which is not installed" in server.chat("hello", response_format=form).error["message"]


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


def test_the_openai_client(server: Server) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["base", "tuned"]
        messages = [{"role": "user", "content": "hello"}]
        answer = client.chat.completions.create(
            model="tuned", messages=messages, logprobs=True, extra_body={"top_k": 5}
        )
        assert answer.choices[0].message.content == ANSWER
        assert answer.choices[0].logprobs.content[0].token == "G"
        with client.chat.completions.create(model="base", messages=messages, stream=True) as chunks:
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
        assert client.completions.create(model="base", prompt="a").choices[0].text == ANSWER[:10]
        with pytest.raises(openai.NotFoundError, match="nobody"):
            client.chat.completions.create(model="nobody", messages=messages)
        with pytest.raises(openai.BadRequestError, match="presence_penalty: not supported"):
            client.chat.completions.create(model="base", messages=messages, presence_penalty=1)
        with pytest.raises(openai.BadRequestError, match=r"tools\[0\]"):
            client.chat.completions.create(model="base", messages=messages, tools=[{"type": "function"}])
