"""accelerate moves tensors by the names that they have in ``state_dict()``, so 4-bit layers expose theirs meanwhile.

This module is imported automatically with ``accelerate.hooks``. ``_patches`` lists what it changes there.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn import Packed4bit
from ._patches import extend


@extend("accelerate.hooks:AlignDevicesHook.init_hook")
@extend("accelerate.hooks:AlignDevicesHook.pre_forward")
@extend("accelerate.hooks:AlignDevicesHook.post_forward")
@extend("accelerate.hooks:AlignDevicesHook.detach_hook")
def _with_exposed(original: Any, self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # Only inside the hook, so that a model's code that reads layer.weight.dtype never gets that of the codes.
    if not self.offload and original.__name__ != "init_hook":  # nothing moves
        return original(self, module, *args, **kwargs)
    placed = module.modules() if self.place_submodules else (module,)
    layers = [m for m in placed if isinstance(m, Packed4bit) and not m.is_exposed]
    for layer in layers:
        layer.expose()
    try:
        return original(self, module, *args, **kwargs)
    finally:
        for layer in layers:
            layer.join()
