"""4-bit weights of a checkpoint that no 4-bit module can hold: they are decoded, and saved as they were."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import get_module_from_name

from ....checkpoints import MLX, Settings
from ....nn import dense_modules, paths_to
from ..modules import packed_weights
from .headers import Header, Names, map_tensors
from .operations import module_of
from .stored_weights import Matrix


@dataclasses.dataclass
class DecodedWeight:
    """A dense weight of the model that the checkpoint stores in a few bits.

    Attributes:
        matrix: its tensors in the checkpoint.
        settings: of the format.
        stored: these tensors, mapped from their files.
        dtype: of the weight in the model, when it has been read.
    """

    kind: MLX
    matrix: Matrix
    settings: Settings
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
        return self.kind.decode(given, shape, dtype, self.settings, self.matrix.where)

    def write(self, values: Tensor) -> dict[str, Tensor]:
        """The tensors of the checkpoint.

        Raises:
            ValueError: the weight has other values.
        """
        decoded = self.read(self.stored, values.shape, self.dtype)
        if not torch.equal(decoded.to(values.dtype), values.to(decoded.device)):
            raise ValueError(f"expected the values that {self.kind.name} stores, got others")
        return self.stored


def decoded_weights(
    model: nn.Module,
    names: Names,
    found: Mapping[str, Matrix],
    headers: Mapping[str, Header],
    kind: MLX,
    settings: Settings,
) -> dict[str, DecodedWeight]:
    """The weights to decode, by their names in the model: those of other than 4 bits, and those that have to be dense.

    Args:
        found: the weights of the checkpoint, by the names that dense ones would have.
    """
    always = {*dense_modules(model).always}
    chosen: dict[str, tuple[Matrix, Settings]] = {}
    for dense, matrix in found.items():
        (target, pattern), own = names.place(dense), settings.layers.get(module_of(dense), settings)
        if target is None or pattern is not None:
            continue
        module, name = get_module_from_name(model, target)
        is_packed = name in packed_weights(module) and always.isdisjoint(paths_to(module_of(target)))
        if own.bits != 4 or not is_packed:
            chosen[target] = matrix, own
    stored = map_tensors({key: headers[key] for matrix, _ in chosen.values() for key in matrix.tensors.values()})
    if chosen:
        shown = ", ".join(f"{name} ({own.bits} bits)" for name, (_, own) in [*chosen.items()][:3])
        warnings.warn(
            f"{len(chosen)} weights of the {kind.name} checkpoint are decoded and dense, because they have other than "
            f"4 bits, or no 4-bit layer can replace theirs: {shown}{', ...' if len(chosen) > 3 else ''}",
            stacklevel=2,
        )
    return {
        target: DecodedWeight(kind, matrix, own, {key: stored[key] for key in matrix.tensors.values()})
        for target, (matrix, own) in chosen.items()
    }
