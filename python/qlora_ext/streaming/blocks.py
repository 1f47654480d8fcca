"""What is streamed: the packed weights of a model's blocks, and how those of a block lie in one piece of memory."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from .._internal.lending import PackedTensors
from ..calibration.stages import stacks_of
from ..nn import Embedding4bit, Experts4bit, Packed4bit, TiedLinear4bit, layers_of, scale_names

_ALIGNMENT = 256  # of every tensor in a block: what cudaMalloc gives, and more than any kernel asks for


@dataclasses.dataclass(frozen=True)
class Part:
    """One packed tensor of a block: the attribute ``name`` of ``module``, whose bytes begin at ``offset`` in it."""

    module: Packed4bit
    name: str
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def home(self) -> Tensor:
        """The tensor that the module keeps, on the host."""
        tensor: Tensor = getattr(self.module, self.name)
        return tensor.detach()

    @property
    def state(self) -> tuple[int, int]:
        """What changes whenever somebody gives the module another tensor, or writes to the one that it has."""
        tensor = getattr(self.module, self.name)
        return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version

    def move_home(self, tensor: Tensor) -> None:
        """Has the module keep ``tensor``, which holds the same, in place of its own."""
        if self.name in self.module._parameters:
            getattr(self.module, self.name).data = tensor
        else:
            self.module._buffers[self.name] = tensor.data  # with a version of its own

    def view(self, memory: Tensor) -> Tensor:
        """This tensor in ``memory``, uint8, which holds the block."""
        return memory[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


@dataclasses.dataclass(frozen=True)
class Block:
    """The modules that are used together, as a decoder layer's are, and their packed tensors.

    Attributes:
        nbytes: of memory that holds the parts, with what aligns them.
        shared: of these, the ones that every token needs: stacks of experts come last.
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
        """The four tensors of every weight of every module, in ``memory``."""
        found = {(part.module, part.name): part.view(memory) for part in self.parts}

        def four(module: Packed4bit, weight: str) -> PackedTensors:
            absmax, *nested = scale_names(weight).values()
            nested_absmax, nested_offset = (found.get((module, name)) for name in nested)
            return found[module, weight], found[module, absmax], nested_absmax, nested_offset

        return {(module, weight): four(module, weight) for module in self.modules for weight in module.packed_shapes}


def _block(name: str, modules: list[Packed4bit]) -> Block:
    parts: list[Part] = []
    end = shared = 0
    modules = sorted(modules, key=lambda module: isinstance(module, Experts4bit))  # else in their order
    for module in modules:
        for attribute, tensor in module.packed_state().items():
            part = Part(module, attribute, end, tensor.shape, tensor.dtype)
            parts.append(part)
            end = -(-(end + part.nbytes) // _ALIGNMENT) * _ALIGNMENT
        if not isinstance(module, Experts4bit):
            shared = end
    return Block(name, tuple(modules), tuple(parts), end, shared)


def blocks_of(model: nn.Module) -> list[Block]:
    """The blocks of ``model`` in the order in which they are used, as far as its structure tells.

    They are the elements of its outermost lists of modules, the decoder layers. 4-bit modules outside of them, such
    as embeddings and heads, are in none; where a model has no such list, every 4-bit layer is a block.
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
