"""LoRA files of pipelines: gives diffusers the dense shapes of 4-bit layers, with which it compares the files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...nn import Linear4bit
from .._patches import extend


@extend("diffusers.loaders.lora_pipeline:FluxLoraLoaderMixin._calculate_module_shape")
def _calculate_module_shape(
    original: Any, model: nn.Module, base_module: Any = None, base_weight_param_name: str | None = None
) -> torch.Size:
    layer = base_module
    if layer is None and base_weight_param_name is not None:
        layer = dict(model.named_modules()).get(base_weight_param_name.removesuffix(".weight"))
    if isinstance(layer, Linear4bit):
        return torch.Size((layer.out_features, layer.in_features))
    shape: torch.Size = original(model, base_module, base_weight_param_name)
    return shape


@extend("diffusers.loaders.lora_pipeline:_maybe_dequantize_weight_for_expanded_lora")
def _maybe_dequantize_weight_for_expanded_lora(original: Any, model: Any, module: nn.Module) -> Tensor:
    weight: Tensor = module.dequantize(model.dtype) if isinstance(module, Linear4bit) else original(model, module)
    return weight
