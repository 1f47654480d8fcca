"""Reads a GGUF file with an adapter, to compare it with the adapter that was exported."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import reading
from .job import Factors

if TYPE_CHECKING:
    from torch import Tensor

    from ...gguf.adapter import Place


def read_adapter(
    trained: Callable[[], Mapping[str, tuple[Tensor, Tensor]]],
    places: Mapping[str, Sequence[Place]],
    scalings: Mapping[str, tuple[float, int]],
    path: pathlib.Path,
) -> dict[str, tuple[Factors, Factors]]:
    """The factors of each layer in the adapter and in the file ``path``, with the rows in the model's order.

    Args:
        trained: reads A [..., R, K] and B [..., N, R] of each layer of the adapter, float32.
        places: where the layers are in the base's GGUF file. The tensors of one layer have different rows of it.
        scalings: the factor of B · A, and the rank, of each layer.
    """
    import gguf
    import torch

    with reading("weights", str(path)):
        reader = gguf.GGUFReader(path)
        alpha = reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
        matrices = {tensor.name: torch.from_numpy(tensor.data.copy()).float() for tensor in reader.tensors}
        found = {}
        for layer, (a, b) in trained().items():
            file_a, file_b = matrices[f"{places[layer][0].tensor}.lora_a"], torch.zeros_like(b)
            for place in places[layer]:
                file_b[..., place.rows, :] = matrices[f"{place.tensor}.lora_b"]
            found[layer] = (a, b, scalings[layer][0]), (file_a, file_b, alpha / file_a.shape[-2])
    return found
