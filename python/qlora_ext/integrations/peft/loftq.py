"""LoftQ (Li et al., 2023) on a model that is already 4-bit: adapters that approximate the quantization error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.utils.loftq_utils import _SafetensorLoader
from torch import nn

from ..._internal.svd import low_rank_approximation
from .._patches import extend
from ..transformers import Conv1D4bit
from .linear import LoraLinear4bit


@torch.no_grad()
def replace_lora_weights(
    peft_model: Any,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """``peft.replace_lora_weights_loftq`` for our layers: scaling · B · A approximates W - dequantize(Q(W)).

    Args:
        peft_model: a PEFT model with LoRA on 4-bit layers.
        model_path: the safetensors file, or index, of the dense weights; the default is the path in the model's
            configuration.
        adapter_name: the adapter whose weights are replaced.
        callback: called with the model and the name of each layer after its replacement. If it returns False, the layer
            gets its old adapter back.

    Raises:
        ValueError: a layer's dense weight has another shape than the 4-bit one.
    """
    dense_weights = _SafetensorLoader(peft_model, model_path)
    for path, layer in peft_model.named_modules():
        if not isinstance(layer, LoraLinear4bit) or adapter_name not in layer.lora_A:
            continue
        name = path.removeprefix("base_model.model.")
        decoded = layer.layer4bit.dequantize(torch.float32)
        w = dense_weights.get_tensor(f"{name}.weight").to(decoded)
        if isinstance(layer.layer4bit, Conv1D4bit):
            w = w.T
        if w.shape != decoded.shape:
            raise ValueError(f"{name}: expected a dense weight {list(decoded.shape)}, got {list(w.shape)}")
        a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        before = a.detach().clone(), b.detach().clone()
        new_a, new_b = low_rank_approximation(w - decoded, layer.r[adapter_name])
        a.copy_(new_a)
        b.copy_(new_b / layer.scaling[adapter_name])
        if callback is not None and not callback(peft_model, name):
            a.copy_(before[0])
            b.copy_(before[1])


@extend("peft.utils.loftq_utils:replace_lora_weights_loftq")
def _replace_lora_weights_loftq(original: Any, peft_model: Any, *args: Any, **kwargs: Any) -> Any:
    if any(isinstance(m, LoraLinear4bit) for m in peft_model.modules()):
        return replace_lora_weights(peft_model, *args, **kwargs)
    return original(peft_model, *args, **kwargs)
