"""``qlora-ext merge``: merges an adapter into its base, and saves a dense or a 4-bit model."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from ..errors import UserError
from ..models.adapted import find_adapted
from ..models.adapter_files import base_of, find, record_of
from ..models.pretrained import restore_use_cache
from ..models.size import model_size
from ..options import REQUIRED, SavedOptions, add_options, like, option, options_in
from ..outputs.directory import Output, claim
from ..outputs.files import write_json
from ..quantization import calibrate
from ..quantization.calibrate import CalibrationOptions
from ..training.evaluation import rows_of_run

ERROR_FILE = "merge_error.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeRequest(SavedOptions, CalibrationOptions):
    """What ``merge`` writes, and where to."""

    adapter: str = like(SavedOptions, "adapter", default=REQUIRED)
    output: str = option(REQUIRED, "output directory", metavar="DIR")
    overwrite: bool = option(False, "replace what qlora-ext wrote to --output")
    four_bit: bool = option(False, "save in 4 bits", flag="--4bit")
    evaluate: bool = option(False, "compare the run's held-out loss before and after merging")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "merge",
        help="save the adapter and its base as one model",
        description="Decodes the 4-bit base, adds the adapter, and saves the model in --dtype with its tokenizer: a "
        "directory that needs neither qlora_ext nor PEFT. With --4bit, the sum is quantized again under the scales of "
        "the base. Stochastic rounding preserves the update, although most of it is smaller than the distance between "
        f"two codes. {ERROR_FILE} reports the error of each layer.",
    )
    add_options(parser, MergeRequest)
    parser.set_defaults(run=run)


def _protect_inputs(arguments: MergeRequest, output: Output) -> None:
    adapter = find(arguments.adapter)
    output.protect("--adapter", arguments.adapter, str(adapter))
    base = base_of(adapter, arguments.model, arguments.trust_remote_code)
    output.protect("--model", arguments.model, base.on_disk)
    calibrate.protect(arguments, output)
    if arguments.evaluate:
        settings = record_of(adapter).get("settings")
        output.protect("--data", str(settings["data"]) if isinstance(settings, dict) and "data" in settings else None)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; see the module's text."""
    request = options_in(MergeRequest, vars(arguments))
    with claim(request.output, request.overwrite) as output:
        return _run(request, output)


def _run(arguments: MergeRequest, output: Output) -> int:
    if arguments.calibrate != "none" and not arguments.four_bit:
        raise UserError("--calibrate needs --4bit, because a dense model has no codes to choose")
    _protect_inputs(arguments, output)
    output.check()
    with contextlib.ExitStack() as stack:
        layers = stack.enter_context(calibrate.stored_layers(arguments, output))
        return _merge(arguments, output, layers, stack.close)


def _merge(arguments: MergeRequest, output: Output, layers: pathlib.Path | None, written: Callable[[], None]) -> int:
    """Merges and writes, and calls ``written`` when the output is complete."""
    from qlora_ext.calibration import calibration_of
    from qlora_ext.dtypes import computing_dtype
    from qlora_ext.fidelity import compare, losses_of
    from qlora_ext.integrations.peft import merge_calibrated, merge_to_4bit

    from ..exporting.tying import tie_if_equal, untie

    adapted = find_adapted(arguments)
    tokenizer = adapted.tokenizer
    if arguments.evaluate:
        parts, size, _ = rows_of_run(find(arguments.adapter), tokenizer, "--evaluate")
    model = adapted.load()
    compute = computing_dtype(adapted.loader.dtype, adapted.loader.device)  # --dtype is that of the saved weights
    if arguments.evaluate:
        from ..training.trainer import batches

        text = [*batches(parts.held_out, size, model.device)]
        unmerged = losses_of(model, text, compute)
    tied = untie(model)
    merged: Any
    error, report = None, []
    with calibrate.calibration(arguments, tokenizer, layers) as calibration:
        if calibration is not None:
            merged = merge_calibrated(model, calibration, compute)
            report = calibration_of(merged)
        elif arguments.four_bit:
            merged, error = merge_to_4bit(model)
        else:
            merged = model.merge_and_unload()
    tie_if_equal(merged, tied)
    restore_use_cache(merged, adapted.source)
    with output.written("merge") as partial:
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if error is not None:
            write_json(partial / ERROR_FILE, dataclasses.asdict(error))
        if report:
            write_json(partial / calibrate.RECORD, calibrate.record(arguments, report))
    written()
    kind = "4 bits" if arguments.four_bit else arguments.dtype
    print(f"{output.path}: {model_size(merged).bytes / 1e6:.1f} MB in {kind}")
    for line in calibrate.summary(report):
        print(line)
    if error is not None and not error.by_layer:
        print("the adapter is on dense layers only, so no code has changed")
    elif error is not None:
        worst = max(error.by_layer, key=error.by_layer.__getitem__)
        print(
            f"the codes retain {error.retained:.1%} of the adapter's update; quantization error: {error.total:.2%} of "
            f"the merged weights' norm, at most {error.by_layer[worst]:.2%} in {worst}"
        )
    if arguments.evaluate:
        found = compare(merged, unmerged, text, compute)
        rise = round(found.loss - found.base_loss, 4) + 0.0
        print(f"held-out loss: {found.base_loss:.4f} unmerged, {found.loss:.4f} merged ({rise:+.4f})")
    return 0
