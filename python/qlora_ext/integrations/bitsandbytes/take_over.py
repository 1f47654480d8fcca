"""``BitsAndBytesConfig`` with NF4 loads our layers, once this module is imported."""

from __future__ import annotations

import os
import sys
from typing import Any

from transformers import BitsAndBytesConfig
from transformers.quantizers import auto

from ...nn import layers_of
from .quantizer import BitsandbytesQuantizer

_KIND = "bitsandbytes_4bit"
_theirs = auto.AUTO_QUANTIZER_MAPPING[_KIND]


class _SayingHowMany(BitsandbytesQuantizer):
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one of the processes that share the machine speaks for all
            count = sum(1 for _ in layers_of(model))
            print(f"qlora_ext: {count} linear layers in NF4 in the place of bitsandbytes'", file=sys.stderr, flush=True)
        return model


def _quantizer(quantization_config: BitsAndBytesConfig, **options: Any) -> Any:
    """The quantizer for a 4-bit configuration of bitsandbytes': ours for NF4, theirs for FP4."""
    is_nf4 = quantization_config.load_in_4bit and quantization_config.bnb_4bit_quant_type == "nf4"
    return (_SayingHowMany if is_nf4 else _theirs)(quantization_config, **options)


auto.AUTO_QUANTIZER_MAPPING[_KIND] = _quantizer
