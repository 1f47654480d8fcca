"""``qlora-ext chat``: a conversation with a 4-bit model, with or without an adapter."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from typing import Any

from qlora_ext.untrusted import printable

from ..errors import UserError, check_prompt
from ..models.adapted import find_adapted
from ..options import SamplingOptions, add_options, like, option, options_in

_HELP = "/reset starts a new conversation, /exit or Ctrl-D quits, Ctrl-C stops an answer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options(SamplingOptions):
    system: str = option("", "system prompt", metavar="TEXT")
    max_new_tokens: int = like(SamplingOptions, "max_new_tokens", default=512)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk with a model",
        description="Loads a model in 4 bits, with an adapter if one is given, and answers each line in the context of "
        f"the conversation. {_HELP}.",
        epilog="If the input is not a terminal, each line is answered in turn, and only answers are printed.",
    )
    add_options(parser, _Options)
    parser.set_defaults(run=run)


def _show(text: str) -> None:
    print(printable(text, lines=True), end="", flush=True)


def _read(interactive: bool) -> str | None:
    """The next non-empty line; None at the end of the input."""
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: not {error.encoding.upper()} text") from error
        check_prompt(line, "standard input")
        if line:
            return line


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    options = options_in(_Options, vars(arguments))
    check_prompt(options.system, "--system")
    adapted = find_adapted(options)
    if options.system and not adapted.tokenizer.chat_template:
        raise UserError(f"--system: the tokenizer of {adapted.source.name} has no chat template for a system prompt")
    model = adapted.load_to_answer()
    from transformers import set_seed

    from ..generation.compiled import BREAK_EVEN_TOKENS, decode_compiled
    from ..generation.conversation import Conversation

    interactive = sys.stdin.isatty()
    decode_compiled(model, options.compile, worthwhile=interactive or options.max_new_tokens >= BREAK_EVEN_TOKENS)
    set_seed(options.seed)
    talk = Conversation(model, adapted.tokenizer, options.system, options.max_new_tokens, options.temperature)
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # enables line editing in input()
        print(_HELP)
    while (line := _read(interactive)) is not None:
        if line == "/exit":
            break
        if line == "/reset":
            talk.reset()
        elif line == "/help":
            print(_HELP, file=sys.stderr)
        else:
            _answer(talk, line, interactive)
    return 0


def _answer(talk: Any, line: str, interactive: bool) -> None:
    try:
        forgotten = talk.answer(line, _show)
    except KeyboardInterrupt:
        if not interactive:
            raise
        forgotten = 0
    except UserError as error:
        if not interactive:
            raise
        print(printable(error), file=sys.stderr)
        return
    print(flush=True)
    if forgotten:
        print(f"(the first {forgotten} questions and answers no longer fit the model's context and were dropped)",
              file=sys.stderr)  # fmt: skip
