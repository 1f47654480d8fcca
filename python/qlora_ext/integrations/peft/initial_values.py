"""Initial values of adapters that approximate the quantization error of 4-bit layers.

``initialize_lora`` takes what ``quantize_model(init_lora=...)`` computed. PEFT's own ``replace_lora_weights_loftq``
(LoftQ, Li et al., 2023) computes them for a model that is already 4-bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.utils.loftq_utils import _SafetensorLoader
from torch import nn

from ..._internal.svd import low_rank_approximation
from ...calibration import initial_lora_of
from .._patches import extend
from ..transformers import Conv1D4bit
from .linear import LoraLinear4bit


def _layers(peft_model: Any, adapter_name: str) -> Iterator[tuple[str, LoraLinear4bit]]:
    """The layers that have the adapter, with the names that their bases had before PEFT wrapped the model."""
    for path, layer in peft_model.named_modules():
        if isinstance(layer, LoraLinear4bit) and adapter_name in layer.lora_A:
            yield path.removeprefix("base_model.model."), layer


@torch.no_grad()
def initialize_lora(peft_model: Any, adapter_name: str = "default") -> None:
    """Initializes the adapters on 4-bit linear layers with the values that ``quantize_model(init_lora=...)`` computed.

    The result is an ordinary PEFT adapter. If its rank is lower than that of the initial values, it gets their best
    approximation of that rank.

    Raises:
        ValueError: the model, or one of its layers, has no initial values, or their rank is below the adapter's.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128))
        >>> from peft import LoraConfig, get_peft_model
        >>> from qlora_ext.integrations.peft import initialize_lora
        >>> model = qlora_ext.quantize_model(model, init_lora=qlora_ext.calibration.InitLora("loftq", rank=8))
        >>> model = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"))
        >>> initialize_lora(model)
    """
    found = initial_lora_of(peft_model.get_base_model())
    if not found:
        raise ValueError(
            "peft_model: expected a base from quantize_model(init_lora=...), got one without initial values"
        )
    for name, layer in _layers(peft_model, adapter_name):
        rank = layer.r[adapter_name]
        if name not in found:
            raise ValueError(f"{name}: expected a layer that quantize_model quantized, got one that was already 4-bit")
        a, b = found[name]
        if rank > len(a):
            raise ValueError(
                f"{name}: expected an adapter of rank {len(a)} or less, the rank of the initial values, got {rank}"
            )
        layer.lora_A[adapter_name].weight.copy_(a[:rank])
        layer.lora_B[adapter_name].weight.copy_(b[:, :rank] / layer.scaling[adapter_name])


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
    for name, layer in _layers(peft_model, adapter_name):
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
