"""accelerate moves tensors by the names that they have in ``state_dict()``, so 4-bit layers expose theirs meanwhile.

This module is imported automatically with ``accelerate.hooks``. ``_patches`` lists what it changes there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate.hooks import AlignDevicesHook
from torch import nn

from ..nn import Packed4bit
from ._patches import extend


@contextlib.contextmanager
def _exposed(hook: Any, module: nn.Module) -> Iterator[None]:
    # Only inside the hook, so that a model's code that reads layer.weight.dtype never gets that of the codes.
    layers = [layer for layer in _layers(hook, module) if not layer.is_exposed]
    for layer in layers:
        layer.expose()
    try:
        yield
    finally:
        for layer in layers:
            layer.join()


def _layers(hook: Any, module: nn.Module) -> list[Packed4bit]:
    """The 4-bit layers whose tensors the hook moves."""
    placed = module.modules() if hook.place_submodules else (module,)
    return [m for m in placed if isinstance(m, Packed4bit)]


class _OffloadHook(AlignDevicesHook):
    """A hook of accelerate that offloads a module with 4-bit layers."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _exposed(self, module):
            return super().pre_forward(module, *args, **kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        with _exposed(self, module):
            return super().post_forward(module, output)

    def detach_hook(self, module: nn.Module) -> Any:
        with _exposed(self, module):
            return super().detach_hook(module)


@extend("accelerate.hooks:AlignDevicesHook.init_hook")
def _init_hook(original: Any, self: Any, module: nn.Module) -> Any:
    if self.offload and type(self) is AlignDevicesHook and _layers(self, module):
        self.__class__ = _OffloadHook
    with _exposed(self, module):
        return original(self, module)
