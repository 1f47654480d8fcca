"""``qlora-ext run``: runs a program with our layers in place of bitsandbytes' NF4 layers."""

from __future__ import annotations

import argparse
import errno
import os
import pathlib
import shutil
import sys
from typing import Any

from ..errors import UserError

_LAUNCHER = pathlib.Path(__file__).parents[1] / "launcher"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="run an unmodified bitsandbytes program on these kernels",
        description="Runs COMMAND with its arguments. In every Python process that it starts, the BitsAndBytesConfig "
        "of transformers or diffusers with NF4 loads the layers of qlora_ext, as after "
        "qlora_ext.take_over_bitsandbytes(); FP4 and int8 stay bitsandbytes'. A line on stderr says "
        "how many layers of a model were replaced.",
        epilog="Examples: qlora-ext run -- python train.py; qlora-ext run -- trl sft --load_in_4bit ...",
        usage="qlora-ext run [-h] -- COMMAND ...",
    )
    parser.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER, help="the program and its arguments")
    parser.set_defaults(run=run, quiet=False, needs_library=False)


def run(arguments: argparse.Namespace) -> int:
    """Replaces this process by the program; see the module's text. Returns only if that fails."""
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        raise UserError("expected a command after --, as in: qlora-ext run -- python train.py")
    program = shutil.which(command[0])
    if program is None:
        raise UserError(f"{command[0]}: no such program")
    paths = [str(_LAUNCHER), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "QLORA_EXT_TAKE_OVER": "1", "PYTHONPATH": os.pathsep.join(paths)}
    sys.stdout.flush()
    try:
        os.execve(program, command, environment)
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
        # A script without a shebang line, which shells run with sh.
        os.execve("/bin/sh", ["sh", program, *command[1:]], environment)
