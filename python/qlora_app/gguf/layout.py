"""Where the weights of a transformers model go in a GGUF file: the inverse of how a file is read (``names.py``)."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_ext.gguf.names import Names
from qlora_ext.gguf.rows import Rows
from qlora_ext.weight import Weight4bit


@dataclasses.dataclass(frozen=True)
class _Elements:
    """Element i of a small tensor of the file is element ``where[i]`` of the model's weight, plus ``shift``."""

    where: Tensor
    shift: int


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor of the file.

    Attributes:
        name, shape: in the file.
        weight: the model's weight that it comes from.
        place: how its values are found there.
    """

    name: str
    shape: tuple[int, ...]
    weight: str
    place: Rows | _Elements

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix, or a stack of matrices, whose rows are rows of the weight."""
        return isinstance(self.place, Rows)

    def values(self, weight: Tensor) -> Tensor:
        """Its values, from those of the weight."""
        if isinstance(self.place, _Elements):
            return (weight + self.place.shift).reshape(-1)[self.place.where].reshape(self.shape)
        weight = weight.transpose(-1, -2) if self.place.transposed else weight
        return weight.reshape(-1, self.shape[-1])[self.place.numbers].reshape(self.shape)

    def rows_of_each_matrix(self) -> Tensor | None:
        """The rows of a weight's matrix that this tensor has; None if it has others of the next matrix, or no rows."""
        if not isinstance(self.place, Rows):
            return None
        *stack, rows = self.place.stack
        matrices = math.prod(stack)
        numbers = torch.arange(matrices * rows, dtype=torch.int64, device="cpu")[self.place.numbers].view(matrices, -1)
        local = numbers - rows * torch.arange(matrices, dtype=torch.int64, device="cpu")[:, None]
        return local[0] if torch.equal(local, local[:1].expand_as(local)) else None

    def packed_rows(self, w4: Weight4bit) -> Weight4bit:
        """The packed weight with the rows of this tensor, as a stack [matrices, rows, columns].

        Args:
            w4: the weight, or the stack of weights, that the model has. Every row has scales of its own.
        """
        assert isinstance(self.place, Rows)
        *stack, width = w4.shape
        count = math.prod(stack)
        rows = torch.arange(count, dtype=torch.int64, device="cpu")[self.place.numbers]
        parts: dict[str, Any] = {
            name: tensor.reshape(count, -1)[rows].reshape(math.prod(self.shape[:-2]), -1)
            for name, tensor in w4.tensors.items()
            if name != "scale_table"
        }
        matrices = len(parts["packed"])
        parts["packed"] = parts["packed"].reshape(matrices, self.shape[-2], -1)
        if w4.scale_table is not None:  # the same for all
            parts["scale_table"] = w4.scale_table.reshape(-1, 256)[:1].expand(matrices, 256)
        return w4.replace(**parts, shape=torch.Size((matrices, self.shape[-2], width)))


def _in_decoder(name: str) -> str:
    """The name of a weight in a model that has the language model alone."""
    return name.replace(".language_model.", ".")


class _Decoder:
    """The language model of a model, which may have a part for images too, as ``Names`` sees it."""

    def __init__(self, model: Any) -> None:
        self.config = model.config.get_text_config()
        self._state = {_in_decoder(name): tensor for name, tensor in model.state_dict().items()}

    def state_dict(self) -> dict[str, Tensor]:
        return self._state


def file_tensors(architecture: str, model: Any, weights: Iterable[str]) -> list[FileTensor]:
    """The tensors of the file that hold ``weights``.

    Args:
        architecture: llama.cpp's name.
        model: a dense transformers model; it may be on the meta device.
        weights: names in its ``state_dict``.

    Raises:
        ValueError: models of that architecture have no such weight in llama.cpp.
    """
    decoder = _Decoder(model)
    names, state = Names(architecture, decoder), decoder.state_dict()
    in_file: dict[str, dict[str, None]] = collections.defaultdict(dict)
    for name, weight in names.of_model.items():
        in_file[weight][name if name.endswith((".weight", ".bias")) else f"{name}.weight"] = None
    found = []
    for full_name in weights:
        weight = _in_decoder(full_name)
        shape, parts = tuple(state[weight].shape) if weight in state else (), in_file[weight]
        tensors = [
            _matrix(names, name, weight, shape, len(parts)) or _small(names, name, weight, shape, len(parts))
            for name in parts
        ]
        if not tensors or None in tensors:
            raise ValueError(f"{full_name}: expected a weight that {architecture} models of llama.cpp have")
        found += [dataclasses.replace(tensor, weight=full_name) for tensor in tensors if tensor is not None]
    return found


def _matrix(names: Names, name: str, weight: str, shape: tuple[int, ...], parts: int) -> FileTensor | None:
    """The tensor ``name`` as one of ``parts`` matrices into which a weight is split; None if it is not one."""
    if len(shape) < 2 or not name.endswith(".weight"):
        return None
    for transposed in (False, True):
        *stack, rows, columns = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
        expected = (*stack, rows // parts, columns)
        place = names.places_of(name, expected).get(weight)
        if place is not None and (place.transposed, place.stack) == (transposed, (*stack, rows)):
            return FileTensor(name, expected, weight, place)
    return None


def _small(names: Names, name: str, weight: str, shape: tuple[int, ...], parts: int) -> FileTensor | None:
    """The tensor ``name`` as one of ``parts`` tensors whose elements are anywhere in a weight."""
    expected = (*shape[:-1], shape[-1] // parts)
    count = int(np.prod(expected))
    numbers = np.arange(1, count + 1, dtype=np.int64).reshape(expected)
    numbered = names.process(name, numbers, {}).get(weight)
    zero = names.process(name, np.zeros_like(numbers), {}).get(weight)
    if numbered is None or zero is None or zero.shape != shape or len(zero.unique()) != 1:
        return None
    placed = (numbered - zero).reshape(-1)
    there = placed.nonzero().squeeze(1)
    where = torch.zeros(count, dtype=torch.int64, device="cpu")
    where[placed[there] - 1] = there
    if len(there) != count or not torch.equal(placed[where], torch.from_numpy(numbers.reshape(-1))):
        return None
    return FileTensor(name, expected, weight, _Elements(where, -int(zero.reshape(-1)[0])))
