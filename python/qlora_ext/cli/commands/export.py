"""``qlora-ext export``: writes a trained model in the format of the program that serves it."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..._internal.untrusted import printable
from ...gguf.file import ARCHITECTURES
from ..exporting.targets import CHECKS, DENSE_LIMIT, FOUR_BIT_LIMIT, TARGETS
from ..options import add_base_options
from .check import EXIT_FAILED


def add_parser(commands: Any) -> None:
    names: dict[str, list[str]] = {}
    for name, target in TARGETS.items():
        names.setdefault(target.help, []).append(name)
    targets = "; ".join(f"{', '.join(alike)}: {text}" for text, alike in names.items())
    parser = commands.add_parser(
        "export",
        help="write a trained model for the program that serves it",
        description=f"Writes an adapter with its base, or a model alone, in the format of another program. {targets}. "
        "What a target cannot hold is rejected before anything is written. Then the result is read back and compared "
        f"with the trained model. Exit code 0: good; {EXIT_FAILED}: the loss of the result is too high, or NaN; 2: an "
        "error, and nothing was written.",
        epilog=f"Families of the GGUF targets: {', '.join(ARCHITECTURES)}.",
    )
    parser.add_argument("--to", required=True, choices=[*TARGETS], metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--adapter", metavar="DIR", help="the adapter, or the run that made it")
    parser.add_argument("--output", required=True, metavar="PATH", help="what is written")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier export wrote to --output")
    parser.add_argument(
        "--check", default="short", choices=[*CHECKS],
        help="compare the result, as its reader decodes it, with the trained model: the losses on a text (short: about "
        f"{CHECKS['short']:,} tokens, full: all, up to {CHECKS['full']:,}) and the weights (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--data", metavar="DATA|self",
        help="the text of the check: anything that finetune's --data takes, or self, a text that the model writes "
        "(default: the examples that the run held out, or self for an adapter without a run)",
    )  # fmt: skip
    parser.add_argument(
        "--max-loss-increase", type=float, metavar="X",
        help=f"the limit for exit code 0, in nats per token (default: {FOUR_BIT_LIMIT} with 4-bit weights, "
        f"{DENSE_LIMIT} without)",
    )  # fmt: skip
    add_base_options(parser)
    parser.add_argument(
        "--dtype", default="bfloat16",
        help="dtype of the saved weights that are not 4-bit: bfloat16, float16 or float32 (default: %(default)s)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    from ..exporting import check, export

    try:
        export.run(arguments)
    except check.CheckError as error:
        print(printable(f"qlora-ext: {error}"), file=sys.stderr)
        return EXIT_FAILED
    return 0
