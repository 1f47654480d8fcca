"""``qlora-ext serve``: a 4-bit model and its adapters, for any client of OpenAI's API."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import pathlib
import re
import sys
from typing import Any

from qlora_ext.untrusted import excerpt, printable

from ..errors import UserError, first_line
from ..models import validate_model
from ..models.adapted import Adapted, find_adapted
from ..models.adapter_files import check_files, find, load
from ..models.sources import PACKAGE
from ..options import COMPILED, DEFAULT_RUN, BaseOptions, SamplingOptions, add_options, like, option, options_in
from ..vocabulary import vocabulary_size

_LIBRARIES = ("starlette", "uvicorn")  # of the extra [serve]
_CONTEXT = 4096
_PROMPT_PART = 256  # tokens of a prompt that are read while running answers wait: some tenths of a second on two cores
_KEY_VARIABLE = "QLORA_API_KEY"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeRequest(BaseOptions):
    """The options of ``serve``."""

    adapter: str | None = None  # the first of ``adapters``; no option
    adapters: tuple[str, ...] = option(
        (),
        "an adapter, or the run that made it, and the name that requests give; repeat it for several adapters "
        f"(default: ./{DEFAULT_RUN}, if it exists and --model is not given; name: that of the directory)",
        flag="--adapter",
        metavar="[NAME=]DIR",
    )
    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "0: any free one", 0, maximum=65535)
    api_key: str | None = option(
        None, f"key that clients have to send (default: ${_KEY_VARIABLE}; none if unset)", metavar="KEY"
    )
    cors: tuple[str, ...] = option((), "let web pages of ORIGIN use the server (*: all pages)", metavar="ORIGIN")
    sequences: int = option(8, "answers that are written at the same time", 1, maximum=256)
    context: int | None = option(
        None, f"tokens of a prompt and its answer (default: the model's, at most {_CONTEXT})", 2, maximum=1 << 20
    )
    compile: str = option(
        "auto",
        "decode with compiled code, which takes minutes to compile and is cached, or on a GPU with CUDA graphs; "
        "auto: if the model can be compiled",
        choices=tuple(COMPILED),
    )
    activations: str | None = like(SamplingOptions, "activations")
    reproducible: bool = option(
        False,
        "make answers to requests with a seed independent of other requests; costs as much as --sequences answers",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            raise UserError("--api-key: expected printable ASCII characters without spaces")
        for origin in self.cors:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+", origin):
                raise UserError(
                    f"--cors {excerpt(origin)}: expected * or an origin in lower case, without a path, such as "
                    "https://chat.example.com or http://localhost:3000"
                )


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve a model and its adapters over HTTP",
        description="Loads a model in 4 bits, with any number of adapters, and serves it to clients of OpenAI's API: "
        "/v1/chat/completions, /v1/completions, /v1/models. A request chooses an adapter, or the base, by its model. "
        "Requests run together, whatever their adapters. Ctrl-C ends the server.",
        epilog="pip install 'qlora_ext[serve]' installs the libraries of the server.",
    )
    add_options(parser, ServeRequest)
    parser.set_defaults(run=run)


def _request(arguments: argparse.Namespace) -> ServeRequest:
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise UserError(f"serve needs {names}, not installed here; install with: pip install 'qlora_ext[serve]'")
    key = os.environ.get(_KEY_VARIABLE) or None if arguments.api_key is None else arguments.api_key
    return options_in(ServeRequest, {**vars(arguments), "api_key": key})


def _named(adapter: str) -> tuple[str, str]:
    """The name and the directory of a value of ``--adapter``."""
    name, equals, directory = adapter.partition("=")
    if not equals or "/" in name:  # a directory whose name contains =
        path = pathlib.Path(adapter).resolve()
        return (path.parent if path.name == "adapter" else path).name, adapter
    if not name or not name.isprintable():
        raise UserError(f"--adapter {excerpt(adapter)}: expected NAME=DIR, got the name {excerpt(name)}")
    return name, directory


def _base_name(adapted: Adapted) -> str:
    """The name of the base for requests: that of its directory, file or package, or the one on the hub."""
    name = adapted.source.name.removeprefix(PACKAGE)
    return pathlib.Path(name).name if adapted.source.on_disk else name


def _find(request: ServeRequest) -> tuple[Adapted, dict[str, pathlib.Path | None]]:
    """The base with the first adapter, and the directories of all models by name. The base has none."""
    named = [_named(adapter) for adapter in request.adapters]
    adapted = find_adapted(dataclasses.replace(request, adapter=named[0][1] if named else None))
    paths: list[tuple[str, pathlib.Path | None]] = [(_base_name(adapted), None)]
    if adapted.adapter is not None and not named:  # the default run
        named = [_named(str(adapted.adapter))]
    for name, directory in named:
        path = find(directory)
        check_files(path)
        paths.append((name, path))
    models = dict(paths)
    if len(models) < len(paths):
        names = [name for name, _ in paths]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"--adapter: two models would have the name {excerpt(twice)}; choose with --adapter NAME=DIR")
    return adapted, models


def _context(model: Any, wanted: int | None) -> int:
    limit = validate_model.longest_input(model)
    if wanted is None:
        return min(_CONTEXT, limit or _CONTEXT)
    if limit is not None and wanted > limit:
        raise UserError(f"--context {wanted}: the model reads at most {limit} tokens")
    return wanted


def _decoder(model: Any, request: ServeRequest) -> Any:
    from ..decoding import BatchDecoder, CompilationError

    try:
        return BatchDecoder(
            model,
            request.sequences,
            _context(model, request.context),
            compiled=COMPILED[request.compile],
            progress=lambda text: print(f"qlora-ext: {text}", file=sys.stderr, flush=True),
            reproducible=request.reproducible,
            prompt_part=_PROMPT_PART,
        )
    except CompilationError as error:
        raise UserError(f"--compile always: this model cannot be compiled: {error}") from error
    except ValueError as error:
        raise UserError(f"this model cannot be served: {first_line(error)}") from error


def _try(decoder: Any, adapters: dict[str, str]) -> None:
    """Writes a token with every model in one batch, because some adapters cannot be mixed."""
    from ..decoding import Sampling

    requests = [decoder.submit([0], Sampling(2, temperature=0.0), adapter) for adapter in adapters.values()]
    try:
        decoder.run()
    except Exception as error:  # of PEFT, of many kinds
        raise UserError(f"--adapter: these adapters cannot be served together: {first_line(error)}") from error
    for name, request in zip(adapters, requests, strict=True):
        if request.error is not None:
            raise UserError(f"{excerpt(name)} cannot be served: {first_line(request.error)}") from request.error


def _warn_of_strangers(request: ServeRequest, local: bool) -> None:
    strangers = {
        f"--host {printable(request.host)} lets other machines": not local,
        "--cors * lets all web pages": "*" in request.cors,
    }
    for let, is_open in strangers.items():
        if is_open and request.api_key is None:
            print(f"qlora-ext: warning: {let} use this server; require a key with --api-key", file=sys.stderr)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    request = _request(arguments)
    adapted, paths = _find(request)
    from ..decoding import prepare_to_answer
    from ..decoding.fixed import BASE
    from ..serving import server
    from ..serving.application import Application, build
    from ..serving.loop import DecodingLoop

    with server.bind(request.host, request.port) as listener:
        local = server.is_loopback(listener)
        _warn_of_strangers(request, local)
        model = adapted.loader.while_loading()
        adapters: dict[str, str] = {}
        for i, (name, path) in enumerate(paths.items()):
            adapters[name] = BASE
            if path is not None:
                adapters[name] = f"adapter_{i}"  # modules have the names of adapters, so these contain no dots
                model = load(model, path, request.force, name=f"adapter_{i}")
        decoder = _decoder(prepare_to_answer(model), request)
        _try(decoder, adapters)
        vocabulary = vocabulary_size(model)
        loop = DecodingLoop(decoder)
        routes = Application(adapters, adapted.tokenizer, vocabulary, loop)
        application = build(routes, request.api_key, local, request.cors)
        loop.start()
        listener.listen()
        names = ", ".join(printable(name) for name in adapters)
        print(f"qlora-ext: serving {names} at {server.url(listener)} (Ctrl-C ends)", file=sys.stderr, flush=True)
        try:
            server.make(application, loop).run(sockets=[listener])
        except KeyboardInterrupt:
            print("qlora-ext: stopped", file=sys.stderr)
    return 0
