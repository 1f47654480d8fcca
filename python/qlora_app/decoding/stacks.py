"""The adapters of all 4-bit layers of a model, stacked for the operator, which then serves any mixture of them.

::

    lora_a of a layer   [ adapter 0 | adapter 1 |  ..  | spare ]   [sum of ranks, K]
    lora_b of a layer   [ adapter 0 | adapter 1 |  ..  | spare ]   [N, sum of ranks]

The spare adapter has the rank ``max_rank`` and belongs to no row. It makes the largest rank of every layer
``max_rank``, which is a constant of compiled code, and no size 0 or 1, which torch.export would make constants.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from qlora_ext.integrations.peft.linear import LoraLinear4bit
from qlora_ext.integrations.peft.stacks import Adapter

from ..tensor_state import TensorState
from .fixed import tuner_layers

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
        self._name, self._layers = name, [layers[place.layer] for place in places]
        self._tensors = [t for place in places for t in (place.adapter.a, place.adapter.b)]
        ids = [*map(id, self._tensors)]
        self._state, self._first_state = (TensorState(nn.ModuleList(self._layers[:n]), ids) for n in (None, 1))
        self._seen: tuple[list[int], list[Any]] | None = None  # versions and scalings
        self.is_stale = True

    def is_there(self) -> bool:
        """Whether the adapter's tensors are those that were found first.

        Looks at all layers if the adapter is to be copied anyway. Otherwise only at the first one, because this takes
        longer than anything else here: PEFT adds, deletes and swaps the tensors of all layers together.
        """
        return (self._state if self.is_stale else self._first_state).is_current()

    def take(self, stacks: AdapterStacks) -> bool:
        """Copies the tensors if they have changed. Returns False if a scaling cannot be stacked."""
        versions = [*map(_version, self._tensors)]
        numbers = [layer.scaling.get(self._name) for layer in self._layers]  # torch.export replaces the dicts by copies
        if not all(isinstance(number, float | int) for number in numbers):
            return False
        if self.is_stale or (versions, numbers) != self._seen:
            for layer, first, adapter in self.places:
                end = first + adapter.a.shape[0]
                stacks.lora_a[layer][first:end].copy_(adapter.a)
                stacks.lora_b[layer][:, first:end].copy_(adapter.b)
            of_layers = torch.tensor(numbers, dtype=torch.float64, device="cpu")
            stacks.scalings[[place.layer for place in self.places], self.index] = of_layers
            self._seen, self.is_stale = (versions, numbers), False
        return True


def _largest_rank(layer: LoraLinear4bit) -> int:
    return max((module.weight.shape[0] for module in layer.lora_A.values()), default=0)


class AdapterStacks:
    """Copies of all adapters of a model, which follow the adapters.

    ``follow`` notices in-place changes by torch's version counters, and also other scalings, and adapters that were
    added, deleted or swapped. Version counters do not count what a program writes through ``parameter.data``. After
    ``renew``, an adapter is copied in any case.

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
        self._built_for: list[str] | None = None
        self._rejected: set[str] = set()

    @staticmethod
    def can_serve(model: nn.Module) -> bool:
        """Whether all adapters of ``model`` are LoRA on 4-bit layers."""
        layers = tuner_layers(model)
        return (
            bool(layers)
            and not any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())
            and all(isinstance(layer, LoraLinear4bit) for layer in layers)
        )

    def index(self, name: str) -> int:
        """The number of an adapter, which ``follow`` has been asked for; -1 for none."""
        return self._copies[name].index if name in self._copies else -1

    def renew(self, names: Iterable[str]) -> None:
        """Has ``follow`` copy the adapters ``names`` in any case, and try again if it returned False."""
        self._rejected = set()
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
        used = [name for name in names if name in self._known]
        if not self._rejected.isdisjoint(used):
            return False
        missing = [name for name in used if name not in self._copies or not self._copies[name].is_there()]
        if missing or self._built_for != [*self._known]:
            self._build()
            missing = [name for name in used if name not in self._copies]
        missing += [name for name in used if name not in missing and not self._copies[name].take(self)]
        self._rejected.update(missing)
        return not missing

    def _build(self) -> None:
        """Allocates stacks for all adapters that can be stacked."""
        names = self._built_for = [*self._known]
        self._copies = {}
        if not self.can_serve(self._model) or tuner_layers(self._model) != self.layers:  # other layers have adapters
            return
        names = [name for name in names if all(self._fits(layer, name) for layer in self.layers)]
        found = [layer.plain_adapters(names) or [] for layer in self.layers]
        ranks = [{adapter.name: adapter.a.shape[0] for adapter in of_layer} for of_layer in found]
        offsets = [[0, *itertools.accumulate([*(of.get(name, 0) for name in names), self.max_rank])] for of in ranks]
        dtypes = [layer.layer4bit.compute_dtype for layer in self.layers]
        every = [*zip(self.layers, offsets, dtypes, strict=True)]
        self.lora_a = [
            torch.zeros((at[-1], layer.in_features), dtype=dtype, device="cpu") for layer, at, dtype in every
        ]
        self.lora_b = [
            torch.zeros((layer.out_features, at[-1]), dtype=dtype, device="cpu") for layer, at, dtype in every
        ]
        self.rank_offsets = torch.tensor(offsets, dtype=torch.int32, device="cpu")
        self.scalings = torch.ones((len(self.layers), len(names) + 1), dtype=torch.float64, device="cpu")
        for e, name in enumerate(names):
            places = [
                _Place(i, offsets[i][e], adapter)
                for i, of_layer in enumerate(found)
                for adapter in of_layer
                if adapter.name == name
            ]
            self._copies[name] = _Copy(name, e, self.layers, places)

    def _fits(self, layer: LoraLinear4bit, name: str) -> bool:
        """Whether an adapter of a layer, if it has one, can be stacked."""
        adapters = layer.plain_adapters([name])
        if adapters is None:
            return False
        for _, a, b, *_ in adapters:
            if a.is_inference() or b.is_inference():  # they have no version counters
                return False
            if a.shape[0] > self.max_rank or a.device.type != "cpu" or b.device.type != "cpu":
                return False
        return True
