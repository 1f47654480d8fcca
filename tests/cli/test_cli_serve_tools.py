"""``qlora-ext serve``: calls of tools, and answers in JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import chat_templates
from openai_server import Server

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

    assert calling(written.removesuffix("</tool_call>")).json["choices"][0]["finish_reason"] == "tool_calls"
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
    "text",
    [
        "<tool_call>{}</tool_call>",
        '<tool_call>{"name": "f"',
        "a <tool_call>{",
        "a <tool",
        "<tool_call>\n[1]</tool_call> b\n ",
        "a\n",
    ],
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
