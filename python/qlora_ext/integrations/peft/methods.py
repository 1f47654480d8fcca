"""The tuners of PEFT's methods for 4-bit bases: they put our layers on them for LoRA, and PEFT's own otherwise."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.mixed import MixedModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, PeftType
from torch import nn

from ...merging.layers import Over4bit
from ...nn import Embedding4bit, Experts4bit, Linear4bit
from ...nn.dense_16bit import Dense16bit, widen
from .._patches import extend
from ..transformers.modules import dequantize_modules
from .base_file import is_4bit
from .call_cache import PerSample
from .embedding import LoraEmbedding4bit
from .experts import LoraExperts4bit, without_dropout
from .linear import READERS, LoraLinear4bit, LoraWeight4bit, OverLinear4bit, decoded, reader
from .over_dense_16bit import merge_in_compute_dtype, widen_written
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


def _lora_over(target: nn.Module, name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """Our LoRA layer over a 4-bit layer, or over one of its parameters; None for what PEFT rejects."""
    parameter = kwargs.get("parameter_name")
    if isinstance(_base_of(target), Experts4bit):
        return None if parameter is None else LoraExperts4bit(target, name, config=config, **kwargs)
    if isinstance(target, Linear4bit) and parameter in (None, "weight"):
        layer = LoraLinear4bit if parameter is None else LoraWeight4bit
        return layer(target, name, config=config, **kwargs)
    if parameter is not None:
        raise ValueError(
            f"target_parameters: expected weights of linear layers or experts, got {kwargs['target_name']} of a "
            f"{type(target).__name__}"
        )
    if config.use_dora or (isinstance(config.init_lora_weights, str) and config.init_lora_weights != "gaussian"):
        raise ValueError(
            "target_modules: a 4-bit embedding supports plain LoRA only, got "
            f"use_dora={config.use_dora}, init_lora_weights={config.init_lora_weights!r}"
        )
    return LoraEmbedding4bit(target, name, config=config, **kwargs)


# For PEFT's registration of custom LoRA layers, by the class of the base.
_LORA_LAYERS: dict[Any, Any] = dict.fromkeys((Linear4bit, Embedding4bit, Experts4bit), _lora_over)


class Tuner4bit(PerSample):
    """A mixin, placed before the class of a PEFT method, for models with 4-bit layers, or with layers in 16 bits."""

    model: nn.Module

    def _create_and_replace(
        self, config: Any, name: str, target: Any, target_name: str, *args: Any, **more: Any
    ) -> None:
        _refuse_mixture(config, target, target_name)
        create = self._create_lora if config.peft_type == PeftType.LORA else self._create_over_4bit
        create(super()._create_and_replace, config, name, target, target_name, *args, **more)  # type: ignore[misc]

    def _create_over_4bit(
        self, original: Any, config: Any, name: str, target: Any, target_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Adds an adapter of another method than LoRA with PEFT's code, which sees a decoded copy of a 4-bit target.

        Raises:
            TypeError: the method's layer has no ``base_layer`` in which to put the 4-bit layer back.
        """
        if isinstance(target, OverLinear4bit):
            with target.decoded_base():
                original(config, name, target, target_name, *args, **kwargs)
            return
        if not isinstance(target, Linear4bit):
            if isinstance(_base_of(target), Dense16bit):  # the method's code may read or write the weight
                widen(_base_of(target))
            original(config, name, target, target_name, *args, **kwargs)
            return
        dense, parent = decoded(target), args[0]
        before = dense.weight.detach().clone()
        original(config, name, dense, target_name, *args, **kwargs)
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

    def _create_lora(
        self, original: Any, config: Any, name: str, target: nn.Module, target_name: str, parent: Any, **kwargs: Any
    ) -> None:
        parameter, base = kwargs.get("parameter_name"), _base_of(target)
        widen_written(base, config, parameter)
        config._register_custom_module(_LORA_LAYERS)
        if parameter is None or isinstance(base, Experts4bit) or not is_4bit(self.model):
            original(config, name, target, target_name, parent, **kwargs)
            added = getattr(parent, target_name)
            merge_in_compute_dtype(added)
            for layer in added.modules():  # PEFT moves adapters to the device of the packed weight
                if isinstance(layer, Over4bit) and layer.layer4bit.residency is not None:
                    layer.move_adapter(name, layer.layer4bit.residency.device)
            _set_names(added, kwargs.get("current_key", target_name))
            return
        if config.lora_dropout:
            warnings.warn(
                f"lora_dropout={config.lora_dropout}: has no effect on {type(base).__name__}.{parameter}, a dense "
                "parameter, because PEFT has no dropout for it",
                stacklevel=2,
            )
        original(without_dropout(config), name, target, target_name, parent, **kwargs)
        added = getattr(parent, target_name)
        if type(added) is ParamWrapper:
            added.__class__ = LoraParameter

    def merge_into_dense(self, progressbar: Any = False, safe_merge: bool = False, adapter_names: Any = None) -> Any:
        """The base model, in which the layers with adapters are merged and dense."""
        if isinstance(self, MixedModel):  # its own code merges in place, which would round the weights to 4 bits
            for parent in [*self.model.modules()]:
                for name, layer in [*parent.named_children()]:
                    if isinstance(layer, Over4bit) and not isinstance(parent, Over4bit):
                        setattr(parent, name, layer.unload_and_optionally_merge_module(True, safe_merge, adapter_names))
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)  # type: ignore[misc]

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        has_4bit = is_4bit(self.model)
        merged = self.merge_into_dense(*args, **kwargs)
        if not has_4bit:
            return merged
        # The merged layers are dense, so the others become dense too, even if no 4-bit layer has an adapter.
        return merged.dequantize() if getattr(merged, "hf_quantizer", None) else dequantize_modules(merged)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As an object of PEFT's class, which pickle finds by its name."""
        reduced: Any = super().__reduce_ex__(protocol)
        return _new, type(self).__bases__[1:], *reduced[2:]


@functools.cache
def _for_4bit(cls: Any) -> Any:
    takes_names = hasattr(cls, "_enable_peft_forward_hooks")
    return type(cls.__name__, (Tuner4bit, cls), {"__module__": __name__, "takes_names": takes_names})


def _new(cls: Any) -> Any:
    return object.__new__(_for_4bit(cls))


def extend_tuners(model: nn.Module) -> None:
    """Gives the tuners of PEFT in ``model`` the methods of ``Tuner4bit``."""
    for module in model.modules():
        if isinstance(module, BaseTuner) and not isinstance(module, Tuner4bit):
            kind: Any = type(module)
            module.__class__ = _for_4bit(kind)


def _refuse_4bit_copies(model: nn.Module, names: Any) -> None:
    """Raises a ValueError if a module that would be copied and trained in full is 4-bit."""
    for name, module in model.named_modules():
        if name.endswith(tuple(names or ())) and is_4bit(module):
            raise ValueError(
                f"modules_to_save: {type(module).__name__}({module.extra_repr()}) is 4-bit; to train it, leave it "
                "dense: name it in QLoRAConfig(skip_modules=[...]) or quantize_model(skip=...)"
            )


@extend("peft.tuners.tuners_utils:BaseTuner.inject_adapter")
def _inject_adapter(original: Any, self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    _refuse_4bit_copies(model, getattr(self.peft_config[adapter_name], "modules_to_save", None))
    extend_tuners(self)
    original(self, model, adapter_name, *args, **kwargs)
    for module in model.modules():  # what is trained in full keeps no 16 bits
        if isinstance(module, ModulesToSaveWrapper):
            widen(module.modules_to_save)
        elif isinstance(module, TrainableTokensLayer):
            widen(module.get_base_layer())
