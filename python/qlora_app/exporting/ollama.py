"""The targets ``ollama``: a directory with a GGUF file and the Modelfile that imports it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from qlora_ext.untrusted import printable

from ..errors import UserError
from ..models.adapted import Adapted, find_adapted
from ..outputs.files import write_text
from . import gguf_adapter, gguf_model, modelfile
from .job import Job
from .targets import ExportRequest

if TYPE_CHECKING:
    from qlora_ext.calibration import Calibration

_MODEL, _ADAPTER = "model.gguf", "adapter.gguf"


def prepare(request: ExportRequest) -> Job:
    """The merged model in a type of GGUF; or if that is "adapter", the adapter alone."""
    if request.kind == "adapter":
        return _adapter(request)
    job = gguf_model.prepare(request)
    return _with_modelfile(job, request, find_adapted(request), pathlib.PurePath(_MODEL), None)


def _adapter(request: ExportRequest) -> Job:
    job = gguf_adapter.prepare(request)
    adapted, read = find_adapted(request), job.read_adapter
    source = adapted.source
    if source.gguf_file is None:
        raise UserError(
            f"--to {request.to}: expected an adapter whose base is a GGUF file, which the Modelfile names, got "
            f"{source.name}; use --to ollama"
        )
    base = pathlib.Path(source.path).absolute() / source.gguf_file
    if not str(base).isprintable():
        raise UserError(f"--to {request.to}: a Modelfile cannot name {printable(base)}; rename it")
    assert read is not None
    job = dataclasses.replace(job, read_adapter=lambda path: read(path / _ADAPTER))
    return _with_modelfile(job, request, adapted, base, _ADAPTER)


def _with_modelfile(
    job: Job, request: ExportRequest, adapted: Adapted, base: pathlib.PurePath, adapter: str | None
) -> Job:
    """The job with its file in a directory, next to a Modelfile."""

    def build(calibration: Calibration | None) -> Callable[[pathlib.Path], None]:
        write = job.build(calibration)
        source = adapted.source
        text, notes = modelfile.text(base, adapter, adapted.tokenizer, modelfile.generation_config(source), source.name)

        def write_both(directory: pathlib.Path) -> None:
            write(directory / (adapter or base.name))
            write_text(directory / "Modelfile", text)
            for note in notes:
                print(printable(note))
            print(f"import it with: ollama create NAME -f {printable(pathlib.Path(request.output) / 'Modelfile')}")

        return write_both

    return dataclasses.replace(job, build=build)
