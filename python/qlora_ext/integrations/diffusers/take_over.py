"""Importing this module makes diffusers' ``BitsAndBytesConfig`` with NF4 load our layers."""

from __future__ import annotations

from diffusers.quantizers import auto

from ...formats import NF4
from ..bitsandbytes.quantizer import take_over
from .bitsandbytes import DiffusersBitsandbytesQuantizer

_quantizer = take_over(auto.AUTO_QUANTIZER_MAPPING, DiffusersBitsandbytesQuantizer, (NF4,))
