"""``qlora-ext finetune``: a 4-bit model, LoRA adapters, text; out comes a PEFT adapter."""

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
        "saves them as a PEFT adapter. With no options: SmolLM2-135M-Instruct on human conversations. Of data with "
        "chosen and rejected answers it learns the preference (DPO, by TRL).",
        epilog='A row of --data is {"text": ...}, a pair such as {"prompt": ..., "completion": ...}, a conversation '
        '{"messages": [{"role": ..., "content": ...}, ...]} or a preference {"prompt": ..., "chosen": ..., "rejected": '
        "...}; docs/data.md has all forms. A run that was stopped, in whatever way, goes on from its last checkpoint "
        "with --resume (other options need not be repeated) and ends with the same adapter, bit for bit. "
        "With --resume and a larger --max-steps (or --epochs) a finished run is trained further. --overwrite replaces "
        "what qlora-ext wrote, and nothing else. docs/finetune.md explains the options.",
    )
    parser.add_argument(
        "--output", default=DEFAULT_RUN, metavar="DIR", help="directory of the run (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    parser.add_argument("--overwrite", action="store_true", help="replace what qlora-ext wrote to --output")
    parser.add_argument(
        "--force",
        action="store_true",
        help="with --resume: go on over another base or other data than it was begun with",
    )
    add_trust_option(parser)  # not one of the settings: it is to be said of every run, resumed ones too
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
