"""The unit of streaming: a block of modules whose packed weights lie in one contiguous buffer."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from .._internal.shared_buffers import PackedTensors
from ..calibration.stages import stacks_of
from ..nn import Embedding4bit, Experts4bit, Packed4bit, TiedLinear4bit, layers_of, scale_names

_ALIGNMENT = 256  # bytes, of each tensor in a block: the alignment of cudaMalloc, and more than any kernel needs


@dataclasses.dataclass(frozen=True)
class Part:
    """One packed tensor of a block, at byte ``offset`` of the block.

    Attributes:
        weight: the parameter of ``module`` that has it.
        tensor: its attribute of the weight.
        name: its name in the module's state.
    """

    module: Packed4bit
    weight: str
    tensor: str
    name: str
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def host_tensor(self) -> Tensor:
        """The module's own tensor, on the host."""
        tensor: Tensor = getattr(self.module._parameters[self.weight], self.tensor)
        return tensor

    @property
    def state(self) -> tuple[int, int]:
        """An identity of the module's tensor, which changes if the tensor is replaced or written to."""
        tensor = self.host_tensor
        return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version

    def set_host_tensor(self, tensor: Tensor) -> None:
        """Replaces the module's tensor by ``tensor``, which has the same content."""
        setattr(self.module._parameters[self.weight], self.tensor, tensor.data)  # .data has its own version counter

    def view(self, memory: Tensor) -> Tensor:
        """This tensor as a view of ``memory``, uint8, which contains the block."""
        return memory[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


@dataclasses.dataclass(frozen=True)
class Block:
    """Modules that are used together, such as those of a decoder layer, and their packed tensors.

    Attributes:
        nbytes: size of the buffer for all parts, including padding.
        shared: size of the part that every token needs. Stacks of experts follow after it.
    """

    name: str
    modules: tuple[Packed4bit, ...]
    parts: tuple[Part, ...]
    nbytes: int
    shared: int

    @property
    def state(self) -> tuple[tuple[int, int], ...]:
        return tuple(part.state for part in self.parts)

    def views(self, memory: Tensor) -> dict[tuple[Packed4bit, str], PackedTensors]:
        """The tensors of each weight of each module, as views of ``memory``."""
        found: dict[tuple[Packed4bit, str], dict[str, Tensor]] = {}
        for part in self.parts:
            found.setdefault((part.module, part.weight), {})[part.tensor] = part.view(memory)
        return {key: PackedTensors(**views) for key, views in found.items()}


def _block(name: str, modules: list[Packed4bit]) -> Block:
    parts: list[Part] = []
    end = shared = 0
    modules = sorted(modules, key=lambda module: isinstance(module, Experts4bit))  # a stable sort: experts last
    for module in modules:
        for weight in module.packed_shapes:
            names = {"packed": weight, **scale_names(weight)}
            for name, tensor in module.packed_weight(weight).tensors.items():
                part = Part(module, weight, name, names[name], end, tensor.shape, tensor.dtype)
                parts.append(part)
                end = -(-(end + part.nbytes) // _ALIGNMENT) * _ALIGNMENT
        if not isinstance(module, Experts4bit):
            shared = end
    return Block(name, tuple(modules), tuple(parts), end, shared)


def blocks_of(model: nn.Module) -> list[Block]:
    """The blocks of ``model``, in the order of their use, which is assumed to be the order in the model.

    Blocks are the elements of the outermost module lists, such as decoder layers. 4-bit modules outside of these lists,
    such as embeddings and heads, belong to no block. If the model has no such list, every 4-bit layer is a block.
    """
    layers = {
        name: module for name, module in layers_of(model) if not isinstance(module, (Embedding4bit, TiedLinear4bit))
    }
    blocks: list[Block] = []
    rest = set(layers.values())
    for stack, elements in stacks_of(model, layers).items():
        for i, element in enumerate(elements):
            modules = [module for _, module in layers_of(element) if module in rest]
            rest.difference_update(modules)  # a module that several blocks share belongs to the first
            if modules:
                blocks.append(_block(f"{stack}.{i}", modules))
    return blocks or [_block(name, [module]) for name, module in layers.items()]
