"""What a calibration has done so far, in a directory: one that was killed goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import torch
from torch import Tensor

from ..weight import NF4Weight
from .init_lora import LowRank

_LORA = ("lora_a", "lora_b")


class Store:
    """A directory with the tokens of a calibration and one safetensors file a finished layer.

    Every file is written under another name first, and is there whole or not at all. ``key`` says what was calibrated
    on what, and how: files of another key are refused, never mixed in.

    Raises:
        ValueError: the directory holds a calibration of another key.
    """

    def __init__(self, directory: str | os.PathLike[str], key: dict[str, Any]) -> None:
        self.path = pathlib.Path(directory)
        self.path.mkdir(parents=True, exist_ok=True)
        self._key = json.dumps(key, sort_keys=True)
        record = self.path / "calibration.json"
        if not record.exists():
            self._replace(record, self._key.encode())
        elif record.read_text() != self._key:
            raise ValueError(
                f"directory: expected an empty one, or one of this very calibration, got {self.path}, "
                f"which holds another: {record.read_text()}"
            )

    def _replace(self, path: pathlib.Path, data: bytes) -> None:
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    def _file(self, name: str, weight: str) -> pathlib.Path:
        digest = hashlib.sha256(f"{name}/{weight}".encode()).hexdigest()[:16]
        return self.path / f"{digest}.safetensors"

    def save(self, name: str, weight: str, w4: NF4Weight, initial: LowRank | None, report: dict[str, Any]) -> None:
        """Keeps the weight ``weight`` of the layer ``name``, its initial adapter, and what is to be told of it."""
        from safetensors.torch import save

        lora = {} if initial is None else dict(zip(_LORA, initial, strict=True))
        tensors = {field: t.contiguous().cpu() for field, t in (w4.tensors | lora).items()}
        metadata = {"name": f"{name}/{weight}", "report": json.dumps(report)}
        self._replace(self._file(name, weight), save(tensors, metadata))

    def finish(self, group: str) -> None:
        """Notes that the group of layers which begins with ``group`` is done."""
        self._replace(self._file(group, "").with_suffix(".done"), group.encode())

    def is_finished(self, group: str) -> bool:
        return self._file(group, "").with_suffix(".done").exists()

    def load(self, name: str, weight: str, plain: NF4Weight) -> tuple[NF4Weight, LowRank | None, dict[str, Any]]:
        """What ``save`` kept, in the form and on the device of ``plain``.

        Raises:
            ValueError: it has another form.
        """
        from safetensors import safe_open

        file = self._file(name, weight)
        with safe_open(str(file), framework="pt") as opened:
            metadata = opened.metadata()
            parts: dict[str, Any] = {field: opened.get_tensor(field) for field in opened.keys()}  # noqa: SIM118
        lora = [parts.pop(field).to(plain.device) for field in _LORA if field in parts]
        forms = [{field: (t.shape, t.dtype) for field, t in tensors.items()} for tensors in (parts, plain.tensors)]
        if forms[0] != forms[1]:
            raise ValueError(f"{file}: expected {name}/{weight} in the form of this model, got another")
        moved: dict[str, Any] = {field: t.to(plain.device) for field, t in parts.items()}
        w4 = dataclasses.replace(plain, **moved)
        return w4, (lora[0], lora[1]) if lora else None, json.loads(metadata["report"])

    def tokens(self) -> Tensor | None:
        """The text that the model wrote, where it did so before."""
        from safetensors.torch import load_file

        file = self.path / "tokens.safetensors"
        return load_file(str(file))["tokens"] if file.exists() else None

    def save_tokens(self, tokens: Tensor) -> None:
        from safetensors.torch import save

        self._replace(self.path / "tokens.safetensors", save({"tokens": tokens.cpu().to(torch.int64)}))
