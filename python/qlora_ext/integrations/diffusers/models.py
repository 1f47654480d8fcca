"""Support for diffusers models with 4-bit layers: which layers stay dense, and saving."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ...nn import AFTER_QUANTIZE, DENSE_RULES, DenseModules, activations_of, layers_of
from .._patches import extend
from ..bitsandbytes.state import state_dict
from ..transformers import METHOD, QLoRAConfig
from ..transformers.modules import compute_dtype_of
from .quantizer import DiffusersQLoRAQuantizer, align, forget


def _dense_modules(model: nn.Module) -> DenseModules:
    """The modules that the diffusers models in ``model`` keep in float32."""
    always = []
    for prefix, part in model.named_modules():
        if isinstance(part, ModelMixin) and part._keep_in_fp32_modules:
            float32 = part._keep_in_fp32_modules
            names = {float32} if isinstance(float32, str) else {*float32}
            inside = (name for name, _ in part.named_modules() if name.rpartition(".")[2] in names)
            always += [f"{prefix}.{name}".removeprefix(".") for name in inside]
    return DenseModules([], [], always)


def attach(model: Any) -> None:
    """Enables saving, loading and dequantizing for a diffusers model that ``quantize_model`` has quantized."""
    if not isinstance(model, ModelMixin) or not any(True for _ in layers_of(model)):
        return
    config, compute_dtype = QLoRAConfig(), compute_dtype_of(model)
    if compute_dtype is not None and compute_dtype != model.dtype:
        config.compute_dtype = compute_dtype
    config.activations = activations_of(model)
    quantizer = DiffusersQLoRAQuantizer(config, pre_quantized=True)
    quantizer.describe(model)
    align(model)
    model.hf_quantizer = quantizer
    model.quantization_method = quantizer.config.quant_method


def saved_config(model: Any) -> dict[str, Any]:
    """The fields of the ``quantization_config`` of a diffusers model; {} if it has none."""
    config: Any = getattr(model.config, "quantization_config", None) or {}
    return dict(config.to_dict() if hasattr(config, "to_dict") else config)


@contextlib.contextmanager
def _as_saved(model: Any) -> Iterator[None]:
    """Brings the configuration and the saved state of ``model`` up to date with its current layers.

    Raises:
        ValueError: the saved model could not be loaded.
    """
    config = saved_config(model)
    method = config.get("quant_method")
    if not any(True for _ in layers_of(model)):
        if method == METHOD:
            forget(model)
        yield
        return
    adapted = next((name for name, m in model.named_modules() if hasattr(m, "base_layer")), None)
    if adapted is not None:
        raise ValueError(
            f"{adapted}: expected a 4-bit model without adapters, because diffusers would not find them in the files; "
            "save them with save_lora_adapter() or the pipeline's save_lora_weights(), and unload them first"
        )
    if method == "bitsandbytes":
        state = state_dict(model, getattr(torch, config.get("bnb_4bit_quant_storage", "uint8")))
        vars(model)["state_dict"] = lambda: state
        try:
            yield
        finally:
            del vars(model)["state_dict"]
        return
    if not isinstance(getattr(model, "hf_quantizer", None), DiffusersQLoRAQuantizer):
        attach(model)  # only parts of the model were quantized
    model.hf_quantizer.describe(model)
    yield


@extend("diffusers.quantizers.auto:DiffusersAutoQuantizer.merge_quantization_configs")
def _merge_quantization_configs(original: Any, quantization_config: Any, quantization_config_from_args: Any) -> Any:
    # The original prefers the checkpoint's configuration, and bitsandbytes' would load bitsandbytes' layers.
    ours = quantization_config_from_args
    if not isinstance(ours, QLoRAConfig):
        return original(quantization_config, ours)
    saved = quantization_config if isinstance(quantization_config, Mapping) else quantization_config.to_dict()
    if saved.get("quant_method") == "bitsandbytes":
        config = QLoRAConfig.from_bitsandbytes(saved)
        config.compute_dtype = ours.compute_dtype
    else:
        config = original(quantization_config, ours)
    if isinstance(config, QLoRAConfig):
        config.take_options(ours)
    return config


@extend("diffusers.models.modeling_utils:ModelMixin.save_pretrained")
def _save_pretrained(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    with _as_saved(self):
        return original(self, *args, **kwargs)


DENSE_RULES.append(_dense_modules)
AFTER_QUANTIZE.append(attach)
