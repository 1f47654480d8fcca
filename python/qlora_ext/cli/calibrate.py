"""``--calibrate``: on what a model is calibrated, how far it has come, and what is told of it."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from ..calibration import Calibration, LayerReport

LENGTH = 512


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibrate", default="none", metavar="self|DATA|none",
        help="choose scales and codes for what the layers meet on a text: one that the model writes itself, or any "
        "that finetune's --data takes. The same bytes, a better model, in minutes (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration-tokens", type=int, default=12288, metavar="N", help="of that text (default: %(default)s)"
    )
    parser.add_argument(
        "--calibration-seed", type=int, default=0, metavar="N", help="of the text it writes (default: %(default)s)"
    )


def _tokens_of(name: str, tokenizer: Any, count: int) -> Any:
    """The first ``count`` tokens of the data ``name``, in sequences of LENGTH."""
    import torch

    from .data import encode, read_examples

    rows = encode(tokenizer, read_examples(name), LENGTH, preferences=False)
    ids = list(itertools.islice((i for row in rows for i in row["input_ids"]), count))
    length = min(LENGTH, len(ids))
    if length < 8:
        raise UserError(f"--calibrate {name}: expected a text of 8 tokens or more, got {len(ids)}")
    return torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)


@contextlib.contextmanager
def calibration(arguments: argparse.Namespace, tokenizer: Any, output: pathlib.Path) -> Iterator[Calibration | None]:
    """What the options ask for, with a bar that shows how far it has come; None for ``--calibrate none``.

    The layers that are done lie beside the output until all are: a calibration that was killed goes on there.

    Raises:
        UserError: there is no such text, or too little of it.
    """
    if arguments.calibrate == "none":
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..calibration import Calibration
    from .files import remove

    if arguments.calibration_tokens < LENGTH:
        raise UserError(f"--calibration-tokens {arguments.calibration_tokens}: expected {LENGTH} or more")
    inputs = None
    if arguments.calibrate != "self":
        inputs = _tokens_of(arguments.calibrate, tokenizer, arguments.calibration_tokens)
    directory = output.with_name(f"{output.name}.calibration")
    columns = (
        TextColumn("calibrating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[layer]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("calibrating", total=None, layer="writing a text" if inputs is None else "")
        yield Calibration(
            "self" if inputs is None else inputs,
            tokens=arguments.calibration_tokens,
            length=LENGTH,
            seed=arguments.calibration_seed,
            directory=directory,
            progress=lambda done, of, layer: bar.update(task, completed=done, total=of, layer=layer),
        )
    remove(directory)


def record(arguments: argparse.Namespace, report: list[LayerReport]) -> dict[str, Any]:
    """What is kept beside the model: how it came to be."""
    return {
        "method": "weighted scales, error feedback (GPTQ)",
        "inputs": arguments.calibrate,
        "tokens": arguments.calibration_tokens,
        "seed": arguments.calibration_seed if arguments.calibrate == "self" else None,
        "layers": [dataclasses.asdict(layer) for layer in report],
    }


def told(report: list[LayerReport]) -> list[str]:
    """What is said of it at the end: how the outputs' error fell, and which layers stayed plain NF4, and why."""
    calibrated = [layer for layer in report if layer.absmax_error > 0]
    lines = []
    if calibrated:
        ratio = sum(layer.error / layer.absmax_error for layer in calibrated) / len(calibrated)
        lines.append(f"calibrated {len(calibrated)} weights: the error of their outputs is {ratio:.2f} of plain NF4's")
    plain = collections.Counter(layer.note for layer in report if layer.method == "absmax")
    return lines + [f"{count} stayed plain NF4: {why}" for why, count in plain.items()]
