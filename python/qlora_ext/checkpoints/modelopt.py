"""ModelOpt's NVFP4: E2M1 codes, an E4M3 scale per 16 elements, and a float32 factor per weight.

The tensors of a weight [N, K] are ``weight`` uint8 [N, K/2], lo first, ``weight_scale`` float8_e4m3fn [N, K/16], and
``weight_scale_2`` float32, which multiplies the scales. ``input_scale``, and the scales of cached keys and values, are
kept and saved, but activations are not quantized.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..untrusted import check, excerpt
from . import e2m1, scales
from .e2m1 import NV_BLOCK_SIZE
from .format import Given, Settings, patterns

_SOURCE = "quantization_config of modelopt"
_SCHEMA = {
    "quant_algo": str,
    "group_size?": int,
    "ignore?": [str],
    "exclude_modules?": [str],
    "quantized_layers?": dict,
}
_SERVED = ("NVFP4", "W4A16_NVFP4")
_MIXED = "MIXED_PRECISION"


class ModelOptNVFP4(e2m1.E2M1Format):
    """The format ``modelopt``; see the module's docstring."""

    name = "modelopt"
    codes = "weight"
    block_size = NV_BLOCK_SIZE
    scale_dtype = torch.float8_e4m3fn
    retained = ("weight_scale_2", "input_scale", "k_scale", "v_scale")

    def settings_of(self, config: Mapping[str, Any]) -> Settings:
        """As ``Format.settings_of``; ``config`` may also be the content of ``hf_quant_config.json``."""
        config = config.get("quantization", config) if isinstance(config, Mapping) else config
        check(config, _SCHEMA, _SOURCE)
        kind, targets, others = config["quant_algo"].upper(), None, Counter[str]()
        layers = config.get("quantized_layers") or {}
        if kind == _MIXED:
            targets = []
            for name, layer in layers.items():
                check(layer, {"quant_algo": str, "group_size?": int}, f"{_SOURCE}: {excerpt(name)}")
                if layer["quant_algo"].upper() in _SERVED:
                    _check_group_size(layer, f"{_SOURCE}: {excerpt(name)}")
                    targets.append(name)
                else:
                    others[layer["quant_algo"]] += 1
        else:
            _check_group_size(config, _SOURCE)
        if kind not in (*_SERVED, _MIXED) or targets == []:
            found = ", ".join(map(excerpt, others)) or excerpt(config["quant_algo"])
            raise ValueError(f"{_SOURCE}: expected NVFP4 weights, got {found}, which is not supported")
        ignored = [*(config.get("ignore") or ()), *(config.get("exclude_modules") or ())]
        return Settings(
            NV_BLOCK_SIZE,
            targets=None if targets is None else patterns(list(map(fnmatch.translate, targets)), _SOURCE),
            ignored=patterns(list(map(fnmatch.translate, ignored)), _SOURCE),
            others=dict(others),
        )

    def tensors(self, settings: Settings) -> dict[str, bool]:
        required = dict.fromkeys(("weight", "weight_scale", "weight_scale_2"), True)
        return dict.fromkeys(self.retained, False) | required

    def _scales(self, given: Given, stored: Tensor) -> e2m1.Scales:
        return e2m1.e4m3(given, "weight_scale", stored, "weight_scale_2", divides=False)

    def _table(self, retained: Mapping[str, Tensor]) -> Tensor:
        return scales.e4m3_table(torch.device("cpu")) * retained["weight_scale_2"].reshape(())


def _check_group_size(config: Mapping[str, Any], source: str) -> None:
    if config.get("group_size") not in (None, NV_BLOCK_SIZE):
        raise ValueError(f"{source}: expected group_size {NV_BLOCK_SIZE}, got {config['group_size']}, not supported")
