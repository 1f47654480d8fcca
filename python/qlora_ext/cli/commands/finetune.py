"""``qlora-ext finetune``: trains LoRA adapters on a 4-bit model, and saves them as a PEFT adapter."""

from __future__ import annotations

import argparse
from typing import Any

from ..options import DEFAULT_RUN, add_trust_option
from ..training.recipe import Recipe
from ..training.run import Request
from ..training.settings import add_options, named_settings


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "finetune",
        help="train LoRA adapters on a 4-bit model",
        description="Quantizes a language model to 4 bits (NF4, double quantization), trains LoRA adapters on it, and "
        "saves them as a PEFT adapter. Without options, it trains SmolLM2-135M-Instruct on human conversations. From "
        "data with chosen and rejected answers, it learns the preference (DPO, by TRL).",
        epilog='A row of --data is {"text": ...}, a pair such as {"prompt": ..., "completion": ...}, a conversation '
        '{"messages": [{"role": ..., "content": ...}, ...]} or a preference {"prompt": ..., "chosen": ..., "rejected": '
        "...}; docs/data.md lists all forms. --resume continues an interrupted run from its last checkpoint; other "
        "options need not be repeated, and the final adapter is bit for bit the same. "
        "With a larger --max-steps (or --epochs), --resume extends a finished run. --overwrite replaces only files "
        "that qlora-ext wrote. docs/finetune.md explains the options.",
    )
    parser.add_argument(
        "--output", default=DEFAULT_RUN, metavar="DIR", help="directory of the run (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --output")
    parser.add_argument("--overwrite", action="store_true", help="replace what qlora-ext wrote to --output")
    parser.add_argument(
        "--force",
        action="store_true",
        help="with --resume: continue even if the base or the data have changed",
    )
    add_trust_option(parser)  # not a recorded setting: it must be given each time, also with --resume
    add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    request = Request(
        named_settings(vars(arguments)),
        arguments.output,
        arguments.resume,
        arguments.overwrite,
        arguments.force,
        arguments.trust_remote_code,
    )
    Recipe(request).run()
    return 0
