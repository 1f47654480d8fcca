"""Saves a 4-bit transformers model in bitsandbytes' format."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedModel

from ...nn import Linear4bit
from .quantizer import BitsandbytesQuantizer, bitsandbytes_config


def save_pretrained(model: Any, directory: str | os.PathLike[str], **options: Any) -> None:
    """Saves a 4-bit transformers model in bitsandbytes' format: it then loads with bitsandbytes (>= 0.50) alone.

    Args:
        model: a ``PreTrainedModel`` with ``Linear4bit`` layers, as made by ``QLoRAConfig`` or ``quantize_model``.
        directory: the output directory.
        options: passed to ``model.save_pretrained``.

    Raises:
        TypeError: ``model`` is not such a model. ValueError: it has a 4-bit layer of a kind that bitsandbytes lacks.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> model = qlora_ext.quantize_model(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128)))
        >>> from qlora_ext.integrations.bitsandbytes import save_pretrained
        >>> save_pretrained(model, tempfile.mkdtemp())  # bitsandbytes loads this directory
    """
    if not isinstance(model, PreTrainedModel) or not any(isinstance(m, Linear4bit) for m in model.modules()):
        raise TypeError(f"model: expected a transformers model with 4-bit layers, got {type(model).__name__}")
    quantizer, config = model.hf_quantizer, model.config.quantization_config
    model.config.quantization_config = bitsandbytes_config(model)
    model.hf_quantizer = BitsandbytesQuantizer(model.config.quantization_config)
    try:
        model.save_pretrained(directory, **options)
    finally:
        model.hf_quantizer, model.config.quantization_config = quantizer, config
