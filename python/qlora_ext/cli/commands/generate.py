"""``qlora-ext generate``: text from a 4-bit model with an adapter."""

from __future__ import annotations

import argparse
from typing import Any

from ..._outside import printable
from .. import whole
from ..adapter_files import find_adapted
from ..data import as_question, tokenizing
from ..errors import UserError
from ..models import complete
from ..options import add_base_options, add_sampling_options, check_sampling


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="write text with an adapter",
        description="Loads the 4-bit model that the adapter was trained on, puts the adapter on it, and answers.",
    )
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the adapter, or the run that made it")
    parser.add_argument("--prompt", required=True, help="what to answer, or with --raw to go on from")
    parser.add_argument("--raw", action="store_true", help="do not wrap the prompt in the model's chat template")
    add_sampling_options(parser, max_new_tokens=80)
    add_base_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    check_sampling(arguments)
    if not arguments.prompt:
        raise UserError("--prompt: the prompt is empty")
    adapted = find_adapted(arguments)
    tokenizer = adapted.tokenizer
    with tokenizing("--prompt"):
        if arguments.raw:
            prompt = tokenizer(arguments.prompt)["input_ids"]
        else:
            prompt = tokenizer(as_question(tokenizer, arguments.prompt), add_special_tokens=False)["input_ids"]
    if not prompt:
        raise UserError("--prompt: there is no token in it")
    model = adapted.load_to_answer()
    from transformers import set_seed

    whole.check_tokens(model, [prompt])
    from ..compiled import PAYS_FROM, compile_decoding

    compile_decoding(model, arguments.compile, pays=arguments.max_new_tokens >= PAYS_FROM)
    set_seed(arguments.seed)
    answer = complete(model, tokenizer, prompt, arguments.max_new_tokens, arguments.temperature).strip()
    print(printable(answer, lines=True))
    return 0
