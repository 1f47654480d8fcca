"""Importing this module makes diffusers' ``BitsAndBytesConfig`` with NF4 load our layers."""

from __future__ import annotations

from typing import Any

from diffusers.quantizers import auto

from .bitsandbytes import DiffusersBitsandbytesQuantizer

_KIND = "bitsandbytes_4bit"
_theirs = auto.AUTO_QUANTIZER_MAPPING[_KIND]


def _quantizer(quantization_config: Any, **options: Any) -> Any:
    """The quantizer for a 4-bit configuration of bitsandbytes: ours for NF4, theirs for FP4."""
    is_nf4 = quantization_config.load_in_4bit and quantization_config.bnb_4bit_quant_type == "nf4"
    return (DiffusersBitsandbytesQuantizer if is_nf4 else _theirs)(quantization_config, **options)


auto.AUTO_QUANTIZER_MAPPING[_KIND] = _quantizer
