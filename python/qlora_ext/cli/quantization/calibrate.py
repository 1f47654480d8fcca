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

from ..errors import UserError
from ..outputs.directory import Output
from ..outputs.waiting import waiting

if TYPE_CHECKING:
    from ...calibration import Calibration, InitLora, LayerReport

LENGTH = 512
INITIAL_ADAPTER = "initial_adapter"
RECORD = "calibration.json"


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


def add_init_lora_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--init-lora", choices=("svd", "loftq"),
        help=f"write an adapter too, into OUTPUT/{INITIAL_ADAPTER}, that begins with what quantizing takes away: the "
        "best for the outputs on the text of --calibrate (svd), or for the weights (loftq); finetune "
        "--init-adapter goes on from it",
    )  # fmt: skip
    parser.add_argument(
        "--init-rank", type=int, default=16, metavar="N", help="rank of that adapter (default: %(default)s)"
    )


def init_lora(arguments: argparse.Namespace) -> InitLora | None:
    """What those options ask for.

    Raises:
        UserError: there is no such rank, or nothing to weigh errors by.
    """
    from ...calibration import InitLora

    if arguments.init_lora is None:
        return None
    if arguments.init_rank < 1:
        raise UserError(f"--init-rank {arguments.init_rank}: expected 1 or more")
    if arguments.init_lora == "svd" and arguments.calibrate == "none":
        raise UserError(
            "--init-lora svd: needs the layers' inputs to weigh what each layer loses; add --calibrate self, or a text"
        )
    return InitLora(arguments.init_lora, arguments.init_rank)


def write_initial_adapter(model: Any, settings: InitLora, directory: pathlib.Path, base: str) -> None:
    """Saves the adapter that was found with ``model``, which stays as it is, in PEFT's form.

    Args:
        base: the name under which the model will be found.

    Raises:
        UserError: nothing was found: there was no dense layer.
    """
    from peft import LoraConfig, get_peft_model

    from ...calibration import initial_lora_of
    from ...integrations.peft import initialize_lora

    found = initial_lora_of(model)
    if not found:
        raise UserError(
            "--init-lora: expected a dense model, got one that is already 4-bit; name the "
            "model that it was quantized from"
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.rank,
        target_modules=sorted(found),
    )
    adapted = get_peft_model(model, config)
    initialize_lora(adapted)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(str(directory))
    adapted.unload()


def tokens_of(name: str, tokenizer: Any, count: int, length: int) -> Any:
    """The first ``count`` tokens of the data ``name`` of --calibrate, int64 [B, length]; of a short text, one sequence.

    Raises:
        UserError: there is no such text, or too little of it.
    """
    import torch

    from ..data import encode, read_examples

    rows = encode(tokenizer, read_examples(name), length, preferences=False)
    ids = list(itertools.islice((i for row in rows for i in row["input_ids"]), count))
    length = min(length, len(ids))
    if length < 8:
        raise UserError(f"--calibrate {name}: expected a text of at least 8 tokens, got {len(ids)}")
    return torch.tensor(ids[: len(ids) // length * length], dtype=torch.int64, device="cpu").reshape(-1, length)


@contextlib.contextmanager
def stored_layers(arguments: argparse.Namespace, output: Output) -> Iterator[pathlib.Path | None]:
    """The directory that retains calibrated layers until the block, which writes the output, ends.

    A command that was interrupted while calibrating or writing resumes with them. None for ``--calibrate none``.

    Raises:
        UserError: see ``waiting``.
    """
    if arguments.calibrate == "none":
        yield None
        return
    from ...calibration import finished_weights

    with waiting(output, "calibration") as found:
        assert found is not None  # a calibration has a place everywhere
        count = finished_weights(found.directory)
        if count:
            print(f"resuming: an interrupted command has already calibrated {count} weights", flush=True)
        yield found.directory


@contextlib.contextmanager
def calibration(
    arguments: argparse.Namespace, tokenizer: Any, directory: pathlib.Path | None
) -> Iterator[Calibration | None]:
    """What the options ask for, with a bar that shows how far it has come; None for ``--calibrate none``.

    Args:
        directory: for the layers that are done; see ``stored_layers``.

    Raises:
        UserError: there is no such text, or too little of it.
    """
    if arguments.calibrate == "none":
        yield None
        return
    from ...calibration import Calibration
    from ..terminal.bars import counted

    if arguments.calibration_tokens < LENGTH:
        raise UserError(f"--calibration-tokens {arguments.calibration_tokens}: expected {LENGTH} or more")
    inputs = None
    if arguments.calibrate != "self":
        inputs = tokens_of(arguments.calibrate, tokenizer, arguments.calibration_tokens, LENGTH)
    with counted("calibrating", "writing a text" if inputs is None else "") as progress:
        yield Calibration(
            "self" if inputs is None else inputs,
            tokens=arguments.calibration_tokens,
            length=LENGTH,
            seed=arguments.calibration_seed,
            directory=directory,
            progress=progress,
        )


def protect(arguments: argparse.Namespace, output: Output) -> None:
    """Notes that the text of ``--calibrate`` is read."""
    if arguments.calibrate not in ("none", "self"):
        output.protect("--calibrate", arguments.calibrate)


def record(arguments: argparse.Namespace, report: list[LayerReport]) -> dict[str, Any]:
    """What is kept beside the model: how it came to be."""
    return {
        "method": "weighted scales, error feedback (GPTQ)",
        "inputs": arguments.calibrate,
        "tokens": arguments.calibration_tokens,
        "seed": arguments.calibration_seed if arguments.calibrate == "self" else None,
        "layers": [dataclasses.asdict(layer) for layer in report],
    }


def summary(report: list[LayerReport]) -> list[str]:
    """What is said of it at the end: how the outputs' error fell, and which layers stayed plain NF4, and why."""
    calibrated = [layer for layer in report if layer.absmax_error > 0]
    lines = []
    if calibrated:
        ratio = sum(layer.error / layer.absmax_error for layer in calibrated) / len(calibrated)
        lines.append(f"calibrated {len(calibrated)} weights: the error of their outputs is {ratio:.2f} of plain NF4's")
    plain = collections.Counter(layer.note for layer in report if layer.method == "absmax")
    return lines + [f"{count} stayed plain NF4: {why}" for why, count in plain.items()]
