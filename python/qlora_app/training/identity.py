"""Digests of a run's inputs: the base, the data, and the encoded rows."""

from __future__ import annotations

import array
import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..data import Example, Row

# Fields of a model's configuration that describe the file or the software, not the model.
_NOT_THE_MODEL = ("transformers_version", "name_or_path", "_name_or_path", "dtype", "quantization_config", "use_cache")


def digest_of_model(model: Any) -> str:
    """SHA-256 over a model's configuration and all its weights, 4-bit and dense, as they are in memory."""
    import torch

    from qlora_ext.digest import update
    from qlora_ext.streaming import state_of

    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in state_of(model):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"\n{name}:".encode())
            update(digest, tensor)
    return digest.hexdigest()


def digest_of_files(*paths: pathlib.Path) -> str:
    """SHA-256 over the content of files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def digest_of_examples(examples: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example).encode() + b"\n")
    return digest.hexdigest()


def digest_of_rows(*parts: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for rows in parts:
        digest.update(f"{len(rows)} rows\n".encode())
        for row in rows:
            for key in row:
                if key not in ("position_ids", "prompt", "columns"):  # packing adds the first; the data have the others
                    digest.update(f"{len(row[key])} ".encode() + array.array("q", row[key]).tobytes())
    return digest.hexdigest()
