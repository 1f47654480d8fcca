"""Tells when a model's adapters are no longer those for which code was compiled."""

from __future__ import annotations

import operator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from qlora_ext.integrations.peft.call_cache import chooses_adapters_by_sample

BASE = "__base__"  # PEFT's name for no adapter


def tuner_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def active_adapters(layer: Any) -> list[str]:
    """The names of the adapters that a layer of PEFT computes with."""
    return [] if layer.disable_adapters else list(layer.active_adapters)


_switches = operator.attrgetter("active_adapter", "disable_adapters", "merged_adapters")


def _copied(switches: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple([*switch] if isinstance(switch, list) else switch for switch in switches)


class FixedAdapters:
    """Which adapters of a model are active at this moment, and their scalings. Compiled code contains both."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = tuner_layers(model)
        self._switches = [_copied(_switches(layer)) for layer in self._layers]  # PEFT may change its lists
        scaled = [layer for layer in self._layers if isinstance(getattr(layer, "scaling", None), dict)]
        self._scaled = [(layer, name) for layer in scaled for name in layer.active_adapters]
        self._numbers = self._scalings()
        # prepare_model_for_compiled_hotswap makes scalings tensors, which then change in place.
        self._tensors = [(number, float(number)) for number in self._numbers if isinstance(number, Tensor)]

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
        )
