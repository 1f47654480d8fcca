"""ModelOpt's NVFP4 and FP8.

The tensors of an NVFP4 weight [N, K] are ``weight`` uint8 [N, K/2], E2M1, lo first, ``weight_scale`` float8_e4m3fn
[N, K/16], and ``weight_scale_2`` float32, which multiplies the scales. Those of an FP8 weight are ``weight``
float8_e4m3fn [N, K] and ``weight_scale`` float32, for the weight or for each row. ``input_scale``, and the scales of
cached keys and values, are kept and saved, but activations are not quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..untrusted import check, excerpt
from .e2m1 import NV_BLOCK_SIZE, E2M1Format
from .format import Format, Settings
from .fp8 import FP8Format

_SOURCE = "quantization_config of modelopt"
_SCHEMA = {"quant_algo": str, "group_size?": int, "quantized_layers?": dict}
_NVFP4 = ("NVFP4", "W4A16_NVFP4")
_FP8 = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
_ACTIVATIONS = ("input_scale", "k_scale", "v_scale")
_MIXED = "MIXED_PRECISION"


class ModelOptNVFP4(E2M1Format):
    """NVFP4; see the module's docstring."""

    name = "modelopt"
    codes = "weight"
    code_dtypes = ("U8",)
    scale_dtype = torch.float8_e4m3fn
    block_size = NV_BLOCK_SIZE
    factor = "weight_scale_2"
    retained = (factor, *_ACTIVATIONS)

    def settings_of(self, config: Mapping[str, Any]) -> Settings:
        """As ``Format.settings_of``; ``config`` may also be the content of ``hf_quant_config.json``."""
        for source, own in _algorithms(config):
            if own["quant_algo"].upper() in _NVFP4 and own.get("group_size") not in (None, NV_BLOCK_SIZE):
                raise ValueError(
                    f"{source}: expected group_size {NV_BLOCK_SIZE}, got {own['group_size']}, not supported"
                )
        return Settings(NV_BLOCK_SIZE)


class ModelOptFP8(FP8Format):
    """FP8; see the module's docstring."""

    name = "modelopt"
    retained = _ACTIVATIONS

    def settings_of(self, config: Mapping[str, Any]) -> Settings:
        return Settings(None, None, scale_dtype=torch.float32, scale_shape=(), bits=8, code="e4m3")


def formats(config: Mapping[str, Any]) -> tuple[Format, ...]:
    """The formats of weights in a checkpoint with that ``quantization_config``.

    Raises:
        ValueError: it is damaged, or has other weights only.
    """
    kinds = dict.fromkeys(own["quant_algo"].upper() for _, own in _algorithms(config))
    if not kinds.keys().isdisjoint(_NVFP4):
        return ModelOptNVFP4(), ModelOptFP8()
    if not kinds.keys().isdisjoint(_FP8):
        return (ModelOptFP8(),)
    got = ", ".join(map(excerpt, kinds)) or _MIXED
    raise ValueError(f"{_SOURCE}: expected NVFP4 or FP8 weights, got {got}, which is not supported")


def _algorithms(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The parts of a configuration that name an algorithm, with their places for messages."""
    config = config.get("quantization", config) if isinstance(config, Mapping) else config
    check(config, _SCHEMA, _SOURCE)
    if config["quant_algo"].upper() != _MIXED:
        return [(_SOURCE, config)]
    layers = config.get("quantized_layers") or {}
    found = [(f"{_SOURCE}: {excerpt(name)}", layer) for name, layer in layers.items()]
    for source, own in found:
        check(own, {"quant_algo": str, "group_size?": int}, source)
    return found
