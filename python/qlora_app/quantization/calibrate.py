"""``--calibrate``: the text, the progress and the report of a calibration."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qlora_ext.sizes import parse_size

from ..errors import UserError
from ..options import Options, option
from ..outputs.directory import Output
from ..outputs.waiting import waiting
from ..special_tokens import sequences, special_tokens

if TYPE_CHECKING:
    from qlora_ext.calibration import Calibration, InitLora, LayerReport

LENGTH = 512
INITIAL_ADAPTER = "initial_adapter"
RECORD = "calibration.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationOptions(Options):
    """The options of commands that calibrate 4-bit weights."""

    calibrate: str = option(
        "none",
        "choose scales and codes for the layers' inputs on a text: one that the model writes (self), or any that "
        "finetune's --data takes. Takes minutes; the model is better and has the same size",
        metavar="self|DATA|none",
    )
    distill: str = option(
        "none",
        "calibrate on such a text, and then learn the codes from the dense model's predictions on it. Takes several "
        "times as long; the model is better and has the same size",
        metavar="self|DATA|none",
    )
    distill_memory: str = option(
        "8GB",
        "learn all layers together if that takes at most this much memory (32 bytes per weight), else one block after "
        "another",
        metavar="SIZE",
    )
    calibration_tokens: int | None = option(None, "length of that text (12288, or 24576 to distill)", LENGTH)
    calibration_seed: int = option(0, "seed of the text that the model writes")

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            parse_size("--distill-memory", self.distill_memory)
        except ValueError as error:
            raise UserError(str(error)) from error
        if "none" not in (self.calibrate, self.distill):
            raise UserError("--calibrate and --distill exclude each other: --distill calibrates on its text first")

    @property
    def text(self) -> str:
        """What to calibrate on: "self", data, or "none"."""
        return self.calibrate if self.distill == "none" else self.distill

    @property
    def tokens(self) -> int:
        """The length of ``text``."""
        default = 12288 if self.distill == "none" else 24576
        return default if self.calibration_tokens is None else self.calibration_tokens

    @property
    def text_option(self) -> str:
        """The option that names ``text``."""
        return "--calibrate" if self.distill == "none" else "--distill"


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


def tokens_of(options: CalibrationOptions, tokenizer: Any, count: int, length: int) -> Any:
    """The first ``count`` tokens of the data that ``options`` name: int64 [B, length], or one shorter sequence.

    Raises:
        UserError: the data do not exist, or are too short.
    """
    import torch

    from ..data import encode, read_examples

    try:
        rows = encode(tokenizer, read_examples(options.text), length, preferences=False)
    except UserError as error:
        raise UserError(str(error).replace("--data", options.text_option, 1)) from error
    ids = list(itertools.islice((i for row in rows for i in row["input_ids"]), count))
    length = min(length, len(ids))
    if length < 8:
        raise UserError(f"{options.text_option} {options.text}: expected a text of at least 8 tokens, got {len(ids)}")
    found = [part for part in sequences(ids, length, special_tokens(tokenizer)[0]) if len(part) == length]
    return torch.tensor(found, dtype=torch.int64, device="cpu")


@contextlib.contextmanager
def stored_layers(options: CalibrationOptions, output: Output) -> Iterator[pathlib.Path | None]:
    """The directory that retains calibrated layers until the ``with`` statement ends, after the output is written.

    A command that was interrupted while calibrating or writing resumes with them. None without a text.

    Raises:
        UserError: see ``waiting``.
    """
    if options.text == "none":
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
    options: CalibrationOptions, tokenizer: Any, directory: pathlib.Path | None
) -> Iterator[Calibration | None]:
    """The calibration that the options describe, with a progress bar; None without a text.

    Args:
        directory: for finished layers, see ``stored_layers``.

    Raises:
        UserError: the text does not exist, or is too short.
    """
    if options.text == "none":
        yield None
        return
    from qlora_ext.calibration import Calibration

    from ..terminal.bars import counted

    inputs = None
    if options.text != "self":
        inputs = tokens_of(options, tokenizer, options.tokens, LENGTH)
    with counted("calibrating", "writing a text" if inputs is None else "") as progress:
        yield Calibration(
            "self" if inputs is None else inputs,
            tokens=options.tokens,
            length=LENGTH,
            batch_size=Calibration.batch_size if options.distill == "none" else 1,
            distill=options.distill != "none",
            distill_memory=options.distill_memory,
            seed=options.calibration_seed,
            directory=directory,
            progress=progress,
        )


def protect(options: CalibrationOptions, output: Output) -> None:
    """Records that the text is read."""
    if options.text not in ("none", "self"):
        output.protect(options.text_option, options.text)


def record(options: CalibrationOptions, report: list[LayerReport]) -> dict[str, Any]:
    """The record of the calibration that is saved with the model."""
    return {
        "method": "weighted scales, error feedback (GPTQ)"
        + ("" if options.distill == "none" else ", codes learnt from the dense model"),
        "inputs": options.text,
        "tokens": options.tokens,
        "seed": options.calibration_seed if options.text == "self" else None,
        "layers": [dataclasses.asdict(layer) for layer in report],
    }


def summary(report: list[LayerReport], distill: bool, plain: str = "plain NF4") -> list[str]:
    """The lines that the command prints: how the error of the outputs fell, and which layers were not calibrated.

    Args:
        distill: whether the codes were to be learnt after the calibration.
        plain: how the layers are encoded that were not calibrated.
    """
    from qlora_ext.calibration import DISTILLED

    calibrated = [layer for layer in report if layer.absmax_error > 0]
    lines = []
    if calibrated:
        ratio = sum(layer.error / layer.absmax_error for layer in calibrated) / len(calibrated)
        lines.append(f"calibrated {len(calibrated)} weights: the error of their outputs is {ratio:.2f} of {plain}'s")
    if distilled := sum(layer.method == DISTILLED for layer in report):
        lines.append(f"distilled {distilled} of them: what they compute together is closer to the dense model's")
    elif distill and calibrated:
        lines.append(
            "distilled none of them: no learnt codes were better on the held-out end of the text; try a longer one"
        )
    notes = collections.Counter(layer.note for layer in report if layer.method == "absmax")
    return lines + [f"{count} stayed {plain}: {why}" for why, count in notes.items()]
