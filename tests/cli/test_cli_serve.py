"""``qlora-ext serve``: what clients of OpenAI's API get, over a decoder whose tokens a test chooses."""

from __future__ import annotations

from typing import Any

import pytest

from openai_server import ANSWER, MODELS, Server, chat, wait_until
from qlora_app.serving.text import token_places


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
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
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


def test_a_template_that_rejects_messages(server: Server, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    reply = server.chat("hello")
    assert reply.status == 400
    assert "roles must alternate" in reply.error["message"]


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
