"""Makes ``from_pretrained`` read checkpoints whose ``quantization_config`` transformers does not know or find."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from .._patches import extend
from .config import METHOD, QLoRAConfig
from .quantizer import ORIGINAL
from .stored_config import find_config


@extend("transformers.modeling_utils:get_hf_quantizer")
def get_hf_quantizer(original: Any, config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
    saved = getattr(config, "quantization_config", None)
    if isinstance(quantization_config, QLoRAConfig) and kwargs.get("gguf_file") is None:
        saved = find_config(config)
        if saved is not None:
            config.quantization_config = saved
    known = not isinstance(saved, dict) or saved.get("quant_method", METHOD) in AUTO_QUANTIZATION_CONFIG_MAPPING
    if isinstance(quantization_config, QLoRAConfig) and not known:
        config.quantization_config = {"quant_method": METHOD, ORIGINAL: saved}
    return original(config, quantization_config, *args, **kwargs)
