"""``qlora-ext export``: writes a trained model in the format of the program that serves it."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from qlora_ext.gguf.file import ARCHITECTURES
from qlora_ext.untrusted import printable

from ..exporting.targets import TARGETS, ExportRequest
from ..options import add_options, options_in
from .check import EXIT_FAILED


def _together(names: list[str]) -> list[str]:
    """The names of targets, with one entry for all types of a format: ``gguf:f16|q8_0``."""
    types: dict[str, list[str]] = {}
    for name in names:
        form, colon, kind = name.partition(":")
        types.setdefault(form + colon, []).append(kind)
    return [form + "|".join(kinds) for form, kinds in types.items()]


def add_parser(commands: Any) -> None:
    names: dict[str, list[str]] = {}
    for name, target in TARGETS.items():
        names.setdefault(target.help, []).append(name)
    targets = "; ".join(f"{', '.join(_together(alike))}: {text}" for text, alike in names.items())
    parser = commands.add_parser(
        "export",
        help="write a trained model for the program that serves it",
        description=f"Writes a trained model in the format of another program. {targets}. The result is then compared "
        f"with the trained model. Exit code 0: good; {EXIT_FAILED}: its loss is too high; 2: an error.",
        epilog=f"Families of the GGUF targets: {', '.join(ARCHITECTURES)}.",
    )
    add_options(parser, ExportRequest)
    parser.shorten_help(
        "--to", "--adapter", "--output", "--overwrite", "--check", "--data", "--max-loss-increase", "--model",
        "--embeddings", "--calibrate",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    from ..exporting import export
    from ..exporting.export_check import CheckError, check_of

    try:
        request = options_in(ExportRequest, vars(arguments))
        export.run(request, check_of(request))
    except CheckError as error:
        print(printable(f"qlora-ext: {error}"), file=sys.stderr)
        return EXIT_FAILED
    return 0
