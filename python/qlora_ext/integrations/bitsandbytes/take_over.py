"""Importing this module makes transformers' ``BitsAndBytesConfig`` load our layers, for NF4 and stored FP4."""

from __future__ import annotations

from typing import Any

from transformers import BitsAndBytesConfig
from transformers.quantizers import auto

from ...bitsandbytes_format import CODES
from ...formats import NF4
from .quantizer import BitsandbytesQuantizer

_KIND = "bitsandbytes_4bit"
_theirs = auto.AUTO_QUANTIZER_MAPPING[_KIND]


def _quantizer(quantization_config: BitsAndBytesConfig, **options: Any) -> Any:
    """The quantizer for a 4-bit configuration of bitsandbytes: ours for NF4 and for checkpoints in FP4.

    bitsandbytes quantizes dense weights to FP4 itself, because its encoder does not choose the nearest values.
    """
    codes = CODES if options.get("pre_quantized", True) else (NF4,)
    is_ours = quantization_config.load_in_4bit and quantization_config.bnb_4bit_quant_type in codes
    return (BitsandbytesQuantizer if is_ours else _theirs)(quantization_config, **options)


auto.AUTO_QUANTIZER_MAPPING[_KIND] = _quantizer
