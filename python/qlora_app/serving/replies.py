"""Bodies of OpenAI's API: completions, chats, and the chunks of both."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from .answers import Answers, Piece, Token
from .requests import CompletionRequest
from .tools import ToolCall

_LOWEST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's API writes this too


def event(body: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


class Replies:
    """Builds the bodies of the replies to one request."""

    def __init__(self, request: CompletionRequest, tokenizer: Any) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._head = {
            "id": ("chatcmpl-" if request.chat else "cmpl-") + secrets.token_hex(12),
            "object": "chat.completion" if request.chat else "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }

    def whole(self, pieces: list[Piece], answers: Answers) -> dict[str, Any]:
        """The body with all answers, whose ``pieces`` are complete."""
        choices = []
        for index in range(max(piece.index for piece in pieces) + 1):
            own = [piece for piece in pieces if piece.index == index]
            whole = Piece(
                index,
                "".join(p.text for p in own),
                [t for p in own for t in p.tokens],
                own[-1].finish_reason,
                [c for p in own for c in p.calls],
            )
            choices.append(self._choice(whole, _message(whole) if self._request.chat else {"text": whole.text}))
        return {**self._head, "choices": choices, "usage": self._usage(answers)}

    def first_chunks(self, answers: int) -> list[dict[str, Any]]:
        """The chunks that begin the answers of a chat."""
        if not self._request.chat:
            return []
        begin = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk([self._choice(Piece(i, "", [], None), begin)]) for i in range(answers)]

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks for a piece. OpenAI's API ends a chat with an empty one."""
        if not self._request.chat:
            return [self._chunk([self._choice(piece, {"text": piece.text})])]
        chunks = []
        if piece.text or piece.tokens or piece.calls:
            part = Piece(piece.index, piece.text, piece.tokens, None)
            delta: dict[str, Any] = {"content": piece.text} if piece.text or not piece.calls else {}
            if piece.calls:
                delta["tool_calls"] = [{"index": call.index, **_tool_call(call)} for call in piece.calls]
            chunks.append(self._chunk([self._choice(part, {"delta": delta})]))
        if piece.finish_reason is not None:
            end = Piece(piece.index, "", [], piece.finish_reason)
            chunks.append(self._chunk([self._choice(end, {"delta": {}})]))
        return chunks

    def usage_chunk(self, answers: Answers) -> dict[str, Any]:
        """The chunk that ends a stream with the number of tokens."""
        return {**self._chunk([]), "usage": self._usage(answers)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {**self._head, "object": "chat.completion.chunk"} if self._request.chat else self._head
        usage = {"usage": None} if self._request.include_usage else {}
        return {**head, "choices": choices, **usage}

    def _choice(self, piece: Piece, content: dict[str, Any]) -> dict[str, Any]:
        logprobs = None
        if self._request.logprobs and piece.tokens:
            logprobs = self._chat_logprobs(piece) if self._request.chat else self._completion_logprobs(piece)
        return {"index": piece.index, **content, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _usage(self, answers: Answers) -> dict[str, int]:
        prompt, written = answers.prompt_tokens, answers.written
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def _text(self, token: int) -> str:
        text: str = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _chat_logprob(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        encoded = None if "\ufffd" in text else list(text.encode())  # the bytes of a part of a character are unknown
        return {"token": text, "logprob": _finite(logprob), "bytes": encoded}

    def _chat_logprobs(self, piece: Piece) -> dict[str, Any]:
        def entry(token: Token) -> dict[str, Any]:
            top = [self._chat_logprob(other, logprob) for other, logprob in token.top]
            return {**self._chat_logprob(token.id, token.logprob), "top_logprobs": top}

        return {"content": [entry(token) for token in piece.tokens], "refusal": None}

    def _completion_logprobs(self, piece: Piece) -> dict[str, Any]:
        wanted = self._request.sampling.top_logprobs > 0
        return {
            "tokens": [self._text(token.id) for token in piece.tokens],
            "token_logprobs": [_finite(token.logprob) for token in piece.tokens],
            "top_logprobs": [self._top(token) for token in piece.tokens] if wanted else None,
            "text_offset": [token.offset for token in piece.tokens],
        }

    def _top(self, token: Token) -> dict[str, float | None] | None:
        """The most likely tokens and ``token`` itself. Of several with the same text, the most likely one counts."""
        if token.logprob is None:
            return None
        tops: dict[str, float | None] = {}
        for other, logprob in [*token.top, (token.id, token.logprob)]:
            tops.setdefault(self._text(other), _finite(logprob))
        return tops


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LOWEST_LOGPROB)


def _tool_call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _message(answer: Piece) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if answer.calls:
        message |= {"content": answer.text or None, "tool_calls": [_tool_call(call) for call in answer.calls]}
    return {"message": message}
