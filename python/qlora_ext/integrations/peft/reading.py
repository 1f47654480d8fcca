"""Gives PEFT's functions that read base weights the decoded weights of 4-bit layers.

They read one weight after the other. Each weight is decoded when torch computes with it and freed afterwards, so that
only one decoded weight is in memory at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ...nn import Embedding4bit, Linear4bit, layers_of, places_in
from .._patches import extend
from ..averaging import WithoutPacked


class LazyWeight(Tensor):
    """The weight [N, K] of a 4-bit layer. It has a dtype, shape and device; its values are decoded at every use."""

    _layer: Callable[[], Any]

    def __new__(cls, layer: Any) -> LazyWeight:
        (shape,) = layer.packed_shapes.values()
        device = layer.weight.device if layer.residency is None else layer.residency.device
        lazy = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=layer.weight_dtype, device=device)
        lazy._layer = lambda: layer
        return lazy

    def decoded(self) -> Tensor:
        decoded: Tensor = self._layer().dequantize()
        return decoded

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(LazyWeight, LazyWeight.decoded, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Reading(nn.Module):
    """A proxy of a 4-bit layer: calls and attributes are the layer's own, but ``weight`` is a ``LazyWeight``."""

    def __init__(self, layer: nn.Module) -> None:
        nn.Module.__init__(self)
        # The layer is not a submodule, because that would rename its parameters.
        self.__dict__.update(layer=layer, _parameters=layer._parameters, training=layer.training)

    @property
    def weight(self) -> Tensor:
        return LazyWeight(self.__dict__["layer"])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.__dict__["layer"](x)
        return y

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["layer"], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__dict__["layer"], name)


class _ReadingLinear(_Reading, nn.Linear):  # type: ignore[override]
    pass


class _ReadingEmbedding(_Reading, nn.Embedding):  # type: ignore[override]
    pass


def stand_in(layer: Linear4bit | Embedding4bit) -> nn.Module:
    """The proxy of a 4-bit layer for code that reads its weight."""
    kind = _ReadingLinear if isinstance(layer, Linear4bit) else _ReadingEmbedding
    return kind(layer)


def unwrapped(layer: nn.Module) -> nn.Module:
    """The 4-bit layer behind the proxy ``layer``, or ``layer`` itself if it is not a proxy."""
    found: nn.Module = layer.__dict__["layer"] if isinstance(layer, _Reading) else layer
    return found


@contextlib.contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """Replaces the 4-bit linear layers and embeddings of ``model`` by their proxies inside the ``with`` statement."""
    places = [(layer, at) for layer, at in places_in(model).items() if isinstance(layer, Linear4bit | Embedding4bit)]
    for layer, at in places:
        proxy = stand_in(layer)
        for parent, name, _ in at:
            parent._modules[name] = proxy
    try:
        yield
    finally:
        for layer, at in places:
            for parent, name, _ in at:
                if isinstance(parent._modules.get(name), _Reading):
                    parent._modules[name] = layer


@extend("peft.tuners.lora.conversion:convert_to_lora", optional=True)
@extend("peft.tuners.lora.intruders:reduce_intruder_dimension", optional=True)
@extend("peft.tuners.lora.corda:preprocess_corda", optional=True)
def _read_a_model(original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    with reading(model):
        return original(model, *args, **kwargs)


@extend("peft.tuners.frod.model:FrodModel._init_frod_projections", optional=True)
@extend("peft.helpers:KappaTuneSelector._compute_kappas", optional=True)
def _read_own_model(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    with reading(self.model):
        return original(self, *args, **kwargs)


@extend("peft.utils.other:cast_mixed_precision_params")
def _cast_mixed_precision_params(original: Any, model: nn.Module, dtype: torch.dtype) -> None:
    original(WithoutPacked(model), dtype)
    for _, layer in layers_of(model):
        layer.compute_dtype = dtype


@extend("peft.tuners.lora.loraga:preprocess_loraga", optional=True)
def _refuse_gradients(original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    found = [name for name, _ in layers_of(model)]
    if found:
        raise ValueError(
            f"model: LoRA-GA needs gradients of dense weights, got {len(found)} 4-bit layers, such as {found[0]}; "
            "prepare it on the dense model with a cache_file, or use quantize_model(init_lora='svd')"
        )
    return original(model, *args, **kwargs)
