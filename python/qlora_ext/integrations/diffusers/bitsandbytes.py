"""``DiffusersBitsandbytesQuantizer``: loads our layers for bitsandbytes' configuration in diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.quantization_config import BitsAndBytesConfig
from torch import nn

from ...nn import layers_of
from ..bitsandbytes.quantizer import announce, stand_in_all
from ..transformers import QLoRAConfig
from .models import attach, saved_config
from .quantizer import DiffusersQLoRAQuantizer


class DiffusersBitsandbytesQuantizer(DiffusersQLoRAQuantizer):
    """Loads our layers instead of exactly those that ``BitsAndBytesConfig`` with NF4 requests from bitsandbytes.

    The model keeps that configuration and ``is_loaded_in_4bit``, and is saved in bitsandbytes' format, so that it also
    loads without qlora_ext.
    """

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(QLoRAConfig.from_bitsandbytes(quantization_config), **kwargs)
        self.quantization_config = quantization_config

    @property
    def follows_bitsandbytes(self) -> bool:
        return True

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        return super().update_torch_dtype(torch_dtype or torch.float16)  # diffusers' own default for bitsandbytes

    def describe(self, model: Any) -> None:
        model.register_to_config(quantization_config=self.quantization_config)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        stand_in_all(model)
        announce(model)
        return model

    def _dequantize(self, model: Any) -> Any:
        model = super()._dequantize(model)
        model.is_loaded_in_4bit = False
        return model


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
