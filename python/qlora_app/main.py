"""The command line: parses the command, runs it, and reports errors."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from qlora_ext.untrusted import excerpt, printable

from .commands import (
    adapters,
    chat,
    check,
    completion,
    evaluate,
    export,
    finetune,
    generate,
    info,
    merge,
    plan,
    quantize,
    run,
    serve,
)
from .errors import UserError, did_you_mean, first_line

# As the help lists them.
_COMMANDS = (
    finetune,
    generate,
    chat,
    serve,
    quantize,
    check,
    evaluate,
    merge,
    export,
    adapters,
    plan,
    run,
    info,
    completion,
)
_TRACEBACK = "QLORA_TRACEBACK"
# torch's messages, which are RuntimeErrors.
_OUT_OF_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory|Storage size calculation overflowed")


class _Print(argparse.Action):
    """Prints a ``text`` about the parser, and exits."""

    def __init__(self, option_strings: Sequence[str], dest: str, text: Callable[[Any], str], help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)
        self._text = text

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> NoReturn:
        print(self._text(parser), end="")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """A parser whose errors name the help of its own command, and suggest what was probably meant.

    A command with many options calls ``shorten_help``.
    """

    _in_help: frozenset[str] | None = None

    def shorten_help(self, *options: str) -> None:
        """Makes ``--help`` show only these options, and ``--help-all`` all of them."""
        full = super().format_help
        self.add_argument("--help-all", action=_Print, text=lambda parser: full(), help="show all options and exit")
        self.usage = "%(prog)s [options]"
        self._in_help = frozenset(("--help", "--help-all", *options))

    def format_help(self) -> str:
        if self._in_help is None:
            return super().format_help()
        hidden = [action for action in self._actions if self._in_help.isdisjoint(action.option_strings)]
        texts, epilog = [action.help for action in hidden], self.epilog
        try:
            for action in hidden:
                action.help = argparse.SUPPRESS
            self.epilog = f"{self.prog} --help-all shows {len(hidden)} more options."
            return super().format_help()
        finally:
            self.epilog = epilog
            for action, text in zip(hidden, texts, strict=True):
                action.help = text

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Checked before argparse, which would report a misspelt required option as missing, and would pass unknown
        # options of a command up to the main parser.
        typed = sys.argv[1:] if args is None else list(args)
        has_command = any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions)
        for argument in typed:
            if argument == "--" or (has_command and not argument.startswith("-")):
                break  # what follows is not for this parser
            option = argument.partition("=")[0]
            if option.startswith("--") and not any(known.startswith(option) for known in self._option_string_actions):
                meant = did_you_mean(option, self._option_string_actions)
                self.error(f"unknown option {excerpt(option)}{meant}")
        parsed, unknown = super().parse_known_args(typed, namespace)
        if unknown:
            self.error(f"unexpected argument {excerpt(unknown[0])}")
        return parsed, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        is_command = isinstance(action, argparse._SubParsersAction)
        what = "command" if is_command else "/".join(action.option_strings)
        meant = did_you_mean(str(value), known, 0.75 if is_command else 0.55)
        self.error(f"{what} {excerpt(value)}: expected one of {', '.join(known)}{meant}")


def _version(parser: argparse.ArgumentParser) -> str:
    from qlora_ext.version import VERSION  # from the compiled module

    return f"qlora_ext {VERSION}\n"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qlora-ext",
        description="Fine-tune language models in 4 bits: NF4 weights, LoRA adapters, fused kernels for CPU and CUDA.",
        epilog="`qlora-ext COMMAND --help` or `qlora-ext help COMMAND` explains a command. "
        f"{_TRACEBACK}=1 prints the traceback of an error.",
    )
    parser.add_argument("--version", action=_Print, text=_version, help="print the version and exit")
    # "run" changes the first two, because it replaces this process by another program.
    parser.set_defaults(quiet=True, needs_library=True, parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Suppresses the libraries' warnings and progress bars, so that an error prints one sentence only."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(level)


def _report(error: Exception) -> tuple[int, str]:
    """The exit code and the message for an error."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, OSError) and error.strerror:
        return 2, f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, UnicodeEncodeError):
        text = excerpt(error.object[error.start : error.end])
        return 2, f"{text} cannot be written in {error.encoding}; set PYTHONUTF8=1, or a locale such as LC_ALL=C.UTF-8"
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return 2, "not enough memory"
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] not in ("qlora_ext", "qlora_app"):
        return 2, f"{first_line(error)}; install what the command needs with: pip install 'qlora_ext[cli]'"
    return 1, f"unexpected {type(error).__name__}: {first_line(error)} ({_TRACEBACK}=1 prints the traceback)"


def _as_options(argv: Sequence[str]) -> list[str]:
    """Translates ``version`` and ``help COMMAND`` to options."""
    if argv[:1] == ["version"]:
        return ["--version"]
    if argv[:1] == ["help"]:
        return [*argv[1:2], "--help"]
    return list(argv)


def main(argv: Sequence[str] | None = None, load_library: Callable[[], object] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments; the default is ``sys.argv[1:]``.
        load_library: runs the ``__init__`` of ``qlora_ext`` if that was deferred until a command needs it.

    Returns:
        The exit code: 0 for success; 1 for an unexpected error; 2 for an error that the user can fix, with one sentence
        on stderr; 3 if ``check`` or ``export`` rejects a model; 130 after Ctrl-C.
    """
    try:
        parser = _parser()
        arguments = parser.parse_args(_as_options(sys.argv[1:] if argv is None else argv))
        if not hasattr(arguments, "run"):
            parser.error("expected a command")
        if load_library is not None and arguments.needs_library:
            load_library()
            from qlora_ext import cpu

            cpu.set_default_wait_policy()
        with _quiet_libraries() if arguments.quiet else contextlib.nullcontext():
            status: int = arguments.run(arguments)
            return status
    except KeyboardInterrupt as stop:
        print(printable(f"qlora-ext: interrupted{f': {stop}' if str(stop) else ''}"), file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # avoids a second error at exit
        return 1
    except Exception as error:
        if os.environ.get(_TRACEBACK) == "1":
            traceback.print_exc()
        status, message = _report(error)
        print(f"qlora-ext: {printable(message)}", file=sys.stderr)
        return status
