"""Reads a GGUF file with an adapter, to compare it with the adapter that was exported."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import reading
from .job import Factors

if TYPE_CHECKING:
    from ...gguf.adapter import Place


def read_adapter(
    adapter: pathlib.Path, places: Mapping[str, Place], scalings: Mapping[str, tuple[float, int]], path: pathlib.Path
) -> dict[str, tuple[Factors, Factors]]:
    """The factors of each layer in ``adapter`` and in the file ``path``, float32, with the rows in the model's order.

    Args:
        places: where the layers are in the base's GGUF file.
        scalings: the factor of B · A, and the rank, of each layer.
    """
    import gguf
    import torch
    from safetensors.torch import load_file

    with reading("weights", str(adapter)):
        weights = load_file(adapter / "adapter_model.safetensors")
    with reading("weights", str(path)):
        reader = gguf.GGUFReader(path)
        alpha = reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
        matrices = {tensor.name: torch.from_numpy(tensor.data.copy()).float() for tensor in reader.tensors}
        found = {}
        for layer, place in places.items():
            a, b = (weights[f"base_model.model.{layer}.lora_{side}.weight"].float() for side in "AB")
            file_a, rows = (matrices[f"{place.tensor}.lora_{side}"] for side in "ab")
            file_b = torch.empty_like(rows)
            file_b[place.rows] = rows
            found[layer] = (a, b, scalings[layer][0]), (file_a, file_b, alpha / len(file_a))
    return found
