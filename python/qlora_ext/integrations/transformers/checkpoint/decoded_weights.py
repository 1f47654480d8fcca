"""Packed weights of a checkpoint that no packed module can hold: they are decoded, and saved as they were."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import get_module_from_name

from ....checkpoints import MLX
from ....checkpoints.mlx import PACKED_BITS
from ....nn import dense_modules, paths_to
from ..modules import packed_weights
from .headers import Header, Names, map_tensors
from .operations import module_of
from .stored_weights import Matrix


@dataclasses.dataclass
class DecodedWeight:
    """A dense weight of the model that the checkpoint stores packed.

    Attributes:
        matrix: its tensors in the checkpoint.
        stored: these tensors, mapped from their files.
        dtype: of the weight in the model, when it has been read.
    """

    matrix: Matrix
    stored: dict[str, Tensor]
    dtype: torch.dtype = torch.float32

    @property
    def names(self) -> list[str]:
        return self.matrix.names

    def read(self, by_key: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The decoded weight.

        Raises:
            ValueError: a tensor is invalid.
        """
        self.dtype = dtype
        given = {name: by_key[key] for name, key in self.matrix.tensors.items()}
        kind, settings, where = self.matrix.format, self.matrix.settings, self.matrix.where
        if isinstance(kind, MLX):
            return kind.decode(given, shape, dtype, settings, where)
        return kind.read(given, shape, dtype, settings, where).dequantize(dtype)

    def write(self, values: Tensor) -> dict[str, Tensor]:
        """The tensors of the checkpoint.

        Raises:
            ValueError: the weight has other values.
        """
        decoded = self.read(self.stored, values.shape, self.dtype)
        if not torch.equal(decoded.to(values.dtype), values.to(decoded.device)):
            raise ValueError(f"expected the values that {self.matrix.format.name} stores, got others")
        return self.stored


def decoded_weights(
    model: nn.Module, names: Names, found: Mapping[str, Matrix], headers: Mapping[str, Header]
) -> dict[str, DecodedWeight]:
    """The weights to decode, by their names in the model: those of 2 or 3 bits, or that no packed module can hold.

    Args:
        found: the weights of the checkpoint, by the names that dense ones would have.
    """
    always = {*dense_modules(model).always}
    chosen: dict[str, Matrix] = {}
    for dense, matrix in found.items():
        target, pattern = names.place(dense)
        if target is None or pattern is not None:
            continue
        module, name = get_module_from_name(model, target)
        is_packed = name in packed_weights(module) and always.isdisjoint(paths_to(module_of(target)))
        if matrix.settings.bits not in PACKED_BITS or not is_packed:
            chosen[target] = matrix
    stored = map_tensors({key: headers[key] for matrix in chosen.values() for key in matrix.tensors.values()})
    if chosen:
        kinds = " and ".join(dict.fromkeys(matrix.format.name for matrix in chosen.values()))
        shown = ", ".join(f"{name} ({matrix.settings.bits} bits)" for name, matrix in [*chosen.items()][:3])
        warnings.warn(
            f"{len(chosen)} weights of the {kinds} checkpoint are decoded and dense, because they have 2 or 3 bits, "
            f"or no packed layer can replace theirs: {shown}{', ...' if len(chosen) > 3 else ''}",
            stacklevel=2,
        )
    return {
        target: DecodedWeight(matrix, {key: stored[key] for key in matrix.tensors.values()})
        for target, matrix in chosen.items()
    }
