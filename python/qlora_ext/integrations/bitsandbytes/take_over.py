"""Importing this module makes transformers' ``BitsAndBytesConfig`` load our layers, for NF4 and stored FP4."""

from __future__ import annotations

from transformers.quantizers import auto

from ...bitsandbytes_format import CODES
from .quantizer import BitsandbytesQuantizer, take_over

_quantizer = take_over(auto.AUTO_QUANTIZER_MAPPING, BitsandbytesQuantizer, CODES)
