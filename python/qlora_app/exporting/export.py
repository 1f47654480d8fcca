"""``export``: writes a trained model for another program. The command and the Python function share it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from typing import Any

from qlora_ext.gguf.file import VERSION_KEY
from qlora_ext.untrusted import printable

from ..errors import UserError, as_arguments
from ..models.adapter_files import base_of, find, record_of
from ..models.sources import resolve
from ..options import keywords_of
from ..outputs.directory import Output, claim
from ..outputs.files import filled_from_inside, need_space
from ..outputs.output_file import claim_file
from ..quantization import calibrate as calibrating
from .export_check import Check, CheckError, check_of
from .targets import TARGETS, ExportRequest, Target
from .trained_for import warn_of_other_format


def _protect_inputs(request: ExportRequest, output: Output, checks: bool) -> None:
    trusted, data = request.trust_remote_code, request.data
    if request.adapter is None:
        assert request.model is not None
        source = resolve(request.model, trusted)
    else:
        adapter = find(request.adapter)
        output.protect("--adapter", request.adapter, str(adapter))
        source = base_of(adapter, request.model, trusted)
        if checks:  # on the data of the run, if none are named
            data = data or (record_of(adapter).get("settings") or {}).get("data")
    output.protect("--model", request.model, source.on_disk)
    calibrating.protect(request, output)
    output.protect("--data", None if data is None else str(data))


def _claim(request: ExportRequest, target: Target) -> contextlib.AbstractContextManager[Output]:
    if target.suffix is None:
        return claim(request.output, request.overwrite)
    return claim_file(request.output, request.overwrite, target.suffix, VERSION_KEY)


def run(request: ExportRequest, check: type[Check] | None) -> pathlib.Path:
    """Runs ``export`` or ``merge``, and returns the path of the result.

    A target first prepares: it rejects what it cannot hold, and estimates its size. Nothing is written until then.

    Args:
        check: makes the check of the result, whose data are read before it is written.

    Raises:
        UserError: nothing was written, or the result cannot be checked. CheckError: the result is worse than the
            trained model.
    """
    if request.adapter is None and request.model is None:
        raise UserError("export: expected an adapter (--adapter) or a model (--model), got neither")
    if request.to in ("gguf", "ollama"):
        from .gguf_model import default_kind

        request = dataclasses.replace(request, to=f"{request.to}:{default_kind(request)}")
    target = TARGETS[request.to]
    if request.embeddings is not None and not target.has_embeddings:
        raise UserError(f"--embeddings: expected a target that is a whole model as GGUF, got --to {request.to}")
    with _claim(request, target) as output:
        _protect_inputs(request, output, check is not None)
        output.check()
        warn_of_other_format(request)
        job = target.prepare(request)
        if request.text != "none" and job.calibrates is None:
            raise UserError(
                f"{request.text_option} {request.text}: --to {request.to} cannot calibrate this model. Either the "
                "target has no 4-bit weights to encode, or the model is already quantized "
                "and has no adapter. Omit the option"
            )
        print(f"{output.path} needs about {job.nbytes / 1e6:.1f} MB of disk space", flush=True)
        disk = output.path if filled_from_inside(output.path) else output.path.parent
        need_space(disk, job.nbytes, output.path.name)
        checked = None if check is None else check(request, job)
        with calibrating.stored_layers(request, output) as layers:
            tokenizer = None if job.calibrates is None else job.calibrates.tokenizer
            with calibrating.calibration(request, tokenizer, layers) as calibration:
                write = job.build(calibration)
            with output.written(request.command) as partial:
                write(partial)
        size = sum(path.stat().st_size for path in (output.path, *output.path.rglob("*")) if path.is_file())
        print(f"{printable(output.path)}: {size / 1e6:.1f} MB in {request.result}", flush=True)
        del write
        if checked is not None:
            checked.report(output.path)
        return output.path


def export(*, to: str, output: str | os.PathLike[str], **options: Any) -> pathlib.Path:
    """Writes a trained model for another program, like the command ``qlora-ext export``.

    It prints what the command prints. ``docs/deploy.md`` explains the targets.

    Args:
        to: the target: ``dense``, ``nf4``, ``bitsandbytes``, ``compressed-tensors:int4``, ``compressed-tensors:nvfp4``,
            ``compressed-tensors:mxfp4``, ``gguf-adapter``, ``gguf-adapter:f16``, ``gguf``, ``gguf:f16``,
            ``gguf:bf16``, ``gguf:q8_0``, ``gguf:q4_0``, ``gguf:q4_1``, ``gguf:iq4_nl``, ``gguf:mxfp4``, ``gguf:same``,
            ``ollama``, ``ollama:`` with one of these types, or ``ollama:adapter``.
        output: the directory, or the .gguf file, that is written. It appears complete or not at all.
        options: the options of the command, with underscores: ``adapter="RUN"``, ``check="full"``,
            ``calibrate="self"``, ``overwrite=True``. None stands for the default.

    Returns:
        The path of the result.

    Raises:
        TypeError: an option is unknown, or its value has a wrong type.
        ValueError: the target cannot hold the model or the adapter, an argument is invalid, a file is missing or
            damaged, or the disk is too full. The message names the argument, and a target that works.
        RuntimeError: the result was written, but its loss exceeds that of the trained model by more than
            ``max_loss_increase``.
        ImportError: a required library is missing.

    Example:
        >>> def serve(run):
        ...     return qlora_app.export(adapter=run, to="dense", output="merged")
        >>> qlora_app.export(to="dense", output="merged")
        Traceback (most recent call last):
        ValueError: export: expected an adapter (adapter) or a model (model), got neither
    """
    try:
        request = ExportRequest(**keywords_of("export", ExportRequest, {"to": to, "output": output, **options}))
        return run(request, check_of(request))
    except UserError as error:
        raise ValueError(as_arguments(str(error))) from error
    except CheckError as error:
        raise RuntimeError(as_arguments(str(error))) from error
