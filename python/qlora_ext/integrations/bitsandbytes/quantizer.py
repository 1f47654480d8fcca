"""``BitsandbytesQuantizer``: loads our layers for bitsandbytes' configuration, and saves bitsandbytes' format."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from ...dtype_names import name_of
from ...formats import NF4
from ...nn import CONVERSIONS, Linear4bit, layers_of
from ..transformers import QLoRAConfig, QLoRAQuantizer, attach
from ..transformers.quantizer import forget_bitsandbytes_keys
from .state import state_dict

_KIND = "bitsandbytes_4bit"  # in the libraries' tables


def bitsandbytes_config(model: nn.Module) -> BitsAndBytesConfig:
    """The configuration that tells transformers which layers of a 4-bit model are 4-bit, and how they compute.

    Raises:
        ValueError: the codes or the compute dtypes of the layers differ, or one replaces a layer that bitsandbytes
            leaves dense.
    """
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit) and layer.dense_class is not nn.Linear:
            raise ValueError(
                f"{name}: expected the 4-bit form of an nn.Linear, which transformers can load as a layer of "
                f"bitsandbytes, got a {layer.dense_class.__name__}; save the model in qlora_ext's own form"
            )
    codes = {layer.form.code for layer in layers}
    if len(codes) != 1:
        raise ValueError(f"model: expected 4-bit layers of one code, got {', '.join(sorted(codes))}")
    compute_dtypes = {name_of(layer.compute_dtype) for layer in layers}
    if len(compute_dtypes) != 1:
        raise ValueError(f"model: expected 4-bit layers of one compute dtype, got {sorted(compute_dtypes)}")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=codes.pop(),
        bnb_4bit_use_double_quant=layers[0].double_quant,
        bnb_4bit_compute_dtype=compute_dtypes.pop(),
        llm_int8_skip_modules=[name for name, m in model.named_modules() if type(m) in CONVERSIONS],
    )


class LikeBitsandbytes:
    """A mixin, placed before one of our quantizers: it loads our layers instead of exactly those of bitsandbytes.

    The model keeps its ``BitsAndBytesConfig`` and ``is_loaded_in_4bit``, and is saved in bitsandbytes' format, so that
    it also loads without qlora_ext.
    """

    quantization_config: Any  # BitsAndBytesConfig
    follows_bitsandbytes = True

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs)  # type: ignore[misc]
        look_like_bitsandbytes(model)
        announce(model)
        return model

    def _dequantize(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        model = super()._dequantize(model, *args, **kwargs)  # type: ignore[misc]
        model.is_loaded_in_4bit = False
        return model


class BitsandbytesQuantizer(LikeBitsandbytes, QLoRAQuantizer):
    """The quantizer of transformers for a ``BitsAndBytesConfig``."""

    def __init__(self, quantization_config: BitsAndBytesConfig, **kwargs: Any) -> None:
        stored = bool(kwargs.get("pre_quantized", True))
        super().__init__(QLoRAConfig.from_bitsandbytes(quantization_config, stored), **kwargs)
        self.quantization_config = quantization_config

    def update_device_map(self, device_map: Any) -> Any:
        device_map = super().update_device_map(device_map)
        return {"": "cpu"} if device_map is None else device_map

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        return state_dict(model, self.quantization_config.bnb_4bit_quant_storage), {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        model = super()._dequantize(model, dtype)
        if is_bitsandbytes_available():
            model = _dequantize_theirs(model, self.quantization_config, dtype)
        return model


def take_over(quantizers: dict[str, Any], ours: Any, stored: Sequence[str]) -> Any:
    """Makes the ``BitsAndBytesConfig`` of a library with this table of quantizers load our layers.

    bitsandbytes quantizes dense weights to FP4 itself, because its encoder does not choose the nearest values.

    Args:
        ours: the quantizer that serves NF4.
        stored: the codes of checkpoints that it serves.
    """
    theirs = quantizers[_KIND]

    def quantizer(quantization_config: Any, **options: Any) -> Any:
        codes = stored if options.get("pre_quantized", True) else (NF4,)
        is_ours = quantization_config.load_in_4bit and quantization_config.bnb_4bit_quant_type in codes
        return (ours if is_ours else theirs)(quantization_config, **options)

    quantizers[_KIND] = quantizer
    return quantizer


def announce(model: nn.Module) -> None:
    """Prints how many layers of ``model`` are ours, in the first process on the machine only."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        codes = [layer.form.code.upper() for _, layer in layers_of(model)]
        kinds = " and ".join(sorted({*codes})) or "NF4"
        print(f"qlora_ext: {len(codes)} linear layers in {kinds} instead of bitsandbytes'", file=sys.stderr, flush=True)


def look_like_bitsandbytes(model: Any) -> None:
    """If bitsandbytes is installed, makes ``model`` and its 4-bit layers look like bitsandbytes'."""
    if not is_bitsandbytes_available():
        return
    from . import conv1d as conv1d
    from .layers import look_like_linear4bit

    for _, layer in layers_of(model):
        assert isinstance(layer, Linear4bit)
        look_like_linear4bit(layer)
    model.is_loaded_in_4bit = True


def _dequantize_theirs(model: Any, config: BitsAndBytesConfig, dtype: torch.dtype | str | None) -> Any:
    """Decodes the layers that were left to bitsandbytes, if there are any."""
    import bitsandbytes as bnb
    from transformers.integrations import dequantize_and_replace

    if not any(isinstance(m, bnb.nn.Linear4bit) for m in model.modules()):
        return model
    return dequantize_and_replace(model, quantization_config=config, dtype=dtype)


def keep_format(model: nn.Module) -> None:
    """Makes the transformers models in ``model``, whose layers were adopted, save in bitsandbytes' format."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or module in inside:
            continue
        inside.update(module.modules())
        config = getattr(module.config, "quantization_config", None)
        if isinstance(config, BitsAndBytesConfig):
            forget_bitsandbytes_keys(module)
            quantizer = BitsandbytesQuantizer(config)
            quantizer.save_packed_state(module)
            module.hf_quantizer = quantizer
        else:  # not loaded by transformers in 4 bits, so it is saved in our format
            attach(module)
