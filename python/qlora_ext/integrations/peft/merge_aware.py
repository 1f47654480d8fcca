"""Merge-aware training: the forward uses the codes of the merged or exported model, so these lose nothing."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import LoraLayer

from .experts import LoraExperts4bit
from .linear import LoraLinear4bit
from .served import Served, is_in, serve_in


def _layers(peft_model: Any, adapter_name: str) -> list[LoraLayer]:
    return [m for m in peft_model.modules() if isinstance(m, LoraLayer) and adapter_name in m.lora_A]


def set_merge_aware(
    peft_model: Any, aware: bool = True, adapter_name: str = "default", code: str | None = None
) -> None:
    """Makes an adapter run, and train, with the 4-bit weights of the merged or exported model.

    The layers' outputs are bit for bit those of that model. Gradients ignore the rounding (straight-through estimator).
    Each step additionally decodes and encodes every weight, and keeps another half a byte per weight, on the CPU until
    the adapter has changed. ``save_pretrained`` records the setting next to the adapter, and loading the adapter
    restores it.

    Args:
        aware: False ends merge-aware training. A base that ``code`` has changed stays in that format.
        adapter_name: the adapter.
        code: the format in which the model will be served: ``"q4_0"``, ``"iq4_nl"``, ``"int4"``, ``"nvfp4"``,
            ``"mxfp4"`` or ``"nf4"``. The base is encoded in it, in memory: its 4-bit layers, and the linear ones with
            an adapter. Layers whose rows are no multiple of the format's blocks stay as they are. None keeps the
            format of each 4-bit layer, as ``merge_to_4bit`` does. Call this before ``fully_shard``.

    Raises:
        ValueError: the adapter has dropout, which merged weights cannot have; it is on no 4-bit layer, or is not plain
            LoRA; or the base cannot be encoded in that format.

    Example:
        >>> from qlora_ext.integrations.peft import set_merge_aware
        >>> set_merge_aware(model)
    """
    if code is not None and aware:
        _check(peft_model, adapter_name)
        serve_in(peft_model, code)
    layers = [m for m in _layers(peft_model, adapter_name) if isinstance(m, LoraLinear4bit | LoraExperts4bit)]
    if not layers:
        raise ValueError(f"adapter_name: expected an adapter on 4-bit layers, got {adapter_name!r}")
    if aware:
        _check(peft_model, adapter_name)
    served = served_in(peft_model)
    for layer in layers:
        fits = served is None or is_in(layer.layer4bit.form, served.code)
        if aware and fits:
            layer.merge_aware = layer.merge_aware | {adapter_name}
        else:
            layer.merge_aware = layer.merge_aware - {adapter_name}


def _check(peft_model: Any, adapter_name: str) -> None:
    """Rejects adapters that cannot be merged exactly."""
    config = peft_model.peft_config.get(adapter_name)
    if config is not None and config.lora_dropout > 0.0:
        raise ValueError(
            f"lora_dropout: expected 0, because a merged adapter has no dropout, got {config.lora_dropout}"
        )
    if any(adapter_name in m.lora_variant for m in _layers(peft_model, adapter_name)):
        raise ValueError(f"adapter_name: expected plain LoRA, got {adapter_name!r}, which is a variant of LoRA")


def served_in(peft_model: Any) -> Served | None:
    """The format in which ``set_merge_aware`` has encoded the base; None if it has not."""
    served: Served | None = getattr(peft_model, "served", None)
    return served


def merge_aware_format(peft_model: Any, adapter_name: str = "default") -> str | bool:
    """The ``code`` for which ``set_merge_aware`` was called for the adapter; True without one, False if it was not."""
    aware = any(
        isinstance(m, LoraLinear4bit | LoraExperts4bit) and adapter_name in m.merge_aware for m in peft_model.modules()
    )
    served = served_in(peft_model)
    return served.code if aware and served is not None else aware
