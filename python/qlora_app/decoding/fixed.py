"""Tells when a model's adapters are no longer those for which code was compiled."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from qlora_ext.integrations.peft.call_cache import chooses_adapters_by_sample

Entry = tuple[dict[str, Any], str]  # a dict of a module, and a key that it may have


def tuner_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _below(module: nn.Module) -> Iterator[Entry]:
    for each in module.modules():
        for entries in (each._modules, each._parameters):
            yield from ((entries, name) for name, entry in entries.items() if entry is not None)


def entries_of(layer: Any, adapters: Iterable[str]) -> Iterator[Entry]:
    """Where a layer of PEFT has the modules and parameters of some adapters."""
    for container in (getattr(layer, name) for name in layer.adapter_layer_names):
        if not isinstance(container, nn.Module):
            continue
        for adapter in adapters:
            yield from ((held, adapter) for held in (container._modules, container._parameters) if adapter in held)
            if adapter in container._modules:
                yield from _below(getattr(container, adapter))


class FixedEntries:
    """The modules and parameters that some entries hold at this moment, and the memory of the parameters.

    Attributes:
        parameters: those found.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        entries = [*entries]
        self._dicts, self._keys = [held for held, _ in entries], [key for _, key in entries]
        self._found = [held.get(key) for held, key in entries]
        self.parameters = [found for found in self._found if isinstance(found, Tensor)]
        self._addresses = [*map(Tensor.data_ptr, self.parameters)]

    def are_current(self) -> bool:
        """Whether they are still there. The loops run in C, because compiled code asks before each token."""
        found = map(dict.get, self._dicts, self._keys)
        return all(map(operator.is_, found, self._found)) and self._addresses == [
            *map(Tensor.data_ptr, self.parameters)
        ]


_switches = operator.attrgetter("active_adapter", "disable_adapters", "merged_adapters")


def _copied(switches: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple([*switch] if isinstance(switch, list) else switch for switch in switches)


class FixedAdapters:
    """The adapters of a model at this moment, which compiled code contains: active ones, scalings, tensors."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = tuner_layers(model)
        self._switches = [_copied(_switches(layer)) for layer in self._layers]  # PEFT may change its lists
        scaled = [layer for layer in self._layers if isinstance(getattr(layer, "scaling", None), dict)]
        self._scaled = [(layer, name) for layer in scaled for name in layer.active_adapters]
        self._numbers = self._scalings()
        # prepare_model_for_compiled_hotswap makes scalings tensors, which then change in place.
        self._tensors = [(number, float(number)) for number in self._numbers if isinstance(number, Tensor)]
        self._entries = FixedEntries(e for layer in self._layers for e in entries_of(layer, layer.active_adapters))

    def _scalings(self) -> list[Any]:
        return [layer.scaling.get(name) for layer, name in self._scaled]  # torch.export replaces the dicts by copies

    def serve(self, fully: bool = True) -> bool:
        """Whether the current call uses them.

        Args:
            fully: look at every layer, which takes 0.1 ms per 200 layers. Otherwise only at the first one: PEFT
                switches all layers together.
        """
        if chooses_adapters_by_sample():
            return False
        if not fully:
            return [*map(_switches, self._layers[:1])] == self._switches[:1]
        return (
            [*map(_switches, self._layers)] == self._switches
            and self._scalings() == self._numbers
            and all(float(tensor) == number for tensor, number in self._tensors)
            and self._entries.are_current()
        )
