"""Tells when a model's adapters are no longer those for which code was compiled."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .calls import chooses_adapters_by_sample


def _switches(layer: Any) -> tuple[Any, ...]:
    return tuple(layer.active_adapters), layer.disable_adapters, layer.merged


def _values(layer: Any) -> tuple[Any, ...]:
    """The scalings of a layer's active adapters, and where their tensors are in memory."""
    active = layer.active_adapters
    scaling = getattr(layer, "scaling", None)
    scalings = [str(scaling.get(name)) for name in active] if isinstance(scaling, dict) else []
    containers = [c for c in (getattr(layer, name) for name in layer.adapter_layer_names) if isinstance(c, nn.Module)]
    named = [(name, t) for container in containers for name, t in container.named_parameters()]
    return tuple(scalings), tuple(t.data_ptr() for name, t in named if name.partition(".")[0] in active)


class FixedAdapters:
    """The adapters of a model at this moment, which compiled code contains: active ones, scalings, tensors."""

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        self._switches = [*map(_switches, self._layers)]
        self._values = [*map(_values, self._layers)]

    def serve(self, fully: bool) -> bool:
        """Whether the current call uses them.

        Args:
            fully: look at every layer. Otherwise only at the first one, which takes no time: PEFT switches all layers
                together.
        """
        if chooses_adapters_by_sample():
            return False
        if not fully:
            return [*map(_switches, self._layers[:1])] == self._switches[:1]
        return [*map(_switches, self._layers)] == self._switches and [*map(_values, self._layers)] == self._values
