"""Evaluates the part of Go's text/template that Modelfiles use: fields, variables, if, range, eq and and."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\(|\)|\S+?(?=[\s()]|$)')


@dataclasses.dataclass
class _Branch:
    """``if`` and ``range``: conditions with their bodies; the last condition may be empty (``else``)."""

    kind: str
    arms: list[tuple[str, list[Any]]]


def _parse(text: str) -> list[Any]:
    root: list[Any] = []
    bodies: list[list[Any]] = [root]
    open_branches: list[_Branch] = []
    for literal, action in re.findall(r"(.*?)(?:\{\{(.*?)\}\}|\Z)", text, flags=re.DOTALL):
        assert not action.startswith("-"), "trimming is not supported"
        assert not action.endswith("-"), "trimming is not supported"
        if literal:
            bodies[-1].append(("text", literal))
        word, _, rest = action.strip().partition(" ")
        if word in ("if", "range"):
            branch = _Branch(word, [(rest, [])])
            bodies[-1].append(branch)
            open_branches.append(branch)
            bodies.append(branch.arms[0][1])
        elif word == "else":
            assert not rest or rest.startswith("if ")
            open_branches[-1].arms.append((rest.removeprefix("if").strip(), []))
            bodies[-1] = open_branches[-1].arms[-1][1]
        elif word == "end":
            bodies.pop()
            open_branches.pop()
        elif word:
            bodies[-1].append(("action", action.strip()))
    assert not open_branches
    return root


class _Run:
    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.variables: dict[str, Any] = {}

    def value(self, expression: str, dot: Any) -> Any:
        tokens = _TOKEN.findall(expression)
        found = self._call(tokens, dot)
        assert not tokens, expression
        return found

    def _call(self, tokens: list[str], dot: Any) -> Any:
        if tokens and tokens[0] in ("eq", "and"):
            name, first, second = tokens.pop(0), self._operand(tokens, dot), self._operand(tokens, dot)
            return first == second if name == "eq" else (second if first else first)
        return self._operand(tokens, dot)

    def _operand(self, tokens: list[str], dot: Any) -> Any:
        token = tokens.pop(0)
        if token == "(":
            found = self._call(tokens, dot)
            assert tokens.pop(0) == ")"
            return found
        if token.startswith('"'):
            return json.loads(token)
        if token in ("true", "false"):
            return token == "true"
        if token.startswith("$."):
            return self.data[token[2:]]
        return self.variables[token] if token.startswith("$") else dot[token.removeprefix(".")]

    def body(self, nodes: list[Any], dot: Any) -> str:
        return "".join(self.node(node, dot) for node in nodes)

    def node(self, node: Any, dot: Any) -> str:
        if isinstance(node, _Branch):
            if node.kind == "range":
                ((expression, body),) = node.arms
                return "".join(self.body(body, item) for item in self.value(expression, dot))
            for condition, body in node.arms:
                if not condition or self.value(condition, dot):
                    return self.body(body, dot)
            return ""
        kind, text = node
        if kind == "text":
            return str(text)
        assigned = re.fullmatch(r"(\$\w+) :?= (.*)", text)
        if assigned:
            self.variables[assigned[1]] = self.value(assigned[2], dot)
            return ""
        return str(self.value(text, dot))


def render(template: str, messages: list[dict[str, str]]) -> str:
    """The prompt that Ollama makes of a conversation with this TEMPLATE."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    turns = [{"Role": m["role"], "Content": m["content"]} for m in messages]
    data = {"System": system, "Messages": turns}
    return _Run(data).body(_parse(template), data)
