"""``qlora-ext finetune``: trains LoRA adapters on a 4-bit model, and saves them as a PEFT adapter."""

from __future__ import annotations

import argparse
from typing import Any

from ..options import DEFAULT_RUN, BaseOptions, add_options
from ..training import sweep
from ..training.config_file import read_config
from ..training.run import Request
from ..training.settings import GROUPS, Settings, named_settings
from ..training.sweep_options import parse_sweep


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "finetune",
        help="train LoRA adapters on a 4-bit model",
        description="Quantizes a language model to 4 bits, trains LoRA adapters on it, and saves them as a PEFT "
        "adapter. With no options: SmolLM2-135M-Instruct on human conversations.",
        epilog="Data with chosen and rejected answers are learnt as preferences (DPO, by TRL), pairs with a label as "
        "good or bad answers (KTO, by TRL). "
        'A row of --data is {"text": ...}, a pair such as {"prompt": ..., "completion": ...}, a conversation '
        '{"messages": [{"role": ..., "content": ...}, ...]}, a preference {"prompt": ..., "chosen": ..., "rejected": '
        '...}, or a labelled answer {"prompt": ..., "completion": ..., "label": true}; docs/data.md lists all forms. '
        "--resume continues an interrupted run from its last checkpoint; other "
        "options need not be repeated, and the final adapter is bit for bit the same. "
        "With a larger --max-steps (or --epochs), --resume extends a finished run. --overwrite replaces only files "
        "that qlora-ext wrote. --sweep trains its adapters one after the other over one base in "
        "memory, in OUTPUT/lr=0.0001,rank=8 and so on; each has the bits of a run of its own. "
        "docs/finetune.md explains the options.",
    )
    parser.add_argument("--output", metavar="DIR", help=f"directory of the run (default: {DEFAULT_RUN})")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML or JSON file with options, such as a run's settings.json",
    )
    parser.add_argument(
        "--sweep",
        action="append",
        metavar="VALUES",
        help='train an adapter with each combination of these values, such as "lr=1e-4,2e-4 rank=8,16"',
    )
    parser.add_argument("--resume", action="store_true", help="continue the run or the sweep in --output")
    parser.add_argument("--overwrite", action="store_true", help="replace what qlora-ext wrote to --output")
    parser.add_argument(
        "--force",
        action="store_true",
        help="with --resume: continue even if the base or the data have changed",
    )
    parser.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="FILE.py:FUNCTION",
        help="with --method grpo: a function that scores answers, in a file or a module; it is executed. Several "
        "options add up their rewards",
    )
    # Not a recorded setting: it must be given each time, also with --resume.
    add_options(parser, BaseOptions, ["trust_remote_code"])
    add_options(parser, Settings, titles=GROUPS, omit=True)
    parser.shorten_help(
        "--model", "--data", "--output", "--config", "--sweep", "--resume", "--overwrite", "--seq-len", "--rank",
        "--epochs", "--max-steps", "--batch-size", "--lr", "--dtype", "--max-memory",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    options = named_settings(vars(arguments))
    varied = None if arguments.sweep is None else parse_sweep(" ".join(arguments.sweep))
    if arguments.config is not None:
        options = {**read_config(arguments.config, {**options, **(varied or {})}), **options}
    output, in_file = options.pop("output", DEFAULT_RUN), options.pop("sweep", None)
    if varied is None and in_file is not None:
        varied = parse_sweep(in_file)
    request = Request(
        options,
        output if arguments.output is None else arguments.output,
        arguments.resume,
        arguments.overwrite,
        arguments.force,
        arguments.trust_remote_code,
        arguments.reward,
        varied,
        arguments.config is not None,
    )
    sweep.run(request)
    return 0
