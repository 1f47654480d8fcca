"""``export``: writes a trained model for another program. The command and the Python function share it."""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
from typing import Any

from ..._internal.untrusted import printable
from ...gguf.file import VERSION_KEY
from ..errors import UserError, as_arguments
from ..models.adapter_files import base_of, find
from ..models.sources import resolve
from ..outputs.directory import Output, claim
from ..outputs.files import need_space
from ..outputs.output_file import claim_file
from .targets import EMBEDDINGS, TARGETS, Target


def _protect_inputs(arguments: argparse.Namespace, output: Output) -> None:
    trusted = arguments.trust_remote_code
    if arguments.adapter is None:
        output.protect("--model", arguments.model, resolve(arguments.model, trusted).on_disk)
        return
    adapter = find(arguments.adapter)
    output.protect("--adapter", arguments.adapter, str(adapter))
    output.protect("--model", arguments.model, base_of(adapter, arguments.model, trusted).on_disk)


def _claim(arguments: argparse.Namespace, target: Target) -> contextlib.AbstractContextManager[Output]:
    if target.suffix is None:
        return claim(arguments.output, arguments.overwrite)
    return claim_file(arguments.output, arguments.overwrite, target.suffix, VERSION_KEY)


def run(arguments: argparse.Namespace) -> pathlib.Path:
    """Runs the command, and returns the path of the result.

    A target first prepares: it rejects what it cannot hold, and estimates its size. Nothing is written until then.
    """
    if arguments.adapter is None and arguments.model is None:
        raise UserError("export: expected an adapter (--adapter) or a model (--model), got neither")
    if arguments.embeddings is not None and not arguments.to.startswith(("gguf:", "ollama")):
        raise UserError(f"--embeddings: expected a target that is a whole model as GGUF, got --to {arguments.to}")
    target = TARGETS[arguments.to]
    with _claim(arguments, target) as output:
        _protect_inputs(arguments, output)
        output.check()
        job = target.prepare(arguments)
        print(f"{output.path} needs about {job.nbytes / 1e6:.1f} MB of disk space", flush=True)
        need_space(output.path.parent, job.nbytes, output.path.name)
        write = job.build()
        with output.written("export") as partial:
            write(partial)
        size = sum(path.stat().st_size for path in (output.path, *output.path.rglob("*")) if path.is_file())
        print(f"{printable(output.path)}: {size / 1e6:.1f} MB in {arguments.to}")
        return output.path


def export(
    *,
    to: str,
    output: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | None = None,
    dtype: str = "bfloat16",
    embeddings: str | None = None,
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
            ``gguf:q8_0``, ``gguf:q4_0``, ``gguf:q4_1``, ``gguf:iq4_nl`` or ``gguf:mxfp4``.
        output: the directory, or the .gguf file, that is written. It appears complete or not at all.
        adapter: the adapter, or the run that made it.
        model: the base of the adapter (default: the one that it names), or without an adapter, the model to export.
        dtype: of the weights that are not 4-bit.
        embeddings: the type of embeddings and output head in the targets ``gguf:...``: ``f32``, ``f16``, ``bf16``,
            ``q8_0`` or one of 4 bits. The default is ``q8_0`` for targets of 4 bits and the target's type for others;
            those of a GGUF file with an adapter stay as they are.
        device: where the model is merged.
        overwrite: replace what an earlier export wrote to ``output``. Other files are never deleted.
        force: accept an adapter that was trained on another 4-bit base.
        trust_remote_code: run Python code that comes with ``model``.

    Returns:
        The path of the result.

    Raises:
        ValueError: the target cannot hold the model or the adapter, an argument is invalid, a file is missing or
            damaged, or the disk is too full. The message names the argument, and a target that works.
        ImportError: a required library is missing.

    Example:
        >>> def serve(run):
        ...     return qlora_ext.export(adapter=run, to="dense", output="merged")
        >>> qlora_ext.export(to="dense", output="merged")
        Traceback (most recent call last):
        ValueError: export: expected an adapter (adapter) or a model (model), got neither
    """
    if to not in TARGETS:
        raise ValueError(f"to: expected one of {', '.join(TARGETS)}, got {to!r}")
    if embeddings is not None and embeddings not in EMBEDDINGS:
        raise ValueError(f"embeddings: expected one of {', '.join(EMBEDDINGS)}, got {embeddings!r}")
    paths: dict[str, Any] = {"output": output, "adapter": adapter, "model": model}
    arguments = argparse.Namespace(
        to=to, dtype=dtype, embeddings=embeddings, device=device, overwrite=overwrite, force=force,
        trust_remote_code=trust_remote_code,
        **{name: None if value is None else os.fspath(value) for name, value in paths.items()},
    )  # fmt: skip
    try:
        return run(arguments)
    except UserError as error:
        raise ValueError(as_arguments(str(error))) from error
