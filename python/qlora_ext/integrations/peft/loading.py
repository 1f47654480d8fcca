"""Loads adapters without rounding them, and without replacing parameters of their base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from .._patches import extend

# Whether an adapter is being loaded that PEFT casts to float32 at the end.
_casts_to_float32: ContextVar[bool] = ContextVar("_casts_to_float32", default=False)


@contextlib.contextmanager
def loading(model: nn.Module, casts_to_float32: bool) -> Iterator[None]:
    """Loads an adapter of ``model`` as a careful reader expects, inside the ``with`` statement.

    The model's parameters are retained, and get the values of those that replace them. An adapter on embeddings or on
    an output head is saved with their weights, and if PEFT loads it with ``low_cpu_mem_usage``, these replace the
    parameters of the base: in another dtype, on another device, and no longer tied.

    Args:
        casts_to_float32: PEFT's ``autocast_adapter_dtype``. The adapter is then not cast to a narrower dtype first.
    """
    before = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and not parameter.is_meta
    ]
    token = _casts_to_float32.set(casts_to_float32)
    try:
        yield
    finally:
        _casts_to_float32.reset(token)
    for module, name, parameter in before:
        loaded = module._parameters.get(name)
        if loaded is not None and loaded is not parameter and loaded.shape == parameter.shape:
            parameter.data.copy_(loaded.data)
            module._parameters[name] = parameter


@extend("peft.tuners.tuners_utils:BaseTunerLayer._get_base_layer_device_and_dtype")
def _get_base_layer_device_and_dtype(
    original: Any, self: Any, *args: Any, **kwargs: Any
) -> tuple[torch.device | None, torch.dtype | None]:
    device, dtype = original(self, *args, **kwargs)
    return device, None if _casts_to_float32.get() else dtype
