"""PEFT's configuration of a new LoRA adapter, shared by training and by the memory planner."""

from __future__ import annotations

from typing import Any


def lora_config(model: Any, rank: int, targets: str | list[str], modules_to_save: list[str], **more: Any) -> Any:
    """The configuration of a new adapter on ``model``.

    Args:
        targets: PEFT's ``target_modules``.
        modules_to_save: the names of the modules that are trained in full.
        more: further fields of the configuration.
    """
    from peft import LoraConfig

    if modules_to_save:
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        tied = head is not None and getattr(head, "weight", None) is getattr(embeddings, "weight", head)
        more |= {"modules_to_save": modules_to_save, "ensure_weight_tying": tied}
    return LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=targets, **more)
