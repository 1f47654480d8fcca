"""``qlora-ext merge``: the adapter added to its decoded base, as an ordinary model."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from .files import new_directory, staged_directory
from .generate import add_base_options, load_adapted


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "merge",
        help="save the adapter and its base as one ordinary model",
        description="Decodes the 4-bit base, adds the adapter, and saves the model in --dtype with its tokenizer: a "
        "directory that needs neither qlora_ext nor PEFT.",
    )
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the adapter, or the run that made it")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --output")
    add_base_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    output = pathlib.Path(arguments.output).expanduser().resolve()
    new_directory(output, arguments.overwrite)
    model, tokenizer = load_adapted(arguments)
    merged = model.merge_and_unload()
    with staged_directory(output) as partial:
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    print(f"{output}: {sum(p.nbytes for p in merged.parameters()) / 1e6:.1f} MB in {arguments.dtype}")
    return 0
