"""``qlora-ext serve``: a 4-bit model and its adapters, for any client of OpenAI's API."""

from __future__ import annotations

import argparse
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
from ..options import BaseOptions, add_options, options_in
from ..vocabulary import vocabulary_size

_LIBRARIES = ("starlette", "uvicorn")  # of the extra [serve]
_CONTEXT = 4096
_PROMPT_PART = 256  # tokens of a prompt that are read while running answers wait: some tenths of a second on two cores
_KEY_VARIABLE = "QLORA_API_KEY"
_MAX_SEQUENCES = 256
_MAX_CONTEXT = 1 << 20
_BASE = "__base__"  # PEFT's name for no adapter


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve a model and its adapters over HTTP",
        description="Loads a model in 4 bits, with any number of adapters, and serves it to clients of OpenAI's API: "
        "/v1/chat/completions, /v1/completions, /v1/models. A request chooses an adapter, or the base, by its model. "
        "Requests run together, whatever their adapters. Ctrl-C ends the server.",
        epilog="pip install 'qlora_ext[serve]' installs the libraries of the server.",
    )
    parser.add_argument(
        "--adapter", action="append", metavar="[NAME=]DIR",
        help="an adapter, or the run that made it, and the name that requests give; repeat it for several adapters "
        "(default: ./qlora-run, if it exists and --model is not given; name: that of the directory)",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: any free one (default: %(default)s)")
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"key that clients have to send (default: ${_KEY_VARIABLE}; none if unset)"
    )
    parser.add_argument(
        "--cors", action="append", default=[], metavar="ORIGIN",
        help="let web pages of ORIGIN use the server (*: all pages)",
    )  # fmt: skip
    parser.add_argument(
        "--sequences", type=int, default=8, metavar="N",
        help="how many answers are written at the same time (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--context", type=int, metavar="N",
        help=f"tokens of a prompt and its answer (default: the model's, at most {_CONTEXT})",
    )  # fmt: skip
    parser.add_argument(
        "--compile", choices=("auto", "always", "never"), default="auto",
        help="decode with compiled code, which takes minutes to compile and is cached, or on a GPU with CUDA graphs; "
        "auto: if the model can be compiled (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--reproducible", action="store_true",
        help="make answers to requests with a seed independent of other requests; costs as much as --sequences answers",
    )  # fmt: skip
    add_options(parser, BaseOptions, ["model", "trust_remote_code", "force", "device", "dtype"])
    parser.set_defaults(run=run)


def _check(arguments: argparse.Namespace) -> None:
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise UserError(f"serve needs {names}, not installed here; install with: pip install 'qlora_ext[serve]'")
    for name, low, high in (("port", 0, 65535), ("sequences", 1, _MAX_SEQUENCES), ("context", 2, _MAX_CONTEXT)):
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} {value}: expected {low} to {high}")
    if arguments.api_key is None:
        arguments.api_key = os.environ.get(_KEY_VARIABLE) or None
    if arguments.api_key is not None and not re.fullmatch(r"[!-~]+", arguments.api_key):
        raise UserError("--api-key: expected printable ASCII characters without spaces")
    for origin in arguments.cors:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+", origin):
            raise UserError(
                f"--cors {excerpt(origin)}: expected * or an origin in lower case, without a path, such as "
                "https://chat.example.com or http://localhost:3000"
            )


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


def _find(arguments: argparse.Namespace) -> tuple[Adapted, dict[str, pathlib.Path | None]]:
    """The base with the first adapter, and the directories of all models by name. The base has none."""
    named = [_named(adapter) for adapter in arguments.adapter or []]
    first = named[0][1] if named else None
    adapted = find_adapted(options_in(BaseOptions, {**vars(arguments), "adapter": first}))
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


def _decoder(model: Any, arguments: argparse.Namespace) -> Any:
    from ..decoding import BatchDecoder, CompilationError

    def report(text: str) -> None:
        print(f"qlora-ext: {text}", file=sys.stderr, flush=True)

    compiled = {"auto": None, "always": True, "never": False}[arguments.compile]
    context = _context(model, arguments.context)
    try:
        return BatchDecoder(
            model,
            arguments.sequences,
            context,
            compiled=compiled,
            progress=report,
            reproducible=arguments.reproducible,
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


def _warn_of_strangers(arguments: argparse.Namespace, local: bool) -> None:
    strangers = {
        f"--host {printable(arguments.host)} lets other machines": not local,
        "--cors * lets all web pages": "*" in arguments.cors,
    }
    for let, is_open in strangers.items():
        if is_open and arguments.api_key is None:
            print(f"qlora-ext: warning: {let} use this server; require a key with --api-key", file=sys.stderr)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    _check(arguments)
    adapted, paths = _find(arguments)
    from ..decoding import prepare_to_answer
    from ..serving import server
    from ..serving.application import Application, build
    from ..serving.loop import DecodingLoop

    with server.bind(arguments.host, arguments.port) as listener:
        local = server.is_loopback(listener)
        _warn_of_strangers(arguments, local)
        model = adapted.loader.while_loading()
        adapters: dict[str, str] = {}
        for i, (name, path) in enumerate(paths.items()):
            adapters[name] = _BASE
            if path is not None:
                adapters[name] = f"adapter_{i}"  # modules have the names of adapters, so these contain no dots
                model = load(model, path, arguments.force, name=f"adapter_{i}")
        decoder = _decoder(prepare_to_answer(model), arguments)
        _try(decoder, adapters)
        vocabulary = vocabulary_size(model)
        loop = DecodingLoop(decoder)
        routes = Application(adapters, adapted.tokenizer, vocabulary, loop)
        application = build(routes, arguments.api_key, local, arguments.cors)
        loop.start()
        listener.listen()
        names = ", ".join(printable(name) for name in adapters)
        print(f"qlora-ext: serving {names} at {server.url(listener)} (Ctrl-C ends)", file=sys.stderr, flush=True)
        try:
            server.make(application, loop).run(sockets=[listener])
        except KeyboardInterrupt:
            print("qlora-ext: stopped", file=sys.stderr)
    return 0
