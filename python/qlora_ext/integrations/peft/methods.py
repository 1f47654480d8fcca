"""Puts the layers of all PEFT methods on 4-bit bases: our layers for LoRA, PEFT's own code for the other methods."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import nn

from ...nn import Embedding4bit, Experts4bit, Linear4bit
from ...nn.dense_16bit import Dense16bit, widen
from .._patches import extend
from .base_file import is_4bit
from .dense_16bit import merging_in_compute_dtype, widen_written
from .embedding import LoraEmbedding4bit
from .experts import LoraExperts4bit, without_dropout
from .linear import READERS, LoraLinear4bit, OverLinear4bit, decoded, reader
from .merge import Over4bit
from .parameter import LoraParameter


@functools.cache
def _over_4bit(cls: Any) -> Any:
    readers = {name: reader(name) for name in READERS if hasattr(cls, name)}
    return type(f"{cls.__name__}4bit", (OverLinear4bit, cls), readers)


def _base_of(target: nn.Module) -> nn.Module:
    base: nn.Module = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    return base


def _refuse_mixture(config: Any, target: nn.Module, target_name: str) -> None:
    """Raises a ValueError if a 4-bit layer with adapters of one method would also get those of another."""
    if not isinstance(target, BaseTunerLayer) or not isinstance(_base_of(target), Linear4bit):
        return
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    same = any(name.startswith(prefix) for name in target.adapter_layer_names)
    if not same or isinstance(target, AdaLoraLayer) != (config.peft_type == PeftType.ADALORA):
        raise ValueError(
            f"target_modules: {target_name} is a 4-bit layer with adapters of {type(target).__name__} and cannot also "
            f"have {config.peft_type.value}; give each method of a PeftMixedModel its own layers"
        )


def _set_names(layer: nn.Module, name: str) -> None:
    """Tells a layer over a 4-bit base, and the layers that it wraps, their name in the model."""
    inner: Any = layer
    while isinstance(inner, Over4bit):
        inner.set_name(name.replace(".base_layer", ""))
        inner = inner.base_layer  # type: ignore[attr-defined]


def create_over_4bit(original: Any, self: Any, config: Any, name: str, target: Any, *args: Any, **kwargs: Any) -> None:
    """Wraps the ``_create_and_replace`` of a PEFT method, so that it sees a decoded copy of a 4-bit target.

    Raises:
        TypeError: the method's layer has no ``base_layer`` in which to put the 4-bit layer back. ValueError: the layer
            has adapters of another method.
    """
    target_name, parent = args[0], args[1]
    _refuse_mixture(config, target, target_name)
    if isinstance(target, OverLinear4bit):
        with target.decoded_base():
            original(self, config, name, target, *args, **kwargs)
        return
    if not isinstance(target, Linear4bit):
        if isinstance(_base_of(target), Dense16bit):  # the method's code may read or write the weight
            widen(_base_of(target))
        original(self, config, name, target, *args, **kwargs)
        return
    dense = decoded(target)
    before = dense.weight.detach().clone()
    original(self, config, name, dense, *args, **kwargs)
    layer = getattr(parent, target_name)
    if not isinstance(layer, BaseTunerLayer) or getattr(layer, "base_layer", None) is not dense:
        setattr(parent, target_name, target)
        raise TypeError(f"target_modules: {type(self).__name__} cannot train over 4-bit layers ({target_name})")
    layer.base_layer = target
    kind: Any = type(layer)
    layer.__class__ = _over_4bit(kind)
    vars(layer).pop("quantization_backend", None)  # PEFT's for the decoded copy, which hides that of our class
    _set_names(layer, kwargs.get("current_key", target_name))
    if not torch.equal(dense.weight, before):
        layer.requantize(dense.weight)


def _create_over_weights(target: nn.Module, name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """PEFT's layer over ``target`` if its base is 4-bit experts or a 4-bit embedding, else None."""
    if isinstance(_base_of(target), Experts4bit) and kwargs.get("parameter_name") is not None:
        return LoraExperts4bit(target, name, config=config, **kwargs)
    if isinstance(target, Embedding4bit) and kwargs.get("parameter_name") is None:
        if config.use_dora or (isinstance(config.init_lora_weights, str) and config.init_lora_weights != "gaussian"):
            raise ValueError(
                "target_modules: a 4-bit embedding supports plain LoRA only, got "
                f"use_dora={config.use_dora}, init_lora_weights={config.init_lora_weights!r}"
            )
        return LoraEmbedding4bit(target, name, config=config, **kwargs)
    return None


def _methods(cls: type[BaseTuner]) -> Iterator[type[BaseTuner]]:
    for method in cls.__subclasses__():
        yield method
        yield from _methods(method)


for _method in {*_methods(BaseTuner)} - {LoraModel, MixedModel}:  # MixedModel calls those of the other methods
    if "_create_and_replace" in vars(_method):
        extend("peft.tuners.tuners_utils:BaseTuner._create_and_replace", owner=_method)(create_over_4bit)


@extend("peft.tuners.lora:LoraModel._create_new_module")
def _create_new_module(original: Any, lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
    if isinstance(target, Linear4bit):
        return LoraLinear4bit(target, adapter_name, config=lora_config, **kwargs)
    over = _create_over_weights(target, adapter_name, lora_config, **kwargs)
    if over is None:
        over = merging_in_compute_dtype(original(lora_config, adapter_name, target, **kwargs))
    return over


@extend("peft.tuners.lora:LoraModel._create_and_replace")
def _create_and_replace(
    original: Any,
    self: Any,
    config: Any,
    name: str,
    target: nn.Module,
    target_name: str,
    parent: nn.Module,
    **kwargs: Any,
) -> None:
    _refuse_mixture(config, target, target_name)
    parameter, base = kwargs.get("parameter_name"), _base_of(target)
    widen_written(base, config, parameter)
    if parameter is None or isinstance(base, Experts4bit) or not is_4bit(self.model):
        original(self, config, name, target, target_name, parent, **kwargs)
        for layer in getattr(parent, target_name).modules():  # PEFT moves adapters to the device of the packed weight
            if isinstance(layer, Over4bit) and layer.layer4bit.residency is not None:
                layer.move_adapter(name, layer.layer4bit.residency.device)
        _set_names(getattr(parent, target_name), kwargs.get("current_key", target_name))
        return
    if config.lora_dropout:
        warnings.warn(
            f"lora_dropout={config.lora_dropout}: has no effect on {type(base).__name__}.{parameter}, a dense "
            "parameter, because PEFT has no dropout for it",
            stacklevel=2,
        )
    original(self, without_dropout(config), name, target, target_name, parent, **kwargs)
    layer = getattr(parent, target_name)
    if type(layer) is ParamWrapper:
        layer.__class__ = LoraParameter
