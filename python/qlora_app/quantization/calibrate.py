"""``--calibrate``: the text, the progress and the report of a calibration."""

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
from ..special_tokens import sequences, special_tokens

if TYPE_CHECKING:
    from qlora_ext.calibration import Calibration, InitLora, LayerReport

LENGTH = 512
INITIAL_ADAPTER = "initial_adapter"
RECORD = "calibration.json"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibrate", default="none", metavar="self|DATA|none",
        help="choose scales and codes for the layers' inputs on a text: one that the model writes (self), or any that "
        "finetune's --data takes. Takes minutes; the model is better and has the same size (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration-tokens", type=int, default=12288, metavar="N", help="length of that text (default: %(default)s)"
    )
    parser.add_argument(
        "--calibration-seed", type=int, default=0, metavar="N",
        help="seed of the text that the model writes (default: %(default)s)",
    )  # fmt: skip


def add_init_lora_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--init-lora", choices=("svd", "loftq"),
        help=f"also write an adapter to OUTPUT/{INITIAL_ADAPTER} that approximates the quantization error: of the "
        "outputs on the text of --calibrate (svd), or of the weights (loftq); finetune --init-adapter starts from it",
    )  # fmt: skip
    parser.add_argument(
        "--init-rank", type=int, default=16, metavar="N", help="rank of that adapter (default: %(default)s)"
    )


def init_lora(arguments: argparse.Namespace) -> InitLora | None:
    """The settings from ``--init-lora`` and ``--init-rank``.

    Raises:
        UserError: the rank is invalid, or "svd" has no calibration.
    """
    from qlora_ext.calibration import InitLora

    if arguments.init_lora is None:
        return None
    if arguments.init_rank < 1:
        raise UserError(f"--init-rank {arguments.init_rank}: expected 1 or more")
    if arguments.init_lora == "svd" and arguments.calibrate == "none":
        raise UserError(
            "--init-lora svd needs the layers' inputs on a text; add --calibrate self, or --calibrate with a text"
        )
    return InitLora(arguments.init_lora, arguments.init_rank)


def write_initial_adapter(model: Any, settings: InitLora, directory: pathlib.Path, base: str) -> None:
    """Saves the initial adapters of ``model`` in PEFT's format. The model is unchanged.

    Args:
        base: the name of the saved model, which the adapter records.

    Raises:
        UserError: the model has no initial adapters, because it had no dense layers.
    """
    from peft import LoraConfig, get_peft_model

    from qlora_ext.calibration import initial_lora_of
    from qlora_ext.integrations.peft import initialize_lora

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
    """The first ``count`` tokens of the data ``name`` of --calibrate: int64 [B, length], or one shorter sequence.

    Raises:
        UserError: the data do not exist, or are too short.
    """
    import torch

    from ..data import encode, read_examples

    try:
        rows = encode(tokenizer, read_examples(name), length, preferences=False)
    except UserError as error:
        raise UserError(str(error).replace("--data", "--calibrate", 1)) from error
    ids = list(itertools.islice((i for row in rows for i in row["input_ids"]), count))
    length = min(length, len(ids))
    if length < 8:
        raise UserError(f"--calibrate {name}: expected a text of at least 8 tokens, got {len(ids)}")
    found = [part for part in sequences(ids, length, special_tokens(tokenizer)[0]) if len(part) == length]
    return torch.tensor(found, dtype=torch.int64, device="cpu")


@contextlib.contextmanager
def stored_layers(arguments: argparse.Namespace, output: Output) -> Iterator[pathlib.Path | None]:
    """The directory that retains calibrated layers until the ``with`` statement ends, after the output is written.

    A command that was interrupted while calibrating or writing resumes with them. None for ``--calibrate none``.

    Raises:
        UserError: see ``waiting``.
    """
    if arguments.calibrate == "none":
        yield None
        return
    from qlora_ext.calibration import finished_weights

    with waiting(output, "calibration") as found:
        assert found is not None  # a calibration is retained inside a mount point, too
        count = finished_weights(found.directory)
        if count:
            print(f"resuming: an interrupted command has already calibrated {count} weights", flush=True)
        yield found.directory


@contextlib.contextmanager
def calibration(
    arguments: argparse.Namespace, tokenizer: Any, directory: pathlib.Path | None
) -> Iterator[Calibration | None]:
    """The calibration that the options describe, with a progress bar; None for ``--calibrate none``.

    Args:
        directory: for finished layers, see ``stored_layers``.

    Raises:
        UserError: the text does not exist, or is too short.
    """
    if arguments.calibrate == "none":
        yield None
        return
    from qlora_ext.calibration import Calibration

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
    """Records that the text of ``--calibrate`` is read."""
    if arguments.calibrate not in ("none", "self"):
        output.protect("--calibrate", arguments.calibrate)


def record(arguments: argparse.Namespace, report: list[LayerReport]) -> dict[str, Any]:
    """The record of the calibration that is saved with the model."""
    return {
        "method": "weighted scales, error feedback (GPTQ)",
        "inputs": arguments.calibrate,
        "tokens": arguments.calibration_tokens,
        "seed": arguments.calibration_seed if arguments.calibrate == "self" else None,
        "layers": [dataclasses.asdict(layer) for layer in report],
    }


def summary(report: list[LayerReport], plain: str = "plain NF4") -> list[str]:
    """The lines that the command prints: how the error of the outputs fell, and which layers were not calibrated.

    Args:
        plain: how those are encoded.
    """
    calibrated = [layer for layer in report if layer.absmax_error > 0]
    lines = []
    if calibrated:
        ratio = sum(layer.error / layer.absmax_error for layer in calibrated) / len(calibrated)
        lines.append(f"calibrated {len(calibrated)} weights: the error of their outputs is {ratio:.2f} of {plain}'s")
    notes = collections.Counter(layer.note for layer in report if layer.method == "absmax")
    return lines + [f"{count} stayed {plain}: {why}" for why, count in notes.items()]
