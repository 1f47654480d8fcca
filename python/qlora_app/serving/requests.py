"""Checks the body of a request for completions. Whatever would change the answer and is not supported is rejected."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias, TypeGuard

from qlora_ext.untrusted import FileError, excerpt, parse_json

from ..data import Message, tool_call
from ..decoding import Sampling
from ..errors import UserError
from .errors import APIError, invalid

# What is continued: messages, which the chat template formats, a text, or tokens.
Prompt: TypeAlias = "list[Message] | str | list[int]"

MAX_CHOICES = 64  # sequences per request
_MAX_TOP_LOGPROBS = 20
_MAX_STOP_LENGTH = 1000  # characters
_DEFAULT_COMPLETION = 16  # tokens of /v1/completions without max_tokens, as in OpenAI's API
_ROLES = ("system", "developer", "user", "assistant", "tool")
_EXTRA_KEYS = ("name", "reasoning_content", "tool_call_id")  # texts of a message, for the chat template

# Fields that do not change the answer.
_IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
# Fields that are not supported, some of them by one of the routes -> the values with which the answer is the same as
# without them. Clients send these.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template_kwargs": ({},),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """A checked request.

    Attributes:
        chat: whether it came to the route for chats, whose replies have another form.
        prompts: each gets ``n`` answers.
        tools: those that an answer may call.
        parallel_tool_calls: whether it may call several.
        response_schema: the JSON schema of an answer; None: any text.
        echo: whether an answer begins with the prompt.
        max_tokens: the most tokens per answer; None: as many as fit.
        sampling: how the answers are continued, without their own seeds and lengths.
        logprobs: whether tokens have log probabilities.
        include_usage: end a stream with the number of tokens.
    """

    chat: bool
    model: str
    prompts: list[Prompt]
    n: int
    tools: list[dict[str, Any]]
    parallel_tool_calls: bool
    response_schema: dict[str, Any] | None
    echo: bool
    max_tokens: int | None
    sampling: Sampling
    seed: int | None
    stop: tuple[str, ...]
    logprobs: bool
    stream: bool
    include_usage: bool


class _Fields:
    """The fields of an object. Each is taken once; those that nobody took are unknown. Null is like absent."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str) -> Any:
        return self._values.pop(name, None)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.take(name)
        if value is None:
            return default
        # NaN is not between any two numbers.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise invalid(name, f"expected a number from {low:g} to {high:g}, got {excerpt(value)}")
        return float(value)

    def integer(self, name: str, low: int, high: int | None = None) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        wrong = isinstance(value, bool) or not isinstance(value, int) or value < low
        if wrong or (high is not None and value > high):
            bounds = f"from {low} to {high}" if high is not None else f"of at least {low}"
            raise invalid(name, f"expected an integer {bounds}, got {excerpt(value)}")
        return int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise invalid(name, f"expected true or false, got {excerpt(value)}")
        return default if value is None else value

    def text(self, name: str) -> str:
        value = self.take(name)
        if not isinstance(value, str):
            raise invalid(name, "expected a text" + ("" if value is None else f", got {excerpt(value)}"))
        return value

    def reject_others(self) -> None:
        for name in _IGNORED:
            self.take(name)
        for name, neutral in _UNSUPPORTED.items():
            value = self.take(name)
            if value is not None and value not in neutral:
                others = f"; only {' or '.join(map(repr, neutral))} is accepted" if neutral else ""
                raise invalid(name, f"not supported by this server{others}", "unsupported_parameter")
        for name in self._values:
            raise invalid(excerpt(name), "unknown field", "unknown_parameter")


def parse(body: bytes, chat: bool) -> CompletionRequest:
    """The request in ``body``, for ``/v1/chat/completions`` or ``/v1/completions``.

    Raises:
        APIError: it is not JSON in UTF-8, a field is wrong or missing, or something is not supported.
    """
    try:
        fields = _Fields(parse_json(body.decode("utf-8"), "the body of the request", dict))
    except UnicodeDecodeError as error:
        raise APIError(400, f"the body of the request: not UTF-8 text (byte {error.start})") from None
    except FileError as error:
        raise APIError(400, str(error)) from None
    model = fields.text("model")
    prompts: list[Prompt] = [_messages(fields.take("messages"))] if chat else _prompts(fields.take("prompt"))
    n = fields.integer("n", 1, MAX_CHOICES) or 1
    if n * len(prompts) > MAX_CHOICES:
        raise invalid("n", f"expected at most {MAX_CHOICES} answers, got {len(prompts)} prompts with {n} each")
    stream = fields.flag("stream")
    tools = _tools(fields) if chat else []
    schema = _response_schema(fields.take("response_format"))
    if tools and schema is not None:
        raise invalid("response_format", "not supported together with tools", "unsupported_parameter")
    echo = not chat and fields.flag("echo")
    top_logprobs = _chat_logprobs(fields) if chat else fields.integer("logprobs", 0, _MAX_TOP_LOGPROBS)
    request = CompletionRequest(
        chat=chat,
        model=model,
        prompts=prompts,
        n=n,
        tools=tools,
        parallel_tool_calls=fields.flag("parallel_tool_calls", True),
        response_schema=schema,
        echo=echo,
        max_tokens=_max_tokens(fields, chat),
        sampling=Sampling(
            temperature=_temperature(fields),
            top_p=fields.number("top_p", 1.0, 1e-6, 1.0),
            top_k=max(fields.integer("top_k", -1, 2**31 - 1) or 0, 0),  # some clients write -1 for "all"
            min_p=fields.number("min_p", 0.0, 0.0, 0.999999),
            top_logprobs=top_logprobs or 0,
            prompt_logprobs=echo and top_logprobs is not None,
        ),
        seed=fields.integer("seed", -(2**63), 2**63 - 1),
        stop=_stop(fields.take("stop")),
        logprobs=top_logprobs is not None,
        stream=stream,
        include_usage=_include_usage(fields.take("stream_options"), stream),
    )
    fields.reject_others()
    return request


def _temperature(fields: _Fields) -> float:
    value = fields.number("temperature", 1.0, 0.0, 2.0)
    if 0.0 < value < 1e-3:
        raise invalid("temperature", f"expected 0, or a number from 0.001 to 2, got {value}")
    return value


def _max_tokens(fields: _Fields, chat: bool) -> int | None:
    tokens = fields.integer("max_tokens", 1 if chat else 0)
    if not chat:
        return _DEFAULT_COMPLETION if tokens is None else tokens
    newer = fields.integer("max_completion_tokens", 1)
    if None not in (tokens, newer) and tokens != newer:
        raise invalid("max_tokens", "max_completion_tokens has another value; send one of them")
    return tokens if newer is None else newer


def _chat_logprobs(fields: _Fields) -> int | None:
    wanted = fields.flag("logprobs")
    top = fields.integer("top_logprobs", 0, _MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise invalid("top_logprobs", "expected logprobs to be true")
    return (top or 0) if wanted else None


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict):
        raise invalid("stream_options", f"expected an object, got {excerpt(options)}")
    if not stream:
        raise invalid("stream_options", "expected stream to be true")
    fields = _Fields(options)
    wanted = fields.flag("include_usage")
    fields.flag("include_obfuscation")
    fields.reject_others()
    return wanted


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    fits = isinstance(stops, list) and all(
        isinstance(text, str) and 0 < len(text) <= _MAX_STOP_LENGTH for text in stops
    )
    if not fits:
        expected = f"a text or a list of them, each of 1 to {_MAX_STOP_LENGTH} characters"
        raise invalid("stop", f"expected {expected}, got {excerpt(value)}")
    return tuple(stops)


def _tools(fields: _Fields) -> list[dict[str, Any]]:
    tools, choice = fields.take("tools"), fields.take("tool_choice")
    if tools is not None and not isinstance(tools, list):
        raise invalid("tools", f"expected a list, got {excerpt(tools)}")
    for i, tool in enumerate(tools or ()):
        place = f"tools[{i}]"
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise invalid(place, f"expected an object of type function, got {excerpt(tool)}")
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise invalid(f"{place}.function", f"expected an object with a name, got {excerpt(function)}")
        if not isinstance(function.get("parameters"), dict | None):
            schema = excerpt(function["parameters"])
            raise invalid(f"{place}.function.parameters", f"expected a JSON schema, got {schema}")
    if choice not in (None, "auto", "none"):
        raise invalid("tool_choice", f"expected auto or none, got {excerpt(choice)}", "unsupported_parameter")
    return [] if tools is None or choice == "none" else tools


def _response_schema(value: Any) -> dict[str, Any] | None:
    """The JSON schema of a ``response_format``."""
    kind = value.get("type") if isinstance(value, dict) else value
    if value is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise invalid("response_format", f"expected the type text, json_object or json_schema, got {excerpt(value)}")
    inner = value.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else inner
    if not isinstance(schema, dict):
        raise invalid("response_format.json_schema.schema", f"expected a JSON schema, got {excerpt(schema)}")
    return schema


def _prompts(value: Any) -> list[Prompt]:
    """The prompts of a completion: a text, a list of texts, a list of tokens, or a list of such lists."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if is_tokens(value):
            return [value]
        if all(isinstance(text, str) for text in value) or all(is_tokens(tokens) for tokens in value):
            return list(value)
    got = "" if value is None else f", got {excerpt(value)}"
    raise invalid("prompt", f"expected a text, tokens, or a list of one of them{got}")


def is_tokens(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        got = "" if value is None else f", got {excerpt(value)}"
        raise invalid("messages", f"expected a list of at least one message{got}")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise invalid(place, f"expected an object, got {excerpt(value)}")
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise invalid(f"{place}.role", f"expected one of {', '.join(_ROLES)}, got {excerpt(role)}")
    content, calls = value.get("content"), value.get("tool_calls") if role == "assistant" else None
    if calls and content is None:
        content = ""
    message: Message = {"role": role, "content": _content(content, f"{place}.content")}
    if calls:
        message["tool_calls"] = _calls(calls, f"{place}.tool_calls")
    for name, inner in value.items():
        # Clients send answers back, with empty fields for what an answer can have and this one did not.
        if name in message or inner in (None, []):
            continue
        if name not in _EXTRA_KEYS:
            raise invalid(f"{place}.{excerpt(name)}", "not supported by this server", "unsupported_parameter")
        if not isinstance(inner, str):
            raise invalid(f"{place}.{name}", f"expected a text, got {excerpt(inner)}")
        message[name] = inner
    return message


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise invalid(place, f"expected a list, got {excerpt(value)}")
    try:
        return [tool_call(call, place, f"[{i}]") for i, call in enumerate(value)]
    except UserError as error:
        raise APIError(400, str(error), place) from error


def _content(value: Any, place: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise invalid(place, f"expected a text or a list of parts, got {excerpt(value)}")
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text":
            raise invalid(f"{place}[{i}]", f"expected a part of type text, got {excerpt(kind)}")
        text = part.get("text")
        if not isinstance(text, str):
            raise invalid(f"{place}[{i}].text", f"expected a text, got {excerpt(text)}")
        texts.append(text)
    return "\n".join(texts)
