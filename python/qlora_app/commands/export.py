"""``qlora-ext export``: writes a trained model in the format of the program that serves it."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from qlora_ext.gguf.file import ARCHITECTURES
from qlora_ext.untrusted import printable

from ..exporting.targets import CHECKS, DENSE_LIMIT, EMBEDDINGS, FOUR_BIT_LIMIT, TARGETS
from ..options import add_base_options
from ..quantization import calibrate
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
    parser.add_argument("--to", required=True, choices=[*TARGETS], metavar="TARGET", help="one of the targets above")
    parser.add_argument("--adapter", metavar="DIR", help="the adapter, or the run that made it")
    parser.add_argument("--output", required=True, metavar="PATH", help="what is written")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier export wrote to --output")
    parser.add_argument(
        "--check", default="short", choices=[*CHECKS],
        metavar="LENGTH", help=f"short (default): compare on {CHECKS['short']:,} tokens; full; or none",
    )  # fmt: skip
    parser.add_argument(
        "--data", metavar="DATA|self",
        help="text of the check, as in finetune, or self: the model writes it (default: what the run held out)",
    )  # fmt: skip
    parser.add_argument(
        "--max-loss-increase", type=float, metavar="X",
        help=f"limit in nats per token ({FOUR_BIT_LIMIT} in 4 bits, else {DENSE_LIMIT})",
    )  # fmt: skip
    add_base_options(parser)
    parser.add_argument(
        "--dtype", default="bfloat16",
        help="dtype of the saved weights that are not 4-bit: bfloat16, float16 or float32 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--embeddings", choices=EMBEDDINGS, metavar="TYPE",
        help=f"type of embeddings and output head in GGUF: {', '.join(EMBEDDINGS)} (default: q8_0 in 4 bits, else the "
        "target's)",
    )  # fmt: skip
    calibrate.add_options(parser)
    parser.shorten_help(
        "--to", "--adapter", "--output", "--overwrite", "--check", "--data", "--max-loss-increase", "--model",
        "--embeddings", "--calibrate",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    from ..exporting import export
    from ..exporting.export_check import CheckError

    try:
        export.run(arguments)
    except CheckError as error:
        print(printable(f"qlora-ext: {error}"), file=sys.stderr)
        return EXIT_FAILED
    return 0
