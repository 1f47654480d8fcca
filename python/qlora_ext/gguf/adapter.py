"""Writes a LoRA adapter as a GGUF file, which llama.cpp applies to a model in any of its types.

The file has the matrices A and B of each layer under the names of the base's GGUF file. llama.cpp adds
alpha / rank · B · A to a weight, with one alpha per file and the rank of that layer.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .._internal.version import VERSION
from .file import VERSION_KEY
from .names import Names


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layer is in the base's GGUF file.

    Attributes:
        tensor: the name of its weight there.
        rows: row i of that weight is row ``rows[i]`` of the model's.
    """

    tensor: str
    rows: slice | Tensor


def places(architecture: str, model: Any, layers: Iterable[str]) -> dict[str, Place]:
    """Where linear layers of a transformers model are in its GGUF file.

    Args:
        architecture: llama.cpp's name.
        model: the dense model; it may be on the meta device.
        layers: their names in the model.

    Raises:
        ValueError: a layer does not exist, or no tensor of the file has its rows.
    """
    names, state = Names(architecture, model), model.state_dict()
    in_file = collections.defaultdict(list)
    for tensor, weight in names.of_model.items():
        in_file[weight].append(tensor)
    found = {}
    for layer in layers:
        weight = f"{layer}.weight"
        tensors = in_file[weight]
        if weight not in state or state[weight].ndim != 2 or len(tensors) != 1:
            raise ValueError(f"{layer}: expected a linear layer that {architecture} models of llama.cpp have")
        rows = names.places_of(tensors[0], tuple(state[weight].shape))[weight]
        if rows is None or rows.transposed or rows.stack != state[weight].shape[:1]:
            raise ValueError(f"{layer}: expected a layer whose rows are in a tensor of the GGUF file")
        found[layer] = Place(tensors[0], rows.numbers)
    return found


def fold(scalings: Mapping[str, tuple[float, int]]) -> tuple[float, dict[str, float]]:
    """The alpha of the file, and the factor of each B, with which every layer keeps its scaling.

    Args:
        scalings: for each layer, the factor of B · A, and its rank.

    Raises:
        ValueError: all factors are zero.
    """
    alphas = {layer: scaling * rank for layer, (scaling, rank) in scalings.items()}
    nonzero = collections.Counter(alpha for alpha in alphas.values() if alpha)
    if not nonzero:  # llama.cpp takes an alpha of 0 for a scaling of 1
        raise ValueError("expected an adapter with an effect, got one whose scaling is 0 in every layer")
    alpha = nonzero.most_common(1)[0][0]
    return alpha, {layer: value / alpha for layer, value in alphas.items()}


def write_adapter(
    path: str | os.PathLike[str],
    architecture: str,
    alpha: float,
    layers: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Writes the file.

    Args:
        path: of the file.
        architecture: llama.cpp's name of the base's architecture.
        alpha: from ``fold``.
        layers: A [R, K] and B [N, R], float32 or float16, by the name of the weight in the base's file, with B's rows
            in its order.
    """
    import gguf

    writer = gguf.GGUFWriter(os.fspath(path), architecture)
    writer.add_string(VERSION_KEY, VERSION)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, matrices in layers.items():
        for suffix, matrix in zip(("lora_a", "lora_b"), matrices, strict=True):
            writer.add_tensor(f"{name}.{suffix}", matrix.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
