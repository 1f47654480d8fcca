"""Calls of tools in the text of an answer, in the format of Hermes and Qwen: ``<tool_call>JSON</tool_call>``."""

from __future__ import annotations

import dataclasses
import json
import re
import secrets

from qlora_ext.untrusted import FileError, parse_json

BEGIN, _END = "<tool_call>", "</tool_call>"
# The end of a text after which a call may go on: spaces, and a part of BEGIN.
_MAY_BEGIN = re.compile(r"\s*(?:" + "|".join(re.escape(BEGIN[:n]) for n in range(len(BEGIN) - 1, 0, -1)) + r")?$")


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call; ``arguments`` is JSON of an object."""

    index: int
    name: str
    arguments: str
    id: str = dataclasses.field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


class ToolCallText:
    """Separates the calls in an answer from its text, while it is written.

    Args:
        several: whether an answer may have more than one call.

    Attributes:
        found: how many calls there were.
        ended: whether nothing of the answer may follow.
    """

    def __init__(self, several: bool) -> None:
        self.found = 0
        self.ended = False
        self._several = several
        self._held = ""  # may belong to a call

    def push(self, text: str, last: bool) -> tuple[str, list[ToolCall]]:
        """The text that belongs to no call, and the calls that ``text`` completes. ``last``: no text follows."""
        text, self._held = self._held + text, ""
        shown, calls = "", list[ToolCall]()
        while (begin := text.find(BEGIN)) >= 0:
            call, ended, rest = text[begin + len(BEGIN) :].partition(_END)
            if not ended and not last:
                break
            found = self._call(call)
            if found is None:  # remains text
                shown += text[: len(text) - len(rest)]
            else:
                calls.append(found)
                shown += text[:begin].rstrip()
                if not self._several:
                    self.ended = True
                    return shown, calls
            text = rest
        if last:
            return shown + ("" if self.found and text.isspace() else text), calls
        if begin < 0:
            match = _MAY_BEGIN.search(text)
            begin = match.start() if match else len(text)
        else:
            begin = len(text[:begin].rstrip())
        self._held = text[begin:]
        return shown + text[:begin], calls

    def _call(self, text: str) -> ToolCall | None:
        try:
            call = parse_json(text, "a call of a tool", dict)
        except FileError:
            return None
        name, arguments = call.get("name"), call.get("arguments", {})
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        self.found += 1
        return ToolCall(self.found - 1, name, json.dumps(arguments, ensure_ascii=False))
