"""Loads adapters without rounding them, and without replacing parameters of their base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...merging.merge_aware import MergeAware
from .._patches import extend
from .stacks import StacksAdapters


@contextlib.contextmanager
def loading(model: nn.Module) -> Iterator[None]:
    """Loads an adapter of ``model`` as a careful reader expects, inside the ``with`` statement.

    With ``low_cpu_mem_usage``, PEFT rounds an adapter to the dtype of its layer before it casts it to float32, and
    replaces the parameters of the base whose weights are in the file, those of embeddings and of an output head, by
    others: in another dtype, on another device, and no longer tied. Here, the adapter gets the values in the file, and
    the base retains its parameters, with these values.
    """
    before = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and not parameter.is_meta
    ]
    read: dict[str, Tensor] = {}

    def keep(_: nn.Module, state: Any, *others: Any) -> None:
        read.update(state)

    handle = model.register_load_state_dict_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
    retained = {id(parameter) for _, _, parameter in before}
    for module, name, parameter in before:
        loaded = module._parameters.get(name)
        if loaded is not None and loaded is not parameter and loaded.shape == parameter.shape:
            with torch.no_grad():  # not through `data`, which version counters do not notice
                parameter.copy_(loaded)
            module._parameters[name] = parameter
    for name, parameter in model.named_parameters():
        if name in read and id(parameter) not in retained:
            with torch.no_grad():
                parameter.copy_(read[name])


@extend("peft.utils.hotswap:hotswap_adapter_from_state_dict")
def _hotswap_adapter_from_state_dict(original: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    original(model, *args, **kwargs)
    for module in model.modules():
        if isinstance(module, MergeAware):
            module.forget_merged()
        if isinstance(module, StacksAdapters):
            module.forget_stack()
