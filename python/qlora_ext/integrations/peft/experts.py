"""PEFT's LoRA on the weights of an ``Experts4bit`` (``target_parameters``), fused, and with dropout."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from ...merging.layers import Over4bit
from ...merging.merge_aware import MergeAware, fold_scaling
from ...nn import Experts4bit, ExpertsLora
from .call_cache import samples_of_call
from .linear import active_dropout
from .operands import added, by_sample
from .stacks import Adapter, StacksAdapters


def without_dropout(config: Any) -> Any:
    """A copy of a LoRA configuration without dropout, which PEFT rejects on parameters."""
    config = copy.copy(config)
    config.lora_dropout = 0.0
    return config


class LoraExperts4bit(StacksAdapters, MergeAware, Over4bit, ParamWrapper):
    """PEFT's LoRA on one of the stacked weights of an ``Experts4bit``, fused.

    It adds scaling · dropout(x) · A[e]ᵀ · B[e]ᵀ to expert e. As in PEFT, the layers wrap each other if several weights
    have adapters. Several active adapters run as one adapter whose rank is the sum of theirs. Unlike PEFT's layer, it
    supports ``lora_dropout``, because it has access to x, and on the CPU adapters per sample (``adapter_names``).
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, *args, config=without_dropout(config), **kwargs)
        self.set_dropout(adapter_name, config.lora_dropout)

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, config=without_dropout(config), **kwargs)
        self.set_dropout(adapter_name, config.lora_dropout)

    def set_dropout(self, adapter_name: str, p: float) -> None:
        """Sets the probability of dropout on x for an adapter, 0 to 1."""
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
        """The packed weight, of which PEFT reads the device."""
        packed: Tensor = self.get_param()
        return packed

    def factors(self, adapter: str) -> tuple[Tensor, Tensor, float | Tensor]:
        """A [E, R, K], B [E, N, R] and the scaling of an adapter."""
        return *expert_factors(self, adapter), self.scaling[adapter]

    def plain_adapters(self, names: Iterable[str]) -> list[Adapter]:
        """Those of the adapters ``names`` that this weight has, without dropout, which all share (``_dropout_of``)."""
        return [Adapter(name, *self.factors(name), 0.0) for name in names if name in self.lora_A]

    def _dropout_of(self, names: Iterable[str]) -> float:
        """The probability of dropout of adapters that run together."""
        dropout = {active_dropout(self.lora_dropout[name]) for name in names if name in self.lora_A}
        if len(dropout) > 1:
            raise ValueError(
                f"lora_dropout: expected one probability for the adapters of {self.parameter_name} that are active "
                f"together, got {sorted(dropout)}"
            )
        return max(dropout, default=0.0)

    def _active_lora(self, x: Tensor) -> ExpertsLora | None:
        """The active adapters of this weight, combined into one; None if there are none."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            return None
        if self.merge_aware.intersection(names):
            return self._merged_lora(names)
        return self._fused_lora(added(self, x, self.plain_adapters(names)), names)

    def _lora_by_sample(self, x: Tensor, names: Sequence[str]) -> ExpertsLora | None:
        """The adapters ``names`` of the samples whose tokens are x; None if no sample has an adapter of this weight."""
        samples = samples_of_call(self, x)
        LoraLayer._check_forward_args(self, samples, adapter_names=names)
        self.refuse_merge_aware(names)
        if self.disable_adapters:
            return None
        return self._fused_lora(by_sample(self, samples, names), {*names})

    def _fused_lora(self, operands: tuple[Any, ...] | None, names: Iterable[str]) -> ExpertsLora | None:
        """The operands that ``added`` or ``by_sample`` gives, with dropout."""
        if not operands:
            return None
        a, b, scaling, *others = operands
        adapter_of_row = others[1] if len(others) > 1 else None
        return ExpertsLora(a, b, scaling, self._dropout_of(names), adapter_of_row=adapter_of_row)

    def _merged_lora(self, names: list[str]) -> ExpertsLora:
        if len(names) > 1:
            raise ValueError(f"adapters: merge-aware LoRA runs as the only active adapter, got {', '.join(names)}")
        if (dropout_p := active_dropout(self.lora_dropout[names[0]])) > 0.0:
            raise ValueError(f"lora_dropout: expected 0, because a merged adapter has no dropout, got {dropout_p}")
        a, b, scaling = self.factors(names[0])
        return ExpertsLora(a, *fold_scaling(b, scaling), merged=self.merged_for(names[0]))

    def forward(self, x: Tensor, *args: Any, lora: Mapping[str, ExpertsLora] | None = None, **kwargs: Any) -> Tensor:
        """Like PEFT's own, but passes adapters down to the experts as the argument ``lora``.

        PEFT replaces the weight of the experts during the call instead, which other threads would see.
        """
        names = kwargs.pop("adapter_names", None)
        own = self._active_lora(x) if names is None else self._lora_by_sample(x, names)
        if self.disable_adapters and self.merged:
            self.unmerge()
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
        """The experts without adapters: the 4-bit module, or if merged, dense in the dtype of the weights."""
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


def expert_factors(layer: ParamWrapper, adapter: str) -> tuple[Tensor, Tensor]:
    """Views of A [E, R, K] and B [E, N, R] of an adapter on experts, 4-bit or dense."""
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    a = a.reshape(layer.num_experts, -1, a.shape[-1])
    b = b.reshape(b.shape[0], -1, layer.num_experts).permute(2, 0, 1)
    is_transposed = getattr(layer.get_base_layer(), "is_transposed", False)
    if layer._did_swap_in_out_features == is_transposed:  # PEFT < 0.20: A is over the outputs
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return a, b


LoraExperts4bit.__name__ = "ParamWrapper"  # PEFT finds the wrapper for a second adapter by this name


def set_dropout(model: Any, adapter: str, p: float) -> None:
    """Sets the dropout of an adapter, 0 to 1, in all layers of a PEFT model that support it.

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
