"""``qlora-ext export``: writes a trained model in the format of the program that serves it."""

from __future__ import annotations

import argparse
from typing import Any

from ...gguf.file import ARCHITECTURES
from ..exporting.targets import EMBEDDINGS, TARGETS
from ..options import add_base_options


def add_parser(commands: Any) -> None:
    names: dict[str, list[str]] = {}
    for name, target in TARGETS.items():
        names.setdefault(target.help, []).append(name)
    targets = "; ".join(f"{', '.join(alike)}: {text}" for text, alike in names.items())
    parser = commands.add_parser(
        "export",
        help="write a trained model for the program that serves it",
        description=f"Writes an adapter with its base, or a model alone, in the format of another program. {targets}. "
        "What a target cannot hold is rejected before anything is written.",
        epilog=f"Families of the GGUF targets: {', '.join(ARCHITECTURES)}.",
    )
    parser.add_argument("--to", required=True, choices=[*TARGETS], metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--adapter", metavar="DIR", help="the adapter, or the run that made it")
    parser.add_argument("--output", required=True, metavar="PATH", help="what is written")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier export wrote to --output")
    add_base_options(parser)
    parser.add_argument(
        "--dtype", default="bfloat16",
        help="dtype of the saved weights that are not 4-bit: bfloat16, float16 or float32 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--embeddings", choices=EMBEDDINGS, metavar="TYPE",
        help=f"type of embeddings and output head in the gguf: targets: {', '.join(EMBEDDINGS)} (default: q8_0 for "
        "targets of 4 bits, else the target's type; of a GGUF file with an adapter, they stay as they are)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    from ..exporting import export

    export.run(arguments)
    return 0
