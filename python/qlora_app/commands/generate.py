"""``qlora-ext generate``: answers a prompt with a 4-bit model and an adapter."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from qlora_ext.untrusted import printable

from ..data import as_question, formatted_tokens, tokenizing
from ..errors import UserError, check_prompt
from ..generation.completion import complete
from ..models import validate_model
from ..models.adapted import find_adapted
from ..options import SamplingOptions, add_options, options_in
from ..special_tokens import prompt_tokens


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="generate text with an adapter",
        description="Loads a model in 4 bits, with the adapter that was trained on it, and answers a prompt.",
    )
    parser.add_argument("text", nargs="?", metavar="PROMPT", help="prompt to answer, or to continue with --raw")
    parser.add_argument("--prompt", help="the prompt as an option; - reads it from standard input")
    parser.add_argument("--raw", action="store_true", help="do not wrap the prompt in the model's chat template")
    add_options(parser, SamplingOptions)
    parser.set_defaults(run=run)


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.text is not None and arguments.prompt is not None:
        raise UserError("--prompt: the prompt was given twice, with and without the option; give it once")
    prompt = arguments.text if arguments.prompt is None else arguments.prompt
    if prompt is None:
        raise UserError('--prompt: expected a prompt, as in: qlora-ext generate "Hello"')
    if prompt == "-":
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: not {error.encoding.upper()} text") from error
    if not prompt:
        raise UserError("--prompt: the prompt is empty")
    check_prompt(prompt, "--prompt")
    return str(prompt)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    options = options_in(SamplingOptions, vars(arguments))
    text = _prompt(arguments)
    adapted = find_adapted(options)
    tokenizer = adapted.tokenizer
    with tokenizing("--prompt"):
        if arguments.raw:
            prompt = prompt_tokens(tokenizer, text)
        else:
            prompt = formatted_tokens(tokenizer, as_question(tokenizer, text))
    if not prompt:
        raise UserError("--prompt: expected at least one token, got none")
    model = adapted.load_to_answer()
    from transformers import set_seed

    validate_model.check_tokens(model, [prompt])
    limit = validate_model.longest_input(model)
    if limit is not None and len(prompt) >= limit:
        raise UserError(
            f"--prompt: the prompt has {len(prompt)} tokens; the model reads at most {limit}, its answer included"
        )
    new_tokens = options.max_new_tokens if limit is None else min(options.max_new_tokens, limit - len(prompt))
    from ..generation.compiled import BREAK_EVEN_TOKENS, decode_compiled

    decode_compiled(model, options.compile, worthwhile=new_tokens >= BREAK_EVEN_TOKENS)
    set_seed(options.seed)
    answer = complete(model, tokenizer, prompt, new_tokens, options.temperature).strip()
    print(printable(answer, lines=True))
    return 0
