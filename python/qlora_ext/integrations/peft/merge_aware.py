"""Merge-aware training: the forward uses the codes that merging will give, so the merge loses nothing."""

from __future__ import annotations

from typing import Any

from .experts import LoraExperts4bit
from .linear import LoraLinear4bit


def set_merge_aware(peft_model: Any, aware: bool = True, adapter_name: str = "default") -> None:
    """Makes an adapter run, and train, with the 4-bit weights that ``merge_to_4bit`` will compute.

    The layers' outputs are bit for bit those of the merged model. Gradients ignore the rounding (straight-through
    estimator). Each step additionally decodes and encodes every weight, and keeps another half a byte per weight from
    the forward to the backward pass (none with checkpointing). ``save_pretrained`` records the setting next to the
    adapter, and loading the adapter restores it.

    Args:
        aware: False ends merge-aware training.
        adapter_name: the adapter.

    Raises:
        ValueError: the adapter has dropout, which merged weights cannot have; it is on experts, or on no 4-bit layer;
            or it is not plain LoRA.

    Example:
        >>> from qlora_ext.integrations.peft import set_merge_aware
        >>> set_merge_aware(model)
    """
    layers = [m for m in peft_model.modules() if isinstance(m, LoraLinear4bit) and adapter_name in m.lora_A]
    if not layers:
        raise ValueError(f"adapter_name: expected an adapter on 4-bit linear layers, got {adapter_name!r}")
    if aware:
        if any(isinstance(m, LoraExperts4bit) and adapter_name in m.lora_A for m in peft_model.modules()):
            raise ValueError("peft_model: expected LoRA on linear layers only, got some on experts' stacked weights")
        config = peft_model.peft_config[adapter_name]
        if config.lora_dropout > 0.0:
            raise ValueError(
                f"lora_dropout: expected 0, because a merged adapter has no dropout, got {config.lora_dropout}"
            )
        if any(adapter_name in m.lora_variant for m in layers):
            raise ValueError(f"adapter_name: expected plain LoRA, got {adapter_name!r}, which is a variant of LoRA")
    for layer in layers:
        layer.merge_aware = layer.merge_aware | {adapter_name} if aware else layer.merge_aware - {adapter_name}


def is_merge_aware(peft_model: Any, adapter_name: str = "default") -> bool:
    """Whether ``set_merge_aware`` was called for the adapter."""
    return any(isinstance(m, LoraLinear4bit) and adapter_name in m.merge_aware for m in peft_model.modules())
