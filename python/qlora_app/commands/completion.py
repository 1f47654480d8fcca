"""``qlora-ext completion``: a script with which a shell completes commands, options and their values."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")
_EPILOG = """\
bash        qlora-ext completion bash > ~/.local/share/bash-completion/completions/qlora-ext
zsh         qlora-ext completion zsh > DIR/_qlora-ext, where DIR is one of $fpath
fish        qlora-ext completion fish > ~/.config/fish/completions/qlora-ext.fish
tcsh        qlora-ext completion tcsh >> ~/.tcshrc
powershell  qlora-ext completion powershell >> $PROFILE
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "completion",
        help="print a completion script for a shell",
        description="Prints a script with which a shell completes commands, options and file names.",
        epilog=f"where the script goes:\n{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"one of {', '.join(SHELLS)}")
    parser.set_defaults(run=run, needs_library=False)


def _options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The options of ``parser`` and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _options(command)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    import shtab

    complete = {
        "DIR": shtab.DIRECTORY,
        "FILE": shtab.FILE,
        "PNG": shtab.FILE,
        "model": shtab.FILE,
        "data": shtab.FILE,
    }
    for action in _options(arguments.parser):
        kind = complete.get(str(action.metavar)) or complete.get(action.dest)
        if kind is not None and action.choices is None:
            action.complete = kind  # type: ignore[attr-defined]
    print(shtab.complete(arguments.parser, arguments.shell))
    return 0
