"""``DiffusersBitsandbytesQuantizer``: loads our layers for bitsandbytes' configuration in diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.quantization_config import BitsAndBytesConfig
from torch import nn

from ...nn import layers_of
from ..bitsandbytes.quantizer import LikeBitsandbytes
from ..transformers import QLoRAConfig
from .models import attach, saved_config
from .quantizer import DiffusersQLoRAQuantizer


class DiffusersBitsandbytesQuantizer(LikeBitsandbytes, DiffusersQLoRAQuantizer):
    """The quantizer of diffusers for a ``BitsAndBytesConfig`` with NF4."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(QLoRAConfig.from_bitsandbytes(quantization_config), **kwargs)
        self.quantization_config = quantization_config

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        return super().update_torch_dtype(torch_dtype or torch.float16)  # diffusers' own default for bitsandbytes

    def describe(self, model: Any) -> None:
        model.register_to_config(quantization_config=self.quantization_config)


def keep_diffusers_format(model: nn.Module) -> None:
    """Makes the diffusers models in ``model``, whose layers were adopted, save in bitsandbytes' format."""
    for part in model.modules():
        if not isinstance(part, ModelMixin) or not any(True for _ in layers_of(part)):
            continue
        config = saved_config(part)
        if config.get("quant_method") == "bitsandbytes":
            part.hf_quantizer = DiffusersBitsandbytesQuantizer(BitsAndBytesConfig.from_dict(config))
        else:  # not loaded by diffusers in 4 bits, so it is saved in our format
            attach(part)
