"""PEFT's LoRA on the weights of an ``Experts4bit`` (``target_parameters``), fused; dropout where PEFT has none."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from ...nn import Experts4bit, ExpertsLora
from .linear import active_dropout, fold_scaling
from .merge import Over4bit


def without_dropout(config: Any) -> Any:
    """A LoRA configuration that PEFT takes for a parameter, on which it refuses dropout."""
    config = copy.copy(config)
    config.lora_dropout = 0.0
    return config


class LoraExperts4bit(Over4bit, ParamWrapper):
    """PEFT's LoRA on one of the stacked weights of an ``Experts4bit``, fused.

    To an expert it adds scaling · dropout(x) · A[e]ᵀ · B[e]ᵀ. As PEFT's own, one wraps the other where several
    weights have adapters. Several active adapters run as one of their ranks together. Unlike PEFT's own, it takes
    ``lora_dropout``: x is at hand here.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, *args, config=without_dropout(config), **kwargs)
        self.set_dropout(adapter_name, config.lora_dropout)

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, config=without_dropout(config), **kwargs)
        self.set_dropout(adapter_name, config.lora_dropout)

    def set_dropout(self, adapter_name: str, p: float) -> None:
        """Gives an adapter its dropout on x, 0 to 1."""
        dropout = nn.Dropout(p) if p > 0.0 else nn.Identity()
        self.lora_dropout[adapter_name] = dropout.train(self.training)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        self.num_experts, first, second = self.layer4bit.dense_shape(self.parameter_name)
        self._param_ndim = 3
        return first, second

    @property
    def layer4bit(self) -> Experts4bit:
        layer: Experts4bit = self.get_base_layer()
        return layer

    @property
    def weight(self) -> Tensor:
        """The packed weight: PEFT asks it for its device."""
        packed: Tensor = self.get_param()
        return packed

    def factors(self, adapter: str) -> tuple[Tensor, Tensor, float | Tensor]:
        """A [E, R, K] and B [E, N, R] of every expert, and the scaling."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        a = a.reshape(self.num_experts, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1)
        if self._did_swap_in_out_features == self.layer4bit.is_transposed:  # PEFT < 0.20: A is over the outputs
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        return a, b, self.scaling[adapter]

    def _active_lora(self) -> ExpertsLora | None:
        """The active adapters of this weight as one, or None."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            return None
        dropout = {active_dropout(self.lora_dropout[name]) for name in names}
        if len(dropout) > 1:
            raise ValueError(
                f"lora_dropout: expected one probability for the adapters of {self.parameter_name} that are active "
                f"together, got {sorted(dropout)}"
            )
        factors = [self.factors(name) for name in names]
        if len(factors) > 1:
            a = torch.cat([a for a, _, _ in factors], dim=1)
            b = torch.cat([b * scaling for _, b, scaling in factors], dim=2)
            factors = [(a, b, 1.0)]
        a, b, scaling = factors[0]
        return ExpertsLora(a, *fold_scaling(b, scaling), dropout.pop())

    def forward(self, x: Tensor, *args: Any, lora: Mapping[str, ExpertsLora] | None = None, **kwargs: Any) -> Tensor:
        """What PEFT's own does, but that adapters go down to the experts as an argument, ``lora``.

        PEFT exchanges the weight of the experts for the time of the call, which another thread would see.
        """
        self._check_forward_args(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        own = self._active_lora()
        if own is not None:
            lora = {**(lora or {}), self.parameter_name: own}
        y: Tensor = self.base_layer(x, *args, **kwargs, **({"lora": lora} if lora else {}))
        return y

    def get_delta_weight(self, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        a, b, scaling = self.factors(adapter)
        delta = (b.detach().float() @ a.detach().float()) * scaling
        return delta.transpose(1, 2) if self.layer4bit.is_transposed else delta

    def decoded(self) -> Tensor:
        return self.layer4bit.dequantize(self.parameter_name, torch.float32)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The experts without adapters: 4-bit as they were or, merged, dense in the dtype of the quantized weights."""
        experts = self.layer4bit
        weights: dict[str, Tensor] = {}
        wrapper: Any = self
        while merge and isinstance(wrapper, LoraExperts4bit):
            merged = wrapper.take_merged(safe_merge, adapter_names)
            if merged is not None:
                weights[wrapper.parameter_name] = merged[0]
            wrapper = wrapper.base_layer
        return experts.to_experts(weights=weights) if weights else experts

    def to_dense(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return self.layer4bit.to_experts(weights={self.parameter_name: weight})


LoraExperts4bit.__name__ = "ParamWrapper"  # by which PEFT finds the wrapper that a second adapter belongs to


def set_dropout(model: Any, adapter: str, p: float) -> None:
    """Gives an adapter of a PEFT model its dropout, 0 to 1, wherever LoRA over a 4-bit base can have it.

    Example:
        >>> from qlora_ext.integrations.peft import set_dropout
        >>> set_dropout(model, "default", 0.1)
    """
    model.peft_config[adapter].lora_dropout = p
    for layer in model.modules():
        if isinstance(layer, LoraExperts4bit) and adapter in layer.lora_dropout:
            layer.set_dropout(adapter, p)
        elif isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper) and adapter in layer.lora_dropout:
            layer.lora_dropout[adapter] = nn.Dropout(p).train(layer.training)
