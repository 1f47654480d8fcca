"""accelerate offloads tensors by the names that they have in ``state_dict()``, so 4-bit layers expose theirs.

This module is imported automatically with ``accelerate.hooks``. ``_patches`` lists what it changes there.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn import layers_of
from ._patches import extend


@extend("accelerate.hooks:AlignDevicesHook.init_hook")
def init_hook(original: Any, self: Any, module: nn.Module) -> nn.Module:
    placed = (layer for _, layer in layers_of(module) if self.place_submodules or layer is module)
    layers = [layer for layer in placed if not layer.is_exposed]
    for layer in layers:
        layer.expose()
    module = original(self, module)
    for layer in layers:
        if not layer.is_offloaded:
            layer.join()
    return module
