"""Converts a model on disk to a 4-bit directory, without loading all of it at once. Interrupted conversions resume."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qlora_ext.untrusted import printable, read_json

from ..errors import UserError, writing
from ..outputs.directory import Output, claim
from ..outputs.files import contents, write_json
from ..outputs.waiting import waiting
from . import validate_model
from .devices import name_of
from .pretrained import has_4bit_blocks, is_4bit, load_config, load_tokenizer, restore_use_cache
from .sources import ModelSource

if TYPE_CHECKING:
    from qlora_ext.integrations.transformers.spill import Spill

    from .loading import Loader

# Each shard is in memory before it is written.
SHARD_SIZE = "500MB"
_ORIGIN = "quantized_from.json"


def _origin_of(loader: Loader) -> dict[str, Any]:
    """The record that identifies a 4-bit directory made by ``loader``: the model, its files, and the form."""
    from qlora_ext.version import VERSION

    source, form = loader.source, loader.form
    files = validate_model.weight_files(source.directory) if source.directory is not None else []
    found = source.on_disk
    files = files or ([pathlib.Path(found)] if found is not None and source.gguf_file else [])
    return {
        "model": source.name,
        "files": [[file.name, (status := file.stat()).st_size, status.st_mtime_ns] for file in files],
        "dtype": name_of(loader.dtype),
        "block_size": form.block_size,
        "double_quant": form.double_quant,
        "embeddings": loader.embeddings,
        "rest": loader.rest,
        "read_in": [loader.requantize, loader.served],
        "version": VERSION,
    }


@contextlib.contextmanager
def spilled(loader: Loader, output: Output) -> Iterator[Spill | None]:
    """The directory next to ``output`` that retains quantized weights until ``output`` is complete; see ``waiting``.

    The weights are deleted if the model is rejected, and retained if the command is interrupted or cannot write the
    output. None if ``output`` is a mount point, which can have no sibling.

    Raises:
        UserError: the disk is full. The quantized weights are retained, and the next command resumes with them.
    """
    with waiting(output, "weights", _origin_of(loader)) as found:
        if found is None:
            yield None
            return
        from qlora_ext.integrations.transformers.spill import Spill

        spill = Spill(found.directory)
        count = len(list(found.directory.glob("*.safetensors")))
        if count:
            print(f"resuming: an interrupted command has already quantized {count} weights", flush=True)
        try:
            yield spill
        except Exception as error:
            if spill.error is not None:
                _explain(spill.error, found.directory, error)
            found.useless = isinstance(error, UserError) and not output.begun
            raise


def _explain(error: Exception, directory: pathlib.Path, cause: Exception) -> None:
    try:
        with writing(directory):
            raise error
    except UserError as full:
        free = shutil.disk_usage(directory).free
        raise UserError(f"{str(full).partition(';')[0]} ({free / 1e6:.1f} MB free)") from cause


def _read_origin(directory: pathlib.Path) -> dict[str, Any] | None:
    """The record of how ``directory`` was made; None if it is missing or damaged."""
    try:
        found: dict[str, Any] | None = read_json(directory / _ORIGIN, dict) if (directory / _ORIGIN).is_file() else None
    except UserError:
        return None
    return found


def is_quantized(config: Any) -> bool:
    """Whether the weights of a model with that configuration are 4-bit in our format."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return False
    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    return bool(fields.get("quant_method") == "qlora_ext")


def _check_base(output: Output, found: dict[str, Any] | None) -> None:
    """Rejects a non-empty directory for a run's 4-bit base, unless ``--overwrite`` replaces an earlier run's base."""
    advice = "move it elsewhere, or name another --output"
    if output.path.is_dir() and contents(output.path):
        if found is None:
            raise UserError(
                f"{output.path} exists and is not empty, and is not the 4-bit base of a streamed run (it has no "
                f"{_ORIGIN}); {advice}"
            )
        if not output.overwrite:
            raise UserError(
                f"{output.path} is the 4-bit base of a run with another model, dtype, block size or version; {advice}, "
                "or delete it (or add --overwrite to a new run), because the run creates its own"
            )
    output.check()


def four_bit_directory(loader: Loader, run: Output) -> ModelSource:
    """The 4-bit model of ``loader`` in the directory OUTPUT-base of a run, which is created if necessary.

    With ``--overwrite``, it replaces the base of an earlier run.

    Raises:
        UserError: the directory contains something else, or the model cannot be loaded or written.
    """
    import torch

    from qlora_ext.integrations.transformers import save_in_our_format

    origin, source = json.loads(json.dumps(_origin_of(loader))), loader.source
    on_cpu = dataclasses.replace(loader, device=torch.device("cpu"), compute=None, activations=None)
    directory = run.path.with_name(f"{run.path.name}-base")
    with claim(str(directory), run.overwrite, run.inputs) as output:
        if (found := _read_origin(output.path)) != origin:
            output.protect("--model", source.name, source.on_disk)
            _check_base(output, found)
            verb = "converting" if is_4bit(source) or has_4bit_blocks(source) else "quantizing"
            print(f"{verb} {printable(source.name)} to {printable(output.path)}, from where it is streamed")
            tokenizer = load_tokenizer(source)
            with spilled(loader, output) as spill:
                model = on_cpu.while_loading(spill=spill)
                save_in_our_format(model)
                restore_use_cache(model, source)
                with output.written("quantize") as partial:
                    model.save_pretrained(partial, max_shard_size=SHARD_SIZE)
                    tokenizer.save_pretrained(partial)
                    write_json(partial / _ORIGIN, origin)
                del model  # mapped from files that are deleted next
    return ModelSource(source.name, os.fspath(output.path), None, source.trust_remote_code)


def load_streamed(loader: Loader, stream: str, resident: str | None, run: Output) -> Any:
    """The model of ``loader``, streamed from "ram" or "disk", or resident ("none").

    Args:
        resident: as in ``QLoRAConfig``; without effect on a resident model.
        run: as in ``four_bit_directory``, from where a model that is not in our format is streamed from disk.

    Raises:
        UserError: as in ``four_bit_directory``, and of ``Loader``.
    """
    if stream == "none":
        return loader.while_loading()
    if stream != "disk" or is_quantized(load_config(loader.source)):
        return loader.while_loading(stream, resident)
    converted = dataclasses.replace(loader, source=four_bit_directory(loader, run), served=None, requantize=False)
    model = converted.while_loading(stream, resident)
    # An adapter records how its base is made from the original model.
    config = model.config.quantization_config
    config.served, config.requantize = loader.served, loader.requantize
    return model
