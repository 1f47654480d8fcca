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

from torch import Tensor

from qlora_ext.gguf.file import VERSION_KEY
from qlora_ext.version import VERSION

from .layout import file_tensors


@dataclasses.dataclass(frozen=True)
class Place:
    """Rows of a layer, or of each matrix of a stack, in the base's GGUF file.

    Attributes:
        tensor: the name of their weight there.
        rows: row i of that weight is row ``rows[i]`` of the model's; of a stack, of each matrix.
    """

    tensor: str
    rows: Tensor


def places(architecture: str, model: Any, weights: Iterable[str]) -> dict[str, list[Place]]:
    """Where linear layers and stacks of experts of a transformers model are in its GGUF file.

    Args:
        architecture: llama.cpp's name.
        model: the dense model; it may be on the meta device.
        weights: their names in the model.

    Raises:
        ValueError: no tensors of the file have the rows of a weight.
    """
    found = collections.defaultdict(list)
    for tensor in file_tensors(architecture, model, weights):
        rows = tensor.rows_of_each_matrix()
        if rows is None:
            raise ValueError(
                f"{tensor.weight}: expected a weight whose rows are in tensors of {architecture} files of llama.cpp"
            )
        found[tensor.weight].append(Place(tensor.name, rows))
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
