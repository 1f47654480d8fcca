"""bitsandbytes: a whole 4-bit model saved in the form in which transformers saves one of bitsandbytes' own."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..nn import CONVERSIONS, SCALES, Linear4bit, TiedLinear4bit, layers_of
from .transformers import QLoRAQuantizer


def _config(model: nn.Module) -> dict[str, Any]:
    """The ``quantization_config`` by which transformers finds which layers are 4-bit, and how they compute."""
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    compute_dtypes = {str(layer.compute_dtype).removeprefix("torch.") for layer in layers}
    if len(compute_dtypes) != 1:
        raise ValueError(f"model: expected 4-bit layers of one compute dtype, got {sorted(compute_dtypes)}")
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": layers[0].double_quant,
        "bnb_4bit_compute_dtype": compute_dtypes.pop(),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [name for name, m in model.named_modules() if type(m) in CONVERSIONS],
    }


def _state(model: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Tensor] = model.state_dict()
    for name, layer in layers_of(model):
        if not isinstance(layer, Linear4bit) or isinstance(layer, TiedLinear4bit):
            raise ValueError(
                f"{name}: expected 4-bit linear layers, which bitsandbytes has; got {type(layer).__name__}"
            )
        for key in ("weight", *SCALES):
            state.pop(f"{name}.{key}", None)
        state |= layer.weight4bit.to_bitsandbytes(f"{name}.weight")
    return state


class _Writer(QLoRAQuantizer):
    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        return _state(model), {}


def save_pretrained(model: Any, directory: str | os.PathLike[str], **options: Any) -> None:
    """Saves a 4-bit transformers model as bitsandbytes' own, which needs bitsandbytes (>= 0.50) and not us to load.

    Args:
        model: a ``PreTrainedModel`` with ``Linear4bit`` layers, as ``QLoRAConfig`` or ``quantize_model`` makes one.
        directory: to write, as with ``model.save_pretrained``, which takes the ``options``.

    Raises:
        TypeError: no such model. ValueError: a 4-bit layer of a kind that bitsandbytes lacks.
    """
    if not isinstance(model, PreTrainedModel) or not any(isinstance(m, Linear4bit) for m in model.modules()):
        raise TypeError(f"model: expected a transformers model with 4-bit layers, got {type(model).__name__}")
    quantizer, config = model.hf_quantizer, model.config.quantization_config
    model.config.quantization_config = _config(model)
    model.hf_quantizer = _Writer(quantizer.quantization_config, pre_quantized=True)
    try:
        model.save_pretrained(directory, **options)
    finally:
        model.hf_quantizer, model.config.quantization_config = quantizer, config
