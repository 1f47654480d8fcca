"""Averages of weights (``torch.optim.swa_utils.AveragedModel``: SWA, EMA) copy packed weights instead of averaging.

This module is imported automatically with ``torch.optim.swa_utils``. ``_patches`` lists what it changes in torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Packed4bit
from ._patches import extend


class WithoutPacked:
    """A module whose ``parameters()`` and ``buffers()`` omit the packed state of its 4-bit layers."""

    def __init__(self, module: Any) -> None:
        self._of = module
        packed = (m.packed_state().values() for m in module.modules() if isinstance(m, Packed4bit))
        self._packed = {id(t) for tensors in packed for t in tensors}

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._of, name)
        return WithoutPacked(attribute) if isinstance(attribute, nn.Module) else attribute

    def parameters(self) -> Iterator[Tensor]:
        return (p for p in self._of.parameters() if id(p) not in self._packed)

    def buffers(self) -> Iterator[Tensor]:
        return (t for t in self._of.buffers() if id(t) not in self._packed)


def _layers(model: nn.Module) -> list[Packed4bit]:
    return [m for m in model.modules() if isinstance(m, Packed4bit)]


@extend("torch.optim.swa_utils:AveragedModel.update_parameters")
def update_parameters(original: Any, self: Any, model: nn.Module) -> None:
    averaged = _layers(self.module)
    if not averaged:
        original(self, model)
        return
    original(WithoutPacked(self), WithoutPacked(model))
    with torch.no_grad():
        for copy, layer in zip(averaged, _layers(model), strict=True):
            state = copy.packed_state()
            for name, t in layer.packed_state().items():
                state[name].copy_(t)
