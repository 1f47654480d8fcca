"""Training examples (text, conversation, preference or labelled answer), and how rows of data represent them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeAlias, TypeGuard

from qlora_ext.untrusted import FileError, excerpt, parse_json

from ..errors import UserError

Message: TypeAlias = dict[str, Any]  # role, content, and further keys for the chat template
# A text, all tokens of which are learnt; a question and its answer; or an object: a conversation ("messages", optional
# "tools"), a preference ("prompt", "chosen" and "rejected", each a list of messages, and optional "tools"), a labelled
# answer ("prompt" and "completion", each a list of messages, "label", which is true for a good answer, and optional
# "tools"), or a prompt for GRPO ("prompt" and "columns").
Example: TypeAlias = "str | list[Message] | dict[str, Any]"

# Column names of published datasets for a question and its answer, and for an addition to the question.
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("input", "output"),
)
_MORE = ("input", "context")
_CONVERSATIONS = ("messages", "conversations")
QUESTIONS = ("prompt", "question", "instruction", "input")
# Columns that change what a row means, and that are not supported.
_UNSUPPORTED = ("image", "images", "video", "videos", "audio", "audios", "functions", "chat_template_kwargs")
COLUMNS = frozenset(
    {
        "text", "chosen", "rejected", "label", "tools", "system", *_MORE, *_CONVERSATIONS, *_UNSUPPORTED,
        *(name for pair in _PAIRS for name in pair),
    }
)  # fmt: skip
EXPECTED = (
    '"text", "messages", a pair such as "prompt" and "completion", or a preference: "prompt", "chosen" and "rejected"'
)
_LABELS: dict[Any, bool] = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "function", "ipython")},
    "human": "user",
    "gpt": "assistant",
}
_WEIGHTS = ("weight", "train", "training")  # keys of a message that say how much of it is learnt
_EXTRA_KEYS = ("name", "tool_call_id", "reasoning_content", "thinking")  # of a message, for the chat template


def named(columns: Iterable[str], prompts: bool = False) -> bool:
    """Whether rows with these columns may be examples, or only prompts."""
    names = set(columns)
    if prompts:
        return not names.isdisjoint((*QUESTIONS, *_CONVERSATIONS))
    known = ({"text"}, {"chosen", "rejected"}, *({name} for name in _CONVERSATIONS), *map(set, _PAIRS))
    return any(form <= names for form in known)


def is_conversation(example: Example) -> TypeGuard[dict[str, Any]]:
    return isinstance(example, dict) and "messages" in example


def is_prompt(example: Example) -> TypeGuard[dict[str, Any]]:
    return isinstance(example, dict) and "columns" in example


def is_preference(example: Example) -> TypeGuard[dict[str, Any]]:
    return isinstance(example, dict) and "chosen" in example


def is_labelled(example: Example) -> TypeGuard[dict[str, Any]]:
    return isinstance(example, dict) and "label" in example


def kind_of(example: Example) -> str:
    """What kind of example it is, of those that no file may mix."""
    if is_preference(example):
        return "a preference"
    return "an answer with a label" if is_labelled(example) else "no preference or label"


def question(text: str) -> Message:
    return {"role": "user", "content": text}


def answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _refuse(place: str, name: str, expected: str, got: object) -> NoReturn:
    raise UserError(f"{place}: {name}: expected {expected}, got {excerpt(got)}")


def _from_json(value: Any, place: str, name: str) -> Any:
    """A list or object, parsed if the column has it as JSON text."""
    if isinstance(value, str):
        try:
            return parse_json(value, place)
        except FileError as error:
            raise UserError(f"{place}: {name}: expected JSON ({error})") from error
    return value


def _content(value: Any, place: str, name: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        _refuse(place, name, "a text or a list of text parts", value)
    texts = []
    for i, part in enumerate(value):
        text = part.get("text") if isinstance(part, dict) and (part.get("type") or "text") == "text" else part
        if not isinstance(text, str):
            _refuse(place, f"{name}[{i}]", 'a part such as {"type": "text", "text": "..."}', part)
        texts.append(text)
    return "".join(texts)


def tool_call(value: Any, place: str, name: str) -> dict[str, Any]:
    call = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        _refuse(place, name, 'a call such as {"function": {"name": "...", "arguments": {}}}', value)
    arguments = call.get("arguments")
    if isinstance(arguments, str):  # OpenAI's format; chat templates need an object
        arguments = _from_json(arguments or "{}", place, f"{name}.arguments")
    if not isinstance(arguments, dict | None):
        _refuse(place, f"{name}.arguments", "an object", arguments)
    identity = {"id": value["id"]} if isinstance(value.get("id"), str) else {}
    return {"type": "function", **identity, "function": {"name": call["name"], "arguments": arguments or {}}}


def _message(turn: Any, place: str, name: str) -> Message:
    if not isinstance(turn, dict):
        _refuse(place, name, 'an object with "role" and "content"', turn)
    turn = {key: value for key, value in turn.items() if value is not None}  # rows of a table have all fields
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in _ROLES:
        _refuse(place, f"{name}.role", f"one of {', '.join(_ROLES)}", role)
    message: Message = {"role": _ROLES[role]}
    for key in _WEIGHTS:
        if message["role"] == "assistant" and turn.get(key, 1) != 1:
            _refuse(place, f"{name}.{key}", "1 or true (every answer is learnt in full)", turn[key])
    calls = turn.get("tool_calls")
    content = turn.get("content", turn.get("value", "" if calls else None))
    message["content"] = _content(content, place, f"{name}.content")
    if calls:
        if not isinstance(calls, list):
            _refuse(place, f"{name}.tool_calls", "a list", calls)
        message["tool_calls"] = [tool_call(call, place, f"{name}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return message | {key: turn[key] for key in _EXTRA_KEYS if isinstance(turn.get(key), str)}


def _messages(value: Any, place: str, name: str) -> list[Message]:
    turns = _from_json(value, place, name)
    if not isinstance(turns, list):
        _refuse(place, name, "a list of messages", turns)
    return [_message(turn, place, f"{name}[{i}]") for i, turn in enumerate(turns)]


def conversation_in(record: Mapping[str, Any], place: str) -> tuple[str, list[Message]] | None:
    """The column of a row that has a conversation, and its messages."""
    name = next((name for name in _CONVERSATIONS if record.get(name) is not None), None)
    return None if name is None else (name, _messages(record[name], place, name))


def _as_messages(value: Any, place: str, name: str, role: str) -> list[Message]:
    """The messages in a column: one message of ``role`` if it is a text."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _messages(value, place, name)


def _tools(record: Mapping[str, Any], place: str) -> dict[str, Any]:
    tools = _from_json(record.get("tools") or None, place, "tools")
    if not tools:
        return {}
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        _refuse(place, "tools", "a list of JSON schemas", tools)
    return {"tools": tools}


def with_system(record: Mapping[str, Any], messages: list[Message], place: str) -> list[Message]:
    system = record.get("system")
    if not system or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": _content(system, place, "system")}, *messages]


def _preference(record: Mapping[str, Any], place: str) -> Example:
    asked = next((name for name in QUESTIONS if record.get(name) is not None), None)
    chosen = _as_messages(record["chosen"], place, "chosen", "assistant")
    rejected = _as_messages(record["rejected"], place, "rejected", "assistant")
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected[:-1], strict=False))
    common = sum(1 for _ in same)
    if common:  # both are conversations that begin with the prompt
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    elif asked is None:
        raise UserError(f'{place}: expected a "prompt" with "chosen" and "rejected", or conversations that share one')
    else:
        prompt = _as_messages(record[asked], place, asked, "user")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            _refuse(place, name, "one answer of the assistant", messages)
    return {
        "prompt": with_system(record, prompt, place),
        "chosen": chosen,
        "rejected": rejected,
        **_tools(record, place),
    }


def _labelled(example: Example, record: Mapping[str, Any], place: str) -> Example:
    """The example of a row with a label: the last answer of a conversation is good or bad."""
    value = record["label"]
    key = value.strip().lower() if isinstance(value, str) else value
    label = _LABELS.get(key) if isinstance(key, str | int | float) else None
    if label is None:
        raise UserError(
            f"{place}: label: expected true or false (whether the answer is good), got {excerpt(value)}; rename or "
            "remove a column that means something else"
        )
    talk: dict[str, Any] = example if is_conversation(example) else {"messages": example}
    *prompt, last = talk.pop("messages") or [{"role": None}]
    if not prompt or last["role"] != "assistant":
        _refuse(place, "label", "a conversation that ends with an answer of the assistant", [*prompt, last])
    return {"prompt": prompt, "completion": [last], "label": label, **talk}


def _pair(record: Mapping[str, Any], names: tuple[str, str], place: str) -> Example:
    first, second = (record[name] for name in names)
    if isinstance(first, str) and isinstance(second, str):
        more = next((record[name] for name in _MORE if name not in names and record.get(name) is not None), None)
        if not isinstance(more, str | None):
            _refuse(place, "input", "a text", more)
        messages = [question("\n\n".join(filter(None, (first, more)))), answer(second)]
        if not record.get("system") and not record.get("tools"):
            return messages
    else:
        answers = _as_messages(second, place, names[1], "assistant")
        if record.get("label") is not None and len(answers) != 1:
            _refuse(place, names[1], "one answer of the assistant, which the label is about", answers)
        messages = [*_as_messages(first, place, names[0], "user"), *answers]
    return {"messages": with_system(record, messages, place), **_tools(record, place)}


def _check_columns(record: Mapping[str, Any], found: set[str], place: str) -> None:
    """Rejects columns without which the others mean something else."""
    if unsupported := [name for name in _UNSUPPORTED if record.get(name)]:
        raise UserError(
            f"{place}: {unsupported[0]}: not supported, and the rest of the row means something else without it; "
            "remove the column to train on the text alone"
        )
    if len(found & {"chosen", "rejected"}) == 1:
        raise UserError(f'{place}: expected "chosen" and "rejected", the two answers of a preference, got one of them')
    if "label" in found and (
        {"chosen", "rejected"} <= found or ("text" in found and str(record["label"]).lower() in ("true", "false"))
    ):
        raise UserError(
            f"{place}: label: expected it beside a prompt and its answer, which it calls good or bad, got one beside "
            f"{'a text' if 'text' in found else 'a preference'}; remove the column"
        )


def example_of(record: Any, place: str) -> Example:
    """The example in a row of ``--data``, whatever the file format.

    Args:
        record: the columns of the row.
        place: the file and line, for the error message.

    Raises:
        UserError: the columns are unknown, or the value of one is invalid.
    """
    if isinstance(record, dict):
        found = {name for name in COLUMNS if record.get(name) is not None}
        _check_columns(record, found, place)
        if {"chosen", "rejected"} <= found:
            return _preference(record, place)
        conversation = conversation_in(record, place)
        example: Example | None = None
        if conversation is not None:
            example = {"messages": with_system(record, conversation[1], place), **_tools(record, place)}
        elif "text" in found:
            if not isinstance(record["text"], str):
                _refuse(place, "text", "a text", record["text"])
            return str(record["text"])
        elif names := next((names for names in _PAIRS if found.issuperset(names)), None):
            example = _pair(record, names, place)
        if example is not None:
            return _labelled(example, record, place) if "label" in found else example
    got = record
    if isinstance(record, dict):
        columns = (f"{name!r}{' (null)' if value is None else ''}" for name, value in record.items())
        got = f"one with {', '.join(columns) or 'nothing in it'}"
    raise UserError(f"{place}: expected an object with {EXPECTED}; got {excerpt(got, 160)}")
