"""A whole 4-bit model saved in the form in which transformers saves one of bitsandbytes' own."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedModel

from ...nn import Linear4bit
from .quantizer import BitsandbytesQuantizer, bitsandbytes_config


def save_pretrained(model: Any, directory: str | os.PathLike[str], **options: Any) -> None:
    """Saves a 4-bit transformers model as bitsandbytes' own, which needs bitsandbytes (>= 0.50) and not us to load.

    Args:
        model: a ``PreTrainedModel`` with ``Linear4bit`` layers, as ``QLoRAConfig`` or ``quantize_model`` makes one.
        directory: to write, as with ``model.save_pretrained``, which takes the ``options``.

    Raises:
        TypeError: no such model. ValueError: a 4-bit layer of a kind that bitsandbytes lacks.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        >>> model = qlora_ext.quantize_model(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128)))
        >>> from qlora_ext.integrations.bitsandbytes import save_pretrained
        >>> save_pretrained(model, tempfile.mkdtemp())  # a directory that bitsandbytes loads without us
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
