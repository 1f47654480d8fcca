"""Makes ``from_pretrained`` read what transformers does not give to our quantizer.

These are checkpoints whose ``quantization_config`` transformers does not know or find, and GGUF files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from .._patches import extend
from .config import METHOD, QLoRAConfig
from .quantizer import ORIGINAL
from .source import Source
from .stored_config import check_index, find_config

# Makes the source of a GGUF file, which is in ``qlora_ext.gguf``, for a configuration.
GGUF_SOURCES: list[Callable[[QLoRAConfig], Source]] = []


@extend("transformers.modeling_utils:get_hf_quantizer")
def get_hf_quantizer(original: Any, config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(quantization_config, QLoRAConfig):
        return original(config, quantization_config, *args, **kwargs)
    saved = getattr(config, "quantization_config", None)
    if kwargs.get("gguf_file") is None:
        check_index(config)
        saved = find_config(config)
        if saved is not None:
            config.quantization_config = saved
    if isinstance(saved, dict) and saved.get("quant_method", METHOD) not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        config.quantization_config = {"quant_method": METHOD, ORIGINAL: saved}
    if kwargs.pop("gguf_file", None) is not None:  # the original accepts only its own quantizer for a GGUF file
        quantization_config = copy.copy(quantization_config)
        quantization_config._source = GGUF_SOURCES[0](quantization_config)
    return original(config, quantization_config, *args, **kwargs)
