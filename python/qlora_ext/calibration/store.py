"""Stores the finished layers of a calibration in a directory, so that an interrupted calibration can resume."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import digest
from ..atomic import PARTIAL, staged_file
from ..untrusted import FileError, Schema, printable, read_json
from ..weight import Weight4bit
from .init_lora import LowRank

_LORA = ("lora_a", "lora_b")
_RECORD, _TOKENS, _PROGRESS, _DONE = "calibration.json", "tokens.safetensors", "learning.safetensors", ".done"
_COMMANDS_MARKER = "qlora_output.json"  # the command writes it into its directories
_GROUP: Schema = {"key": str, "weights": [[str]]}
_ADVICE = {"weights": "another model", "inputs": "another text"}


@dataclasses.dataclass(frozen=True)
class StoredLayer:
    """A calibrated weight: its tensors, its initial adapter and its report."""

    tensors: dict[str, Tensor]
    initial: LowRank | None
    report: dict[str, Any]

    def in_form_of(self, plain: Weight4bit) -> Weight4bit | None:
        """The weight, on the device of ``plain``; None if ``plain`` has another form."""
        forms = [
            {field: (t.shape, t.dtype) for field, t in tensors.items()} for tensors in (self.tensors, plain.tensors)
        ]
        if forms[0] != forms[1]:
            return None
        moved: dict[str, Any] = {field: t.to(plain.device) for field, t in self.tensors.items()}
        return plain.replace(**moved)


def finished_weights(directory: str | os.PathLike[str]) -> int:
    """The number of finished weights in the calibration in ``directory``."""
    return sum(len(_weights_of(path)) for path in pathlib.Path(directory).glob(f"*{_DONE}"))


def _weights_of(done: pathlib.Path, key: str | None = None) -> list[list[str]]:
    """The weights of a finished group, each with its layer; none if the file is damaged or has another ``key``."""
    try:
        record = read_json(done, _GROUP) if done.is_file() else None
    except FileError:
        return []
    return record["weights"] if record and key in (None, record["key"]) else []


def _sha256(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        digest.update(found, part)
    return found.hexdigest()


class Store:
    """A directory with the tokens of a calibration and one safetensors file per finished weight.

    Every file appears complete or not at all. It records its calibration, layer and text and a digest of its content. A
    damaged file, or one that belongs elsewhere, counts as missing.

    Args:
        key: the settings that identify the calibration: model, text and method.

    Raises:
        FileError: the directory holds something else, or a calibration of another key.
    """

    def __init__(self, directory: str | os.PathLike[str], key: Mapping[str, Any]) -> None:
        self.path = pathlib.Path(directory)
        self.path.mkdir(parents=True, exist_ok=True)
        self._key = _sha256(json.dumps(key, sort_keys=True))
        record = self.path / _RECORD
        if os.path.lexists(record):
            self._check_key(record, json.loads(json.dumps(key)))
            return
        names = sorted(path.name for path in self.path.iterdir())
        foreign = [name for name in names if name != _COMMANDS_MARKER and not name.startswith(PARTIAL)]
        if foreign:
            raise self._error(f"which holds {printable(foreign[0])} and no {_RECORD}", "delete it to start over")
        self._replace(record, json.dumps(key, sort_keys=True).encode())

    def _error(self, got: str, advice: str) -> FileError:
        return FileError(
            f"directory: expected an empty directory, or one with this calibration, got {printable(self.path)}, "
            f"{got}; {advice}"
        )

    def _check_key(self, record: pathlib.Path, key: dict[str, Any]) -> None:
        try:
            found = read_json(record, dict) if record.is_file() else {}
        except FileError:
            found = {}
        if not found:
            raise self._error(f"whose {_RECORD} is damaged", "delete it to start over")
        other = [name for name in sorted({*key, *found}) if key.get(name) != found.get(name)]
        if other:
            advice = ", ".join(_ADVICE.get(name, f"another {name}") for name in other)
            raise self._error(f"with {advice}", "repeat the command that started it, or delete it to start over")

    def _replace(self, path: pathlib.Path, data: bytes) -> None:
        with staged_file(path) as partial:
            partial.write_bytes(data)

    def _file(self, name: str, weight: str) -> pathlib.Path:
        digest = hashlib.sha256(f"{name}/{weight}".encode()).hexdigest()[:16]
        return self.path / f"{digest}.safetensors"

    def _write(self, path: pathlib.Path, tensors: dict[str, Tensor], name: str, report: str) -> None:
        from safetensors.torch import save_file

        tensors = {field: t.contiguous().cpu() for field, t in sorted(tensors.items())}
        metadata = {"name": name, "report": report, "key": self._key}
        metadata["sha256"] = _sha256(tensors, metadata)
        with staged_file(path) as partial:
            save_file(tensors, partial, metadata)

    def _read(self, path: pathlib.Path, name: str) -> tuple[dict[str, Tensor], str] | None:
        """The tensors and the report that were written under ``name``; None if they are missing or damaged."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            return None
        try:
            with safe_open(str(path), framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors: dict[str, Tensor] = {field: opened.get_tensor(field) for field in sorted(opened.keys())}
        except (OSError, SafetensorError):
            return None
        found = metadata.pop("sha256", None)
        expected = {"name": name, "report": metadata.get("report", ""), "key": self._key}
        return (tensors, expected["report"]) if found == _sha256(tensors, expected) else None

    def save(self, name: str, weight: str, w4: Weight4bit, initial: LowRank | None, report: dict[str, Any]) -> None:
        """Stores the weight ``weight`` of the layer ``name``, its initial adapter and its report."""
        lora = {} if initial is None else dict(zip(_LORA, initial, strict=True))
        self._write(self._file(name, weight), w4.tensors | lora, f"{name}/{weight}", json.dumps(report))

    def _load(self, name: str, weight: str) -> StoredLayer | None:
        found = self._read(self._file(name, weight), f"{name}/{weight}")
        if found is None:
            return None
        tensors, report = found
        lora = [tensors.pop(field) for field in _LORA if field in tensors]
        return StoredLayer(tensors, (lora[0], lora[1]) if lora else None, json.loads(report))

    def finish(self, group: str, weights: Sequence[tuple[str, str]]) -> None:
        """Records that the group of layers that begins with ``group`` and has these ``weights`` is finished."""
        record = {"key": self._key, "weights": [list(weight) for weight in weights]}
        self._replace(self._file(group, "").with_suffix(_DONE), json.dumps(record).encode())

    def finished(self, group: str) -> dict[tuple[str, str], StoredLayer] | None:
        """All weights of a finished group; None if it is unfinished or a weight is damaged or missing."""
        stored: dict[tuple[str, str], StoredLayer] = {}
        for name, weight in _weights_of(self._file(group, "").with_suffix(_DONE), self._key):
            found = self._load(name, weight)
            if found is None:
                return None
            stored[name, weight] = found
        return stored or None

    def progress(self, group: str) -> Progress:
        """Where the state of a group is kept whose codes are being learnt."""
        return Progress(self, group)

    def _on(self, tokens: Tensor) -> Tensor:
        """Associates everything stored from now on with this text."""
        self._key = _sha256(self._key, tokens)
        return tokens

    def tokens(self) -> Tensor | None:
        """The text that the model wrote in an earlier run; None if there is none."""
        found = self._read(self.path / _TOKENS, _TOKENS)
        return None if found is None else self._on(found[0]["tokens"])

    def save_tokens(self, tokens: Tensor) -> None:
        tokens = tokens.cpu().to(torch.int64)
        self._write(self.path / _TOKENS, {"tokens": tokens}, _TOKENS, "")
        self._on(tokens)


class Progress:
    """The state of the group of layers whose codes are being learnt. The next group's replaces it."""

    def __init__(self, store: Store, group: str) -> None:
        self._store, self._group = store, group

    def save(self, state: dict[str, Tensor]) -> None:
        self._store._write(self._store.path / _PROGRESS, state, self._group, "")

    def load(self) -> dict[str, Tensor] | None:
        """The state that was saved last; None if it is missing, damaged or another group's."""
        found = self._store._read(self._store.path / _PROGRESS, self._group)
        return None if found is None else found[0]
