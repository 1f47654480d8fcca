"""Writes a LoRA adapter as a GGUF file, which llama.cpp applies to a model in any of its types.

The file has the matrices A and B of each layer under the names of the base's GGUF file; of experts, stacks of them.
llama.cpp adds alpha / rank · B · A to a weight, with one alpha per file and the rank of that layer.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_ext.gguf.file import VERSION_KEY
from qlora_ext.gguf.names import Names
from qlora_ext.version import VERSION


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layer is in the base's GGUF file.

    Attributes:
        tensor: the name of its weight there.
        rows: row i of that weight is row ``rows[i]`` of the model's; of a stack, of each matrix.
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


def stack_places(architecture: str, model: Any, stacks: Mapping[str, tuple[int, ...]]) -> dict[str, list[Place]]:
    """Where stacked weights of experts are in the GGUF file, which has separate stacks for gate and up.

    Args:
        architecture: llama.cpp's name.
        model: the dense model; it may be on the meta device.
        stacks: the shapes [E, N, K] of the weights, by their names in the model.

    Raises:
        ValueError: the matrices of a stack are not in tensors of the file, row by row.
    """
    names = Names(architecture, model)
    found = {}
    for stack, (experts, rows, width) in stacks.items():
        tensors = {
            f"{name.removesuffix('.weight')}.weight" for name, weight in names.of_model.items() if weight == stack
        }
        places, taken = [], 0
        for tensor in sorted(tensors):
            count = rows // len(tensors)
            place = names.places_of(tensor, (experts, count, width)).get(stack)
            if place is None or place.stack != (experts, rows):
                break
            numbers = torch.arange(experts * rows, dtype=torch.int64, device="cpu")[place.numbers].view(experts, -1)
            local = numbers - rows * torch.arange(experts, dtype=torch.int64, device="cpu")[:, None]
            if numbers.shape[1] != count or not torch.equal(local, local[:1].expand_as(local)):
                break
            places.append(Place(tensor, local[0]))
            taken += count
        if taken != rows:
            raise ValueError(
                f"{stack}: expected experts whose rows are in tensors of {architecture} files of llama.cpp"
            )
        found[stack] = places
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
        layers: A [R, K] and B [N, R], or a stack of each, float32 or float16, by the name of the weight in the base's
            file, with B's rows in its order.
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
