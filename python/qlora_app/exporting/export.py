"""``export``: writes a trained model for another program. The command and the Python function share it."""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
from typing import Any

from qlora_ext.gguf.file import VERSION_KEY
from qlora_ext.untrusted import printable

from ..errors import UserError, as_arguments
from ..models.adapter_files import base_of, find
from ..models.sources import resolve
from ..outputs.directory import Output, claim
from ..outputs.files import need_space
from ..outputs.output_file import claim_file
from ..quantization import calibrate as calibrating
from .export_check import Check, CheckError, check_options, require, show
from .job import Job
from .targets import CHECKS, EMBEDDINGS, TARGETS, Target
from .trained_for import warn_of_other_format


def _protect_inputs(arguments: argparse.Namespace, output: Output) -> None:
    calibrating.protect(arguments, output)
    trusted = arguments.trust_remote_code
    if arguments.adapter is None:
        output.protect("--model", arguments.model, resolve(arguments.model, trusted).on_disk)
        return
    adapter = find(arguments.adapter)
    output.protect("--adapter", arguments.adapter, str(adapter))
    output.protect("--data", arguments.data)
    output.protect("--model", arguments.model, base_of(adapter, arguments.model, trusted).on_disk)


def _claim(arguments: argparse.Namespace, target: Target) -> contextlib.AbstractContextManager[Output]:
    if target.suffix is None:
        return claim(arguments.output, arguments.overwrite)
    return claim_file(arguments.output, arguments.overwrite, target.suffix, VERSION_KEY)


def _calibrate(arguments: argparse.Namespace, job: Job, layers: pathlib.Path | None) -> None:
    """Encodes the weights that ``--calibrate`` asks for, and retains finished ones in the directory ``layers``."""
    assert job.calibrated is not None
    with calibrating.calibration(arguments, job.calibrated.adapted.tokenizer, layers) as calibration:
        assert calibration is not None
        job.calibrated.compute(calibration)


def run(arguments: argparse.Namespace) -> pathlib.Path:
    """Runs the command, and returns the path of the result.

    A target first prepares: it rejects what it cannot hold, and estimates its size. Nothing is written until then.

    Raises:
        UserError: nothing was written, or the result cannot be checked. CheckError: the result is worse than the
            trained model.
    """
    if arguments.adapter is None and arguments.model is None:
        raise UserError("export: expected an adapter (--adapter) or a model (--model), got neither")
    check_options(arguments)
    target = TARGETS[arguments.to]
    if arguments.embeddings is not None and not target.has_embeddings:
        raise UserError(f"--embeddings: expected a target that is a whole model as GGUF, got --to {arguments.to}")
    with _claim(arguments, target) as output:
        _protect_inputs(arguments, output)
        output.check()
        if arguments.adapter is not None:
            warn_of_other_format(arguments.to, arguments.adapter)
        job = target.prepare(arguments)
        if arguments.calibrate != "none" and job.calibrated is None:
            raise UserError(
                f"--calibrate {arguments.calibrate}: --to {arguments.to} cannot calibrate this model. Either the "
                "target has no 4-bit weights to encode, or the model is already quantized "
                "and has no adapter. Omit --calibrate"
            )
        print(f"{output.path} needs about {job.nbytes / 1e6:.1f} MB of disk space", flush=True)
        need_space(output.path.parent, job.nbytes, output.path.name)
        check = None if arguments.check == "none" else Check(arguments, job)
        with calibrating.stored_layers(arguments, output) as layers:
            if arguments.calibrate != "none":
                _calibrate(arguments, job, layers)
            write = job.build()
            with output.written("export") as partial:
                write(partial)
        size = sum(path.stat().st_size for path in (output.path, *output.path.rglob("*")) if path.is_file())
        print(f"{printable(output.path)}: {size / 1e6:.1f} MB in {arguments.to}", flush=True)
        del write
        if check is not None:
            report = check.report(output.path)
            show(report)
            limit = arguments.max_loss_increase
            require(report, output.path, target.max_loss_increase if limit is None else limit)
        return output.path


def export(
    *,
    to: str,
    output: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | None = None,
    check: str = "short",
    data: str | os.PathLike[str] | None = None,
    max_loss_increase: float | None = None,
    dtype: str = "bfloat16",
    embeddings: str | None = None,
    calibrate: str | os.PathLike[str] = "none",
    calibration_tokens: int = 12288,
    calibration_seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
) -> pathlib.Path:
    """Writes a trained model for another program, like the command ``qlora-ext export``.

    It prints what the command prints. ``docs/deploy.md`` explains the targets.

    Args:
        to: the target: ``dense``, ``bitsandbytes``, ``compressed-tensors:int4``, ``compressed-tensors:nvfp4``,
            ``compressed-tensors:mxfp4``, ``gguf-adapter``, ``gguf-adapter:f16``, ``gguf:f16``, ``gguf:bf16``,
            ``gguf:q8_0``, ``gguf:q4_0``, ``gguf:q4_1``, ``gguf:iq4_nl``, ``gguf:mxfp4``, ``ollama``, ``ollama:`` with
            one of these types, or ``ollama:adapter``.
        output: the directory, or the .gguf file, that is written. It appears complete or not at all.
        adapter: the adapter, or the run that made it.
        model: the base of the adapter (default: the one that it names), or without an adapter, the model to export.
        check: compare the result, as its reader decodes it, with the trained model: "short" on about 2,048 tokens,
            "full" on all, up to 65,536; or "none".
        data: the text on which the losses are compared: anything that ``finetune`` takes, or "self", a text that the
            model writes. The default are the examples that the run of ``adapter`` has held out, or "self" without one.
        max_loss_increase: the limit of the increase of the loss, in nats per token. The default depends on the target:
            0.3 with 4-bit weights, 0.02 without.
        dtype: of the weights that are not 4-bit.
        embeddings: the type of embeddings and output head in the targets ``gguf:...`` and ``ollama:...``: ``f32``,
            ``f16``, ``bf16``, ``q8_0`` or one of 4 bits. The default is ``q8_0`` for targets of 4 bits and the target's
            type for others; those of a GGUF file with an adapter stay as they are.
        calibrate: for targets of 4 bits, choose the scales and codes of weights in another format for the layers'
            inputs on a text: "self", a text that the model writes, or anything that ``finetune`` takes.
        calibration_tokens: the length of that text.
        calibration_seed: of the text that the model writes.
        device: where the model is merged.
        overwrite: replace what an earlier export wrote to ``output``. Other files are never deleted.
        force: accept an adapter that was trained on another 4-bit base.
        trust_remote_code: run Python code that comes with ``model``.

    Returns:
        The path of the result.

    Raises:
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
    if to not in TARGETS:
        raise ValueError(f"to: expected one of {', '.join(TARGETS)}, got {to!r}")
    if check not in CHECKS:
        raise ValueError(f"check: expected one of {', '.join(CHECKS)}, got {check!r}")
    if embeddings is not None and embeddings not in EMBEDDINGS:
        raise ValueError(f"embeddings: expected one of {', '.join(EMBEDDINGS)}, got {embeddings!r}")
    paths: dict[str, Any] = {"output": output, "adapter": adapter, "model": model, "data": data}
    arguments = argparse.Namespace(
        to=to, check=check, max_loss_increase=max_loss_increase, dtype=dtype, calibrate=os.fspath(calibrate),
        calibration_tokens=calibration_tokens, calibration_seed=calibration_seed,
        embeddings=embeddings, device=device, overwrite=overwrite, force=force, trust_remote_code=trust_remote_code,
        **{name: None if value is None else os.fspath(value) for name, value in paths.items()},
    )  # fmt: skip
    try:
        return run(arguments)
    except UserError as error:
        raise ValueError(as_arguments(str(error))) from error
    except CheckError as error:
        raise RuntimeError(as_arguments(str(error))) from error
