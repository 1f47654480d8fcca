"""Writes each weight to a file as soon as it is quantized, so that loading never has the whole model in memory."""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ... import digest
from ...atomic import staged_file
from ...dtype_names import name_of
from ...form import Form
from ...weight import TENSORS, Weight4bit, weight_of
from .config import QLoRAConfig


class Spill:
    """A directory with one safetensors file per quantized weight. Each file is complete or absent.

    Weights from an earlier, interrupted load are reused. The caller must make sure that they belong to the same
    checkpoint and form.

    Args:
        directory: created if it does not exist.

    Attributes:
        found: the number of weights that were reused.
        error: the error with which writing failed, which transformers would hide; else None.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        directory.mkdir(exist_ok=True)
        self.directory, self.found = directory, 0
        self.error: Exception | None = None

    def __deepcopy__(self, memo: Any) -> Spill:
        return self  # transformers copies configurations; the copy must use the same directory

    def _path(self, name: str) -> pathlib.Path:
        return self.directory / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"

    def get(self, name: str) -> Weight4bit | None:
        """The weight ``name``, memory-mapped from its file; None if the file is missing or damaged."""
        try:
            with safe_open(self._path(name), framework="pt") as file:
                fields = json.loads((file.metadata() or {}).get("weight", "{}"))
                tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError):
            return None
        found = fields.pop("sha256", None)
        if fields.get("name") != name or found != _sha256(tensors, fields):
            return None
        del fields["name"]
        self.found += 1
        return _weight(fields, tensors)

    def put(self, name: str, w4: Weight4bit) -> Weight4bit:
        """Writes a weight, and returns it memory-mapped from its file, so that the caller can free the original.

        Raises:
            OSError, SafetensorError: the file cannot be written.
        """
        try:
            return self._put(name, w4)
        except (OSError, SafetensorError) as error:
            self.error = error
            raise

    def _put(self, name: str, w4: Weight4bit) -> Weight4bit:
        path = self._path(name)
        fields = {
            "name": name,
            "shape": list(w4.shape),
            "dtype": name_of(w4.dtype),
            "form": w4.form.keywords,
        }
        tensors = {key: t.contiguous() for key, t in w4.tensors.items()}
        record = json.dumps({**fields, "sha256": _sha256(tensors, fields)})
        with staged_file(path) as partial:
            save_file(tensors, partial, {"weight": record})
        with safe_open(path, framework="pt") as file:
            return _weight(fields, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


def _sha256(tensors: dict[str, Tensor], fields: dict[str, Any]) -> str:
    found = hashlib.sha256()
    digest.update(found, [dict(sorted(tensors.items())), fields])
    return found.hexdigest()


def _weight(fields: dict[str, Any], tensors: dict[str, Tensor]) -> Weight4bit:
    return weight_of(
        Form.of(**fields["form"]),
        **{name: tensors.get(name) for name in TENSORS},
        shape=torch.Size(fields["shape"]),
        dtype=getattr(torch, fields["dtype"]),
    )


def spilling(config: QLoRAConfig, spill: Spill) -> QLoRAConfig:
    """Makes loading with ``config`` on the CPU write the quantized weights to ``spill``. Returns ``config``."""
    config._spill = spill
    return config
