"""The routes of OpenAI's API over a decoder of many sequences."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import anyio
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from qlora_ext.untrusted import excerpt

from ..data import Message, as_prompt, formatted_tokens, tokenizing, unsupported_part
from ..errors import UserError
from ..special_tokens import prompt_tokens
from .answers import Answers, EncodedPrompt
from .errors import APIError, invalid
from .grammar import JSONGrammar, JSONGrammars
from .loop import DecodingLoop
from .replies import Replies, event
from .requests import CompletionRequest, Prompt, is_tokens, parse
from .text import token_places
from .tools import BEGIN

_WAITING = 64  # sequences that wait for a place in the batch. Each costs its prompt's memory
_MAX_BODY = 2 << 20  # bytes
_BODY_SECONDS = 60  # within which a client has to send its request
_T = TypeVar("_T")


def _failed(error: APIError) -> JSONResponse:
    headers = (
        {"Retry-After": "1"} if error.status == 429 else {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    )
    return JSONResponse(error.body, error.status, headers)


class _Guard:
    """Lets requests through that have the API key, or without a key those that were sent to this machine by name.

    The second check stops pages of other sites whose name was pointed at this machine (DNS rebinding): a browser sends
    the name. What they can send without such a name has no JSON type, which ``_body`` rejects.

    Args:
        key: the API key, or None.
        local: whether the server listens on a loopback address.
    """

    def __init__(self, app: ASGIApp, key: str | None, local: bool) -> None:
        self._app, self._key, self._local = app, key, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            error = self._error(scope["path"], Headers(scope=scope))
            if error is not None:
                await _failed(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _error(self, path: str, headers: Headers) -> APIError | None:
        if self._key is None:
            if self._local and not _is_local(headers.get("host", "")):
                return APIError(403, "this server has no API key, so it answers only to localhost and 127.0.0.1")
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._key.encode())
        if right or path == "/health":
            return None
        return APIError(
            401, "wrong or missing API key; expected the header Authorization: Bearer KEY", None, "invalid_api_key"
        )


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine's loopback interface."""
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


async def _body(request: Request) -> bytes:
    """The body of a request.

    Raises:
        APIError: it is too large or too slow, or not declared as JSON.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise APIError(415, "expected the header Content-Type: application/json")
    body = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            body.extend(chunk)
            if len(body) > _MAX_BODY:
                raise APIError(413, f"the body of the request is larger than {_MAX_BODY} bytes")

    try:
        await asyncio.wait_for(read(), _BODY_SECONDS)
    except asyncio.TimeoutError:
        raise APIError(408, f"the body of the request did not arrive within {_BODY_SECONDS} seconds") from None
    return bytes(body)


class _Stream(StreamingResponse):  # type: ignore[misc,unused-ignore]
    """A stream that ends the sequences behind it when it ends, in whatever way."""

    def __init__(self, answers: Answers, content: AsyncIterator[bytes]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


class Application:
    """What the routes share.

    Args:
        models: the names that a request may give, the base first, with the adapter that the decoder gets for each.
        tokenizer: of the model.
        vocabulary: the number of tokens that the model knows.
        loop: a started loop.
    """

    def __init__(self, models: Mapping[str, str], tokenizer: Any, vocabulary: int, loop: DecodingLoop) -> None:
        self._models = dict(models)
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._loop = loop
        self._created = int(time.time())
        # One thread encodes: a tokenizer may keep settings of the call.
        self._encoding = anyio.CapacityLimiter(1)
        self._preparing = 0  # sequences of requests that are being encoded
        self._grammars: JSONGrammars | None = None

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"}) if self._loop.alive else JSONResponse({"status": "ended"}, 503)

    def _model(self, name: str) -> dict[str, Any]:
        base = next(iter(self._models))
        model = {"id": name, "object": "model", "created": self._created, "owned_by": "qlora_ext"}
        return {**model, "root": base, "parent": None if name == base else base}

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._models]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._adapter(name)
        return JSONResponse(self._model(name))

    async def chat_completions(self, request: Request) -> Response:
        return await self._complete(request, chat=True)

    async def completions(self, request: Request) -> Response:
        return await self._complete(request, chat=False)

    def _adapter(self, model: str) -> str:
        if model not in self._models:
            known = ", ".join(self._models)
            message = f"model: expected one of {known}, got {excerpt(model)}"
            raise APIError(404, message, "model", "model_not_found")
        return self._models[model]

    async def _complete(self, request: Request, chat: bool) -> Response:
        asked = parse(await _body(request), chat)
        answers = await self._answers(asked, self._adapter(asked.model))
        replies = Replies(asked, self._tokenizer)
        if asked.stream:
            return _Stream(answers, _events(asked, answers, replies))
        try:
            return await _unless_disconnected(request, _whole(answers, replies))
        finally:
            answers.cancel()

    async def _answers(self, asked: CompletionRequest, adapter: str) -> Answers:
        count = asked.n * len(asked.prompts)
        if self._loop.active + self._preparing + count > self._loop.decoder.sequences + _WAITING:
            raise APIError(429, "too many requests wait; try again later", None, "rate_limit_exceeded")
        self._preparing += count
        try:
            prompts = [await self._in_thread(self._encode, asked, prompt) for prompt in asked.prompts]
            schema = asked.response_schema
            grammar = None if schema is None else await self._in_thread(self._grammar, schema)
            calls = bool(asked.tools) and BEGIN in str(self._tokenizer.get_chat_template(tools=asked.tools))
            return Answers(asked, prompts, adapter, self._tokenizer, self._loop, calls, grammar)
        finally:
            self._preparing -= count

    async def _in_thread(self, function: Callable[..., _T], *arguments: Any) -> _T:
        result: _T = await anyio.to_thread.run_sync(function, *arguments, limiter=self._encoding)
        return result

    def _grammar(self, schema: dict[str, Any]) -> JSONGrammar:
        if self._grammars is None:
            self._grammars = JSONGrammars(self._tokenizer, self._vocabulary, self._loop.decoder.end_tokens)
        return self._grammars.grammar(schema)

    def _encode(self, asked: CompletionRequest, prompt: Prompt) -> EncodedPrompt:
        param = "messages" if asked.chat else "prompt"
        tokens = self._tokens(prompt, param, asked.tools)
        if not tokens:
            raise invalid(param, "expected at least one token, got none")
        wrong = [token for token in tokens if not 0 <= token < self._vocabulary]
        if wrong:
            raise invalid(param, f"expected tokens from 0 to {self._vocabulary - 1}, got {wrong[0]}")
        capacity = self._loop.decoder.capacity
        if len(tokens) + (asked.max_tokens != 0) > capacity:
            message = f"it has {len(tokens)} tokens; the context has {capacity}, the answer included"
            raise invalid(param, message, "context_length_exceeded")
        if not asked.echo:
            return EncodedPrompt(tokens)
        echo, places = token_places(self._tokenizer, tokens, prompt if isinstance(prompt, str) else None)
        return EncodedPrompt(tokens, echo, places)

    def _tokens(self, prompt: Prompt, param: str, tools: list[dict[str, Any]]) -> list[int]:
        if is_tokens(prompt):
            return prompt
        try:
            with tokenizing(param):
                if isinstance(prompt, str):
                    return prompt_tokens(self._tokenizer, prompt)
                messages = self._with_known_roles(cast("list[Message]", prompt))
                ignored = unsupported_part(self._tokenizer, messages, tools)
                if ignored is None:
                    return formatted_tokens(self._tokenizer, as_prompt(self._tokenizer, messages, tools))
        except UserError as error:
            raise APIError(400, str(error), param) from error
        raise invalid(ignored, "the model's chat template does not support them", "unsupported_parameter")

    def _with_known_roles(self, messages: list[Message]) -> list[Message]:
        """The messages with the role "system" for "developer", OpenAI's newer name, unless the template has that."""
        if "developer" in str(self._tokenizer.chat_template):
            return messages
        return [{**message, "role": "system"} if message["role"] == "developer" else message for message in messages]


async def _whole(answers: Answers, replies: Replies) -> Response:
    pieces = [piece async for piece in answers.pieces()]
    return JSONResponse(replies.whole(pieces, answers))


async def _events(asked: CompletionRequest, answers: Answers, replies: Replies) -> AsyncIterator[bytes]:
    """The events of a stream."""
    try:
        for chunk in replies.first_chunks(asked.n):
            yield event(chunk)
        async for piece in answers.pieces():
            for chunk in replies.chunks(piece):
                yield event(chunk)
        if asked.include_usage:
            yield event(replies.usage_chunk(answers))
    except APIError as error:  # the status has been sent, so the clients get an error as an event
        yield event(error.body)
    else:
        yield event("[DONE]")


async def _unless_disconnected(request: Request, reply: Any) -> Response:
    """The result of ``reply``, which is cancelled if the client closes the connection."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    replying, leaving = asyncio.ensure_future(reply), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({replying, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not replying.done():
            raise ClientDisconnect
        return await replying
    finally:
        replying.cancel()
        leaving.cancel()


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)  # which nobody reads
    if isinstance(error, HTTPException):
        response = _failed(APIError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
        response.headers.update(error.headers or {})
        return response
    return _failed(error if isinstance(error, APIError) else APIError(500, f"unexpected {type(error).__name__}"))


def build(application: Application, key: str | None, local: bool, origins: Sequence[str] = ()) -> ASGIApp:
    """The ASGI application.

    Args:
        key: the API key that clients have to send, or None.
        local: whether the server listens on a loopback address.
        origins: those whose pages a browser lets read answers; "*": all.
    """
    app: ASGIApp = Starlette(
        routes=[
            Route("/health", application.health),
            Route("/v1/models", application.models),
            Route("/v1/models/{name:path}", application.model),
            Route("/v1/chat/completions", application.chat_completions, methods=["POST"]),
            Route("/v1/completions", application.completions, methods=["POST"]),
        ],
        middleware=[Middleware(_Guard, key=key, local=local)],
        exception_handlers=dict.fromkeys((APIError, HTTPException, ClientDisconnect, Exception), _on_error),
    )
    if origins:  # outside of all else, so that errors can be read too, and browsers ask for permission without a key
        app = CORSMiddleware(app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    return app
