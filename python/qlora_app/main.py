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

from . import suggestions
from .commands import (
    adapters,
    chat,
    check,
    completion,
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
from .errors import UserError, first_line

_TRACEBACK = "QLORA_TRACEBACK"
# torch's messages, which are RuntimeErrors.
_OUT_OF_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory|Storage size calculation overflowed")


class _HelpAll(argparse.Action):
    """Prints the help with every option, and exits."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="show all options and exit")

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> NoReturn:
        assert isinstance(parser, _Parser)
        print(parser.format_help_all(), end="")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """A parser whose errors name the help of its own command, and suggest what was probably meant.

    A command with many options calls ``shorten_help``.
    """

    _in_help: frozenset[str] | None = None

    def shorten_help(self, *options: str) -> None:
        """Makes ``--help`` show only these options, and ``--help-all`` all of them."""
        self.add_argument("--help-all", action=_HelpAll)
        self.usage = "%(prog)s [options]"
        self._in_help = frozenset(("--help", "--help-all", *options))

    def format_help_all(self) -> str:
        return super().format_help()

    def format_help(self) -> str:
        if self._in_help is None:
            return self.format_help_all()
        hidden = [action for action in self._actions if self._in_help.isdisjoint(action.option_strings)]
        texts, epilog = [action.help for action in hidden], self.epilog
        try:
            for action in hidden:
                action.help = argparse.SUPPRESS
            self.epilog = f"{self.prog} --help-all shows {len(hidden)} more options."
            return self.format_help_all()
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
        for option in self._options_among(typed):
            if not any(known.startswith(option) for known in self._option_string_actions):
                meant = suggestions.option(option, self._option_string_actions)
                self.error(f"unknown option {excerpt(option)}{meant}")
        parsed, unknown = super().parse_known_args(typed, namespace)
        if unknown:
            self.error(f"unexpected argument {excerpt(unknown[0])}")
        return parsed, unknown

    def _options_among(self, typed: list[str]) -> Iterator[str]:
        """The long options in ``typed`` for this parser, without those of a subcommand."""
        has_command = any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions)
        for argument in typed:
            if argument == "--" or (has_command and not argument.startswith("-")):
                return
            if argument.startswith("--"):
                yield argument.partition("=")[0]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        if isinstance(action, argparse._SubParsersAction):
            what, meant = "command", suggestions.command(str(value), known)
        else:
            what, meant = "/".join(action.option_strings), suggestions.value(str(value), known)
        self.error(f"{what} {excerpt(value)}: expected one of {', '.join(known)}{meant}")


class _Version(argparse.Action):
    """Prints the version, read from the compiled module, and exits."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> NoReturn:
        from qlora_ext.version import VERSION

        print(f"qlora_ext {VERSION}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qlora-ext",
        description="Fine-tune language models in 4 bits: NF4 weights, LoRA adapters, fused kernels for CPU and CUDA.",
        epilog="`qlora-ext COMMAND --help` or `qlora-ext help COMMAND` explains a command. "
        f"{_TRACEBACK}=1 prints the traceback of an error.",
    )
    parser.add_argument("--version", action=_Version)
    # "run" changes the first two, because it replaces this process by another program.
    parser.set_defaults(quiet=True, needs_library=True, parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in (
        finetune,
        generate,
        chat,
        serve,
        quantize,
        check,
        merge,
        export,
        adapters,
        plan,
        run,
        info,
        completion,
    ):
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
