"""Prepares a trained model for inference."""

from __future__ import annotations

from typing import Any

import torch


def as_matrix(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A hook of an output head, which gives its input the strides of a matrix."""
    return inputs[0].flatten(0, -2).unflatten(0, inputs[0].shape[:-1]), *inputs[1:]


def prepare_to_answer(model: Any) -> Any:
    """Prepares ``model``, with or without an adapter, for inference.

    Fused adapters are cast once to the dtype to which each call would cast them. A dense output head gets the last
    token of a prompt with the strides of a matrix. With the strides of a slice, torch uses a batched matmul that copies
    the head, which takes longer than all layers for a short prompt.

    Returns:
        ``model``, changed in place: in evaluation mode, and without gradients.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> model = qlora_ext.quantize_model(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128)))
        >>> qlora_app.decoding.prepare_to_answer(model).training
        False
    """
    from qlora_ext.integrations.peft import cast_fused

    model.eval().requires_grad_(False)
    cast_fused(model)
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear:
        head.register_forward_pre_hook(as_matrix)
    return model
