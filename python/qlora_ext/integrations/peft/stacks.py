"""The adapters of all 4-bit layers of a model, stacked for the operator, which then serves any mixture of them.

::

    lora_a of a layer   [ adapter 0 | adapter 1 |  ..  | spare ]   [sum of ranks, K]
    lora_b of a layer   [ adapter 0 | adapter 1 |  ..  | spare ]   [N, sum of ranks]

The spare adapter has the rank ``max_rank`` and belongs to no row. It makes the largest rank of every layer
``max_rank``, which is a constant of compiled code, and no size 0 or 1, which torch.export would make constants.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .fixed import FixedEntries, entries_of, tuner_layers
from .linear import LoraLinear4bit
from .operands import Adapter

_RANK_STEP = 16  # max_rank is a multiple, so that compiled code serves adapters of other ranks too

_version = operator.attrgetter("_version")
_switches = operator.attrgetter("disable_adapters", "merged_adapters")


class _Place(NamedTuple):
    """Where an adapter of a layer is in the layer's stacks: [first, first + rank)."""

    layer: int
    first: int
    adapter: Adapter


class _Copy:
    """An adapter that has been copied to the stacks, and from what."""

    def __init__(self, name: str, index: int, layers: Sequence[LoraLinear4bit], places: list[_Place]) -> None:
        self.index, self.places = index, places
        self._name, self._scalings = name, [layers[place.layer].scaling for place in places]
        self._entries = FixedEntries(e for layer in layers for e in entries_of(layer, [name]))
        self._versions: list[int] = []
        self._numbers: list[Any] = []
        self.is_stale = True

    def is_there(self) -> bool:
        """Whether the adapter's tensors are those that were found first."""
        return self._entries.are_current()

    def take(self, stacks: AdapterStacks) -> bool:
        """Copies the tensors if they have changed. Returns False if a scaling cannot be stacked."""
        versions = [*map(_version, self._entries.parameters)]
        numbers = [scaling.get(self._name) for scaling in self._scalings]
        if not all(isinstance(number, float | int) for number in numbers):
            return False
        if self.is_stale or versions != self._versions:
            for layer, first, adapter in self.places:
                end = first + adapter.a.shape[0]
                stacks.lora_a[layer][first:end].copy_(adapter.a)
                stacks.lora_b[layer][:, first:end].copy_(adapter.b)
        if numbers != self._numbers:
            of_layers = torch.tensor(numbers, dtype=torch.float64, device="cpu")
            stacks.scalings[[place.layer for place in self.places], self.index] = of_layers
        self._versions, self._numbers, self.is_stale = versions, numbers, False
        return True


def _largest_rank(layer: LoraLinear4bit) -> int:
    return max((module.weight.shape[0] for module in layer.lora_A.values()), default=0)


class AdapterStacks:
    """Copies of all adapters of a model, which follow the adapters.

    ``follow`` notices changes by torch's version counters, as an optimizer makes, moved tensors, scalings, and adapters
    that were added or deleted. Version counters do not count what a program writes through ``parameter.data``; ``renew``
    has an adapter copied in any case.

    Attributes:
        layers: the model's 4-bit layers with adapters, in the order of the stacks.
        max_rank: the largest rank that the stacks take.
        lora_a, lora_b: a stack per layer.
        rank_offsets: int32 [layers, adapters + 2], the spare one included.
        scalings: float64 [layers, adapters + 1].
    """

    def __init__(self, model: nn.Module, known: dict[str, Any]) -> None:
        """``known`` has the adapters' names as keys, now and when adapters were added or deleted."""
        self._model, self._known = model, known
        self.layers: list[LoraLinear4bit] = tuner_layers(model)
        self.max_rank = -(-max(map(_largest_rank, self.layers)) // _RANK_STEP) * _RANK_STEP
        self.lora_a: list[Tensor] = []
        self.lora_b: list[Tensor] = []
        self.rank_offsets = self.scalings = torch.zeros(0, dtype=torch.int32, device="cpu")
        self._copies: dict[str, _Copy] = {}
        self._rejected: list[str] | None = None

    @staticmethod
    def can_serve(model: nn.Module) -> bool:
        """Whether all adapters of ``model`` are LoRA on 4-bit layers."""
        layers = tuner_layers(model)
        return bool(layers) and not any(
            isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules()
        ) and all(isinstance(layer, LoraLinear4bit) for layer in layers)

    def index(self, name: str) -> int:
        """The number of an adapter, which ``follow`` has been asked for; -1 for none."""
        return self._copies[name].index if name in self._copies else -1

    def renew(self, names: Iterable[str]) -> None:
        """Has ``follow`` copy the adapters ``names`` in any case, and try again if it returned False."""
        self._rejected = None
        for name in names:
            if name in self._copies:
                self._copies[name].is_stale = True

    @torch.no_grad()
    def follow(self, names: Iterable[str]) -> bool:
        """Updates the copies of the adapters ``names``.

        Returns:
            Whether the stacks compute what the model does. They do not if adapters are disabled or merged, or if one is
            no plain LoRA adapter.
        """
        if any(disabled or merged for disabled, merged in map(_switches, self.layers)):
            return False
        known = [*self._known]
        if known == self._rejected:
            return False
        used = [name for name in names if name in self._known]
        is_built = [*self._copies] == known and all(self._copies[name].is_there() for name in used)
        if (is_built or self._build(known)) and all(self._copies[name].take(self) for name in used):
            return True
        self._rejected = known
        return False

    def _build(self, names: list[str]) -> bool:
        """Allocates stacks for all adapters. Returns False if they take other stacks than ``layers`` had."""
        self._copies = {}
        if not self.can_serve(self._model) or tuner_layers(self._model) != self.layers:
            return False
        places: dict[str, list[_Place]] = {name: [] for name in names}
        offsets, shapes = [], []
        for i, layer in enumerate(self.layers):
            adapters = layer.plain_adapters(names)
            if adapters is None or not all(map(self._fits, adapters)):
                return False
            ranks = {adapter.name: adapter.a.shape[0] for adapter in adapters}
            starts = [0]
            for name in names:
                starts.append(starts[-1] + ranks.get(name, 0))
            for adapter in adapters:
                places[adapter.name].append(_Place(i, starts[names.index(adapter.name)], adapter))
            offsets.append([*starts, starts[-1] + self.max_rank])
            shapes.append((offsets[-1][-1], layer))
        self.lora_a = [
            torch.zeros((ranks, layer.in_features), dtype=layer.layer4bit.compute_dtype, device="cpu")
            for ranks, layer in shapes
        ]
        self.lora_b = [
            torch.zeros((layer.out_features, ranks), dtype=layer.layer4bit.compute_dtype, device="cpu")
            for ranks, layer in shapes
        ]
        self.rank_offsets = torch.tensor(offsets, dtype=torch.int32, device="cpu")
        self.scalings = torch.ones((len(self.layers), len(names) + 1), dtype=torch.float64, device="cpu")
        self._copies = {name: _Copy(name, i, self.layers, places[name]) for i, name in enumerate(names)}
        return True

    def _fits(self, adapter: Adapter) -> bool:
        a, b = adapter.a, adapter.b
        if a.is_inference() or b.is_inference():  # they have no version counters
            return False
        return a.shape[0] <= self.max_rank and a.device.type == b.device.type == "cpu"

