"""Initializes PEFT adapters with the values that ``quantize_model(init_lora=...)`` computed."""

from __future__ import annotations

from typing import Any

import torch

from ...calibration import initial_lora_of
from .linear import LoraLinear4bit


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
    for path, layer in peft_model.named_modules():
        if not isinstance(layer, LoraLinear4bit) or adapter_name not in layer.lora_A:
            continue
        name, rank = path.removeprefix("base_model.model."), layer.r[adapter_name]
        if name not in found:
            raise ValueError(f"{name}: expected a layer that quantize_model quantized, got one that was already 4-bit")
        a, b = found[name]
        if rank > len(a):
            raise ValueError(
                f"{name}: expected an adapter of rank {len(a)} or less, the rank of the initial values, got {rank}"
            )
        layer.lora_A[adapter_name].weight.copy_(a[:rank])
        layer.lora_B[adapter_name].weight.copy_(b[:, :rank] / layer.scaling[adapter_name])
