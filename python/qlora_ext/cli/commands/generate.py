"""``qlora-ext generate``: text from a 4-bit model with an adapter."""

from __future__ import annotations

import argparse
import math
from typing import Any

from ..._outside import printable
from .. import whole
from ..adapter_files import load_adapted
from ..data import as_question, tokenizing
from ..errors import UserError
from ..models import complete
from ..options import add_base_options

_MAX_NEW_TOKENS = 1_000_000


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="write text with an adapter",
        description="Loads the 4-bit model that the adapter was trained on, puts the adapter on it, and answers.",
    )
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the adapter, or the run that made it")
    parser.add_argument("--prompt", required=True, help="what to answer, or with --raw to go on from")
    parser.add_argument("--raw", action="store_true", help="do not wrap the prompt in the model's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=80, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0: the likeliest token (default)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (default: %(default)s)")
    add_base_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    if not 1 <= arguments.max_new_tokens <= _MAX_NEW_TOKENS:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens}: expected 1 to {_MAX_NEW_TOKENS}")
    temperature = arguments.temperature
    if temperature and not (math.isfinite(temperature) and 1e-3 <= temperature <= 1e3):
        raise UserError(f"--temperature {temperature}: expected 0, or 0.001 to 1000")
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed {arguments.seed}: expected 0 to 4294967295")
    if not arguments.prompt:
        raise UserError("--prompt: the prompt is empty")
    model, tokenizer = load_adapted(arguments)
    from transformers import set_seed

    with tokenizing("--prompt"):
        if arguments.raw:
            prompt = tokenizer(arguments.prompt)["input_ids"]
        else:
            prompt = tokenizer(as_question(tokenizer, arguments.prompt), add_special_tokens=False)["input_ids"]
    if not prompt:
        raise UserError("--prompt: there is no token in it")
    whole.check_tokens(model, [prompt])
    set_seed(arguments.seed)
    answer = complete(model, tokenizer, prompt, arguments.max_new_tokens, arguments.temperature).strip()
    print(printable(answer, lines=True))
    return 0
