"""``qlora-ext generate``: text from a 4-bit model with an adapter."""

from __future__ import annotations

import argparse
import math
from typing import Any

from .._outside import printable
from . import adapter as adapters
from . import whole
from .data import as_question, tokenizing
from .errors import UserError
from .models import BLOCK_SIZES, load_quantized, load_tokenizer, parse_device, parse_dtype

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


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """The options of every command that puts an adapter on its base."""
    parser.add_argument("--model", help="the base model, if not where the adapter says")
    add_trust_option(parser)
    parser.add_argument("--force", action="store_true", help="accept an adapter that was trained on another 4-bit base")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32 (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model named by --model"
    )


def load_adapted(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The 4-bit base with the adapter on it, and its tokenizer."""
    path = adapters.find(arguments.adapter)
    source = adapters.base_of(path, arguments.model, arguments.trust_remote_code)
    dtype, device = parse_dtype(arguments.dtype), parse_device(arguments.device)
    block_size = (adapters.record_of(path).get("settings") or {}).get("block_size", 64)
    if block_size not in BLOCK_SIZES:
        raise UserError(f"{path / adapters.RECORD}: expected a block_size of {BLOCK_SIZES}, got {block_size}")
    tokenizer = load_tokenizer(source)
    model = load_quantized(source, dtype, device, block_size)
    return adapters.load(model, path, arguments.force), tokenizer


def complete(model: Any, tokenizer: Any, prompt: list[int], max_new_tokens: int, temperature: float = 0.0) -> str:
    """How the model goes on after the token ids ``prompt``. Without temperature it draws no random number."""
    import torch

    was_training = model.training
    model.eval()
    ids = torch.tensor([prompt], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            **sampling,
        )
    model.train(was_training)
    text: str = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
    return text


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
