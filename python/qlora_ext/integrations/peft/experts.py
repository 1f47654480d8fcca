"""PEFT's LoRA on the weights of an ``Experts4bit`` (``target_parameters``), fused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ...nn import Experts4bit
from .merge import Over4bit


class LoraExperts4bit(Over4bit, ParamWrapper):
    """PEFT's LoRA on one of the stacked weights of an ``Experts4bit``: y += scaling · x · A[e]ᵀ · B[e]ᵀ, fused.

    As PEFT's own, one wraps the other where several weights have adapters. Several active adapters run as one of
    their ranks together.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        self.num_experts, first, second = self.layer4bit.dense_shape(self.parameter_name)
        self._param_ndim = 3
        return first, second

    @property
    def layer4bit(self) -> Experts4bit:
        layer: Experts4bit = self.get_base_layer()
        return layer

    def factors(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        """A [E, R, K] and B [E, N, R] of every expert, and the scaling."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        a = a.reshape(self.num_experts, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1)
        if self._did_swap_in_out_features == self.layer4bit.is_transposed:  # PEFT < 0.20: A is over the outputs
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        return a, b, self.scaling[adapter]

    @contextlib.contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        factors = [self.factors(name) for name in active_adapters if name in self.lora_A]
        if len(factors) > 1:
            a = torch.cat([a for a, _, _ in factors], dim=1)
            b = torch.cat([b * scaling for _, b, scaling in factors], dim=2)
            factors = [(a, b, 1.0)]
        with self.layer4bit.adapted(self.parameter_name, factors[0] if factors else None):
            yield

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
