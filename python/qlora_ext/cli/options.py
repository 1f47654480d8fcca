"""The options that several commands have."""

from __future__ import annotations

import argparse


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
