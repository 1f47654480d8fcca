"""Options that several commands share."""

from __future__ import annotations

import argparse
import math

from qlora_ext.dtype_names import AUTO

from .errors import UserError

# The default directory of a run: ``finetune`` writes it, other commands read the adapter from it.
DEFAULT_RUN = "qlora-run"
_MAX_NEW_TOKENS = 1_000_000


def add_dtype_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--dtype`` for commands that run a model; ``models.devices.parse_computing_dtype`` parses it."""
    parser.add_argument(
        "--dtype",
        default=AUTO,
        help="dtype of the computation: bfloat16, float16, float32, or auto: bfloat16, except on a CPU that computes "
        "faster in float32 and on a GPU that lacks it, which takes float16 (default: %(default)s)",
    )


def add_adapter_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--adapter`` for commands that generate text."""
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help=f"the adapter, or the run that made it (default: ./{DEFAULT_RUN}, if it exists and --model is not given)",
    )


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of commands that put an adapter on its base, except ``--dtype``."""
    parser.add_argument("--model", help="the base model (default: the one that the adapter names)")
    add_trust_option(parser)
    parser.add_argument("--force", action="store_true", help="accept an adapter that was trained on another 4-bit base")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model named by --model"
    )


def add_sampling_options(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Adds the options of commands that generate text."""
    parser.add_argument(
        "--max-new-tokens", type=int, default=max_new_tokens, metavar="N",
        help="maximum length of an answer (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X",
        help="sampling temperature; 0 always takes the most likely token (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of sampling (default: %(default)s)")
    parser.add_argument(
        "--compile",
        choices=("auto", "always", "never"),
        default="auto",
        help="generate with compiled code, which takes about two minutes to compile and is cached for later runs; "
        "auto: if it is cached, or an answer may be long (default: %(default)s)",
    )


def check_sampling(arguments: argparse.Namespace) -> None:
    """Checks the options of ``add_sampling_options``.

    Raises:
        UserError: a value is out of range.
    """
    if not 1 <= arguments.max_new_tokens <= _MAX_NEW_TOKENS:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens}: expected 1 to {_MAX_NEW_TOKENS}")
    temperature = arguments.temperature
    if temperature and not (math.isfinite(temperature) and 1e-3 <= temperature <= 1e3):
        raise UserError(f"--temperature {temperature}: expected 0, or 0.001 to 1000")
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed {arguments.seed}: expected 0 to 4294967295")
