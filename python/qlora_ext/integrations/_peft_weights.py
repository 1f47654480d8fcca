"""PEFT's LoRA on the weights of an ``Experts4bit`` (``target_parameters``), fused, and over an ``Embedding4bit``."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import Embedding as DenseLoraEmbedding
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..nn import Embedding4bit, Experts4bit, Packed4bit
from ..weight import NF4Weight


class MergesAnew(abc.ABC):
    """Put before a PEFT layer class: merging quantizes the sum of a 4-bit weight and its adapters anew."""

    merged_adapters: list[str]
    parameter_name = "weight"
    # What merge found.
    _unmerged: NF4Weight | None = None

    @property
    def layer4bit(self) -> Packed4bit:
        layer: Packed4bit = self.get_base_layer()  # type: ignore[attr-defined]
        return layer

    @abc.abstractmethod
    def decoded(self) -> Tensor:
        """The decoded weight in float32, in the dense weight's shape."""

    def merged_weight(self, names: list[str], safe_merge: bool = False) -> Tensor:
        """``decoded`` with the named adapters merged into it."""
        weight = self.decoded()
        for name in names:
            weight += self.get_delta_weight(name).to(weight)  # type: ignore[attr-defined]
            if safe_merge and not weight.isfinite().all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        self.merged_adapters.extend(names)
        return weight

    def requantize(self, weight: Tensor) -> None:
        """Makes ``weight`` the 4-bit weight, in the form that it has."""
        layer = self.layer4bit
        w4 = layer.quantize(weight)
        layer.set_packed(self.parameter_name, dataclasses.replace(w4, dtype=layer.weight_dtype))

    def _adapters_to_merge(self, adapter_names: list[str] | None) -> list[str]:
        names = check_adapters_to_merge(self, adapter_names)
        return [name for name in names if name in self.adapters()]

    @abc.abstractmethod
    def adapters(self) -> Any:
        """The adapters of this layer by name."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the 4-bit weight, which is quantized anew; ``unmerge`` gives back the old bits."""
        names = self._adapters_to_merge(adapter_names)
        if not names:
            return
        names = [*self.merged_adapters, *names]
        if self.merged_adapters:
            self.unmerge()
        kept = self.layer4bit.packed_weight(self.parameter_name)
        self.requantize(self.merged_weight(names, safe_merge))
        self._unmerged = kept

    def unmerge(self) -> None:
        if not self.merged_adapters or self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        device = getattr(self.layer4bit, self.parameter_name).device
        self.layer4bit.set_packed(self.parameter_name, self._unmerged.to(device))
        self._unmerged = None
        self.merged_adapters.clear()

    def take_merged(self, safe_merge: bool, adapter_names: list[str] | None) -> Tensor | None:
        """``merged_weight`` of the adapters merged already and those to merge, None where there are none; unmerges."""
        names = list(self.merged_adapters)
        if self.merged_adapters:
            self.unmerge()
        names += [name for name in self._adapters_to_merge(adapter_names) if name not in names]
        return self.merged_weight(names, safe_merge) if names else None


class LoraExperts4bit(MergesAnew, ParamWrapper):
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

    def adapters(self) -> Any:
        return self.lora_A

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
            weight = wrapper.take_merged(safe_merge, adapter_names)
            if weight is not None:
                weights[wrapper.parameter_name] = weight
            wrapper = wrapper.base_layer
        return experts.to_experts(weights=weights) if weights else experts


LoraExperts4bit.__name__ = "ParamWrapper"  # by which PEFT finds the wrapper that a second adapter belongs to


class LoraEmbedding4bit(MergesAnew, DenseLoraEmbedding):
    """PEFT's LoRA over an ``Embedding4bit``, by PEFT's own code but for what writes to the table."""

    @property
    def layer4bit(self) -> Embedding4bit:
        layer: Embedding4bit = self.get_base_layer()
        return layer

    def adapters(self) -> Any:
        return self.lora_embedding_A

    def decoded(self) -> Tensor:
        return self.layer4bit.dequantize(torch.float32)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The embedding without adapters: 4-bit as it was or, merged, dense in the dtype of the quantized table."""
        weight = self.take_merged(safe_merge, adapter_names) if merge else None
        return self.layer4bit if weight is None else self.layer4bit.to_embedding(weight=weight)


def create_over_weights(target: nn.Module, name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """PEFT's layer over ``target`` where that is 4-bit experts or a 4-bit embedding, adapted already or not."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, Experts4bit) and kwargs.get("parameter_name") is not None:
        return LoraExperts4bit(target, name, config=config, **kwargs)
    if isinstance(target, Embedding4bit) and kwargs.get("parameter_name") is None:
        if config.use_dora or (isinstance(config.init_lora_weights, str) and config.init_lora_weights != "gaussian"):
            raise ValueError(
                "target_modules: a 4-bit embedding takes plain LoRA, got "
                f"use_dora={config.use_dora}, init_lora_weights={config.init_lora_weights!r}"
            )
        return LoraEmbedding4bit(target, name, config=config, **kwargs)
    return None
