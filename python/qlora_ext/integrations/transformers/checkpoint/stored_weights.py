"""The packed weights of a model, and the matrices of the checkpoint that they consist of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor
from transformers import core_model_loading

from ....checkpoints import Format, Settings


def in_order_of_reading(names: Iterable[str]) -> list[str]:
    """The names of tensors of a weight, in the order in which transformers reads them."""
    return sorted(names, key=core_model_loading.dot_natural_key)


@dataclasses.dataclass
class Matrix:
    """A matrix that the checkpoint stores, or a stack of matrices that it stores as one.

    Attributes:
        where: the file and the name of the dense weight in it, for messages.
        format: of its tensors.
        settings: of the format, with what the headers of the file say.
        tensors: the names of its tensors in the checkpoint, by their names in the format.
        retained: the tensors that are saved as they were read.
    """

    where: str
    format: Format
    settings: Settings
    tensors: dict[str, str]
    retained: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of all tensors in the checkpoint, in the order in which transformers reads them."""
        return in_order_of_reading(self.tensors.values())


@dataclasses.dataclass
class StoredWeight:
    """A packed weight of the model.

    Attributes:
        shape: as in ``Packed4bit.packed_shapes``.
        matrices: of the checkpoint: for each expert, those whose rows the model joins. If the checkpoint does not store
            the experts one by one, there is one entry.
        is_split: whether the checkpoint stores the experts one by one.
        alternates: whether the model alternates between the rows of an expert's two matrices.
        block_size: elements per scale in the model.
    """

    shape: tuple[int, ...]
    matrices: list[list[Matrix]]
    is_split: bool
    alternates: bool = False
    block_size: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of one of ``matrices``."""
        *stack, rows, columns = self.shape
        return (*([] if self.is_split else stack), rows // len(self.matrices[0]), columns)

    @property
    def where(self) -> str:
        return self.matrices[0][0].where

    @property
    def format(self) -> Format:
        return self.matrices[0][0].format

    @property
    def settings(self) -> Settings:
        return self.matrices[0][0].settings

    @property
    def names(self) -> list[str]:
        """The names of all tensors in the checkpoint, in the order in which transformers reads them."""
        return in_order_of_reading(name for parts in self.matrices for matrix in parts for name in matrix.names)


def experts_of(
    weight: StoredWeight, by_key: Mapping[str, Tensor]
) -> Iterator[tuple[list[Matrix], Mapping[str, Tensor], tuple[int, ...]]]:
    """For each expert, or for a matrix: the matrices of the checkpoint, their tensors, and the shape of one of them.

    Of a stack that the checkpoint stores as one, the tensors are slices, so that it is read expert by expert. A stack
    that is damaged is left to ``Format.read``, which rejects it.
    """
    is_stack = len(weight.stored_shape) == 3 and all(t.shape[:1] == weight.shape[:1] for t in by_key.values())
    for e in range(weight.shape[0] if is_stack else 0):
        yield weight.matrices[0], {key: t[e] for key, t in by_key.items()}, weight.stored_shape[1:]
    for parts in () if is_stack else weight.matrices:
        yield parts, by_key, weight.stored_shape
