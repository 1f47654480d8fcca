"""A model on disk becomes a 4-bit directory without ever being whole in memory, and goes on after a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..._internal.untrusted import printable, read_json
from ..errors import UserError, writing
from ..outputs.directory import Output, claim
from ..outputs.files import contents, write_json
from ..outputs.waiting import waiting
from . import validate_model
from .devices import name_of
from .loading import load_quantized, load_tokenizer, restore_use_cache
from .sources import ModelSource

if TYPE_CHECKING:
    import torch

    from ...integrations.transformers.spill import Spill

# A shard is put together in memory before it is written.
SHARD_SIZE = "500MB"
_ORIGIN = "quantized_from.json"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a 4-bit directory is made of, and how."""

    source: ModelSource
    dtype: torch.dtype
    block_size: int = 64
    double_quant: bool = True
    embeddings: bool = False

    def origin(self) -> dict[str, Any]:
        """By what the same recipe over the same files is known again."""
        from ... import __version__

        files = validate_model.weight_files(self.source.directory) if self.source.directory is not None else []
        found = self.source.on_disk
        files = files or ([pathlib.Path(found)] if found is not None and self.source.gguf_file else [])
        return {
            "model": self.source.name,
            "files": [[file.name, (status := file.stat()).st_size, status.st_mtime_ns] for file in files],
            "dtype": name_of(self.dtype),
            "block_size": self.block_size,
            "double_quant": self.double_quant,
            "embeddings": self.embeddings,
            "version": __version__,
        }


@contextlib.contextmanager
def spilled(recipe: Recipe, output: Output) -> Iterator[Spill | None]:
    """The directory beside ``output`` that retains quantized weights until ``output`` is complete; see ``waiting``.

    They are deleted if the model is rejected, and retained if the command is interrupted or cannot write the output.

    None where they have no place: nothing can be put beside a mount point.

    Raises:
        UserError: the disk is full; what was quantized is kept, and the next run goes on there.
    """
    with waiting(output, "weights", recipe.origin()) as found:
        if found is None:
            yield None
            return
        from ...integrations.transformers.spill import Spill

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
    except UserError as told:
        free = shutil.disk_usage(directory).free
        raise UserError(f"{str(told).partition(';')[0]} ({free / 1e6:.1f} MB free)") from cause


def _read_origin(directory: pathlib.Path) -> dict[str, Any] | None:
    """How ``directory`` was made, as far as it says so."""
    try:
        found: dict[str, Any] | None = read_json(directory / _ORIGIN, dict) if (directory / _ORIGIN).is_file() else None
    except UserError:
        return None
    return found


def is_quantized(config: Any) -> bool:
    """Whether the weights of a model with that configuration are 4-bit in the form of ``qlora_ext``."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return False
    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    return bool(fields.get("quant_method") == "qlora_ext")


def _check_base(output: Output, found: dict[str, Any] | None) -> None:
    """Rejects a non-empty place for a run's 4-bit base, unless ``--overwrite`` replaces the base of an earlier run."""
    advice = "move it elsewhere, or name another --output"
    if output.path.is_dir() and contents(output.path):
        if found is None:
            raise UserError(
                f"{output.path} exists and is not empty, and is not the 4-bit base of a streamed run (it has no "
                f"{_ORIGIN}); {advice}"
            )
        if not output.overwrite:
            raise UserError(
                f"{output.path} is the 4-bit base of a run of another model, dtype, block size or version; {advice}, "
                "or delete it (a new run may also have --overwrite): the run makes its own"
            )
    output.check()


def four_bit_directory(recipe: Recipe, run: Output) -> ModelSource:
    """The model of ``recipe`` in 4 bits at OUTPUT-base of a run, made there unless it is there already.

    With ``--overwrite`` it replaces the base that a run like this one left there.

    Raises:
        UserError: there is something else; or the model cannot be loaded, or not be written.
    """
    origin = json.loads(json.dumps(recipe.origin()))
    directory = run.path.with_name(f"{run.path.name}-base")
    with claim(str(directory), run.overwrite, run.inputs) as output:
        if (found := _read_origin(output.path)) != origin:
            output.protect("--model", recipe.source.name, recipe.source.on_disk)
            _check_base(output, found)
            print(f"quantizing {printable(recipe.source.name)} to {printable(output.path)}, to be streamed from there")
            tokenizer = load_tokenizer(recipe.source)
            with spilled(recipe, output) as spill:
                model = load_on_cpu(recipe, spill)
                restore_use_cache(model, recipe.source)
                with output.written("quantize") as partial:
                    model.save_pretrained(partial, max_shard_size=SHARD_SIZE)
                    tokenizer.save_pretrained(partial)
                    write_json(partial / _ORIGIN, origin)
                del model  # which is mapped from the files that go now
    return ModelSource(recipe.source.name, os.fspath(output.path), None, recipe.source.trust_remote_code)


def load_on_cpu(recipe: Recipe, spill: Spill | None) -> Any:
    """The model in 4 bits, its weights in the files of ``spill``, with a bar of progress."""
    import torch

    return load_quantized(
        recipe.source,
        recipe.dtype,
        torch.device("cpu"),
        recipe.block_size,
        recipe.double_quant,
        spill=spill,
    )
