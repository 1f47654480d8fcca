"""ModelOpt's NVFP4: E2M1 codes, an E4M3 scale per 16 elements, and a float32 factor per weight.

The tensors of a weight [N, K] are ``weight`` uint8 [N, K/2], lo first, ``weight_scale`` float8_e4m3fn [N, K/16], and
``weight_scale_2`` float32, which multiplies the scales. ``input_scale``, and the scales of cached keys and values, are
kept and saved, but activations are not quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..untrusted import check, excerpt
from .e2m1 import NV_BLOCK_SIZE, E2M1Format
from .format import Settings

_SOURCE = "quantization_config of modelopt"
_SCHEMA = {"quant_algo": str, "group_size?": int, "quantized_layers?": dict}
_SERVED = ("NVFP4", "W4A16_NVFP4")
_MIXED = "MIXED_PRECISION"


class ModelOptNVFP4(E2M1Format):
    """The format ``modelopt``; see the module's docstring."""

    name = "modelopt"
    codes = "weight"
    block_size = NV_BLOCK_SIZE
    factor = "weight_scale_2"
    retained = ("weight_scale_2", "input_scale", "k_scale", "v_scale")

    def settings_of(self, config: Mapping[str, Any]) -> Settings:
        """As ``Format.settings_of``; ``config`` may also be the content of ``hf_quant_config.json``."""
        config = config.get("quantization", config) if isinstance(config, Mapping) else config
        check(config, _SCHEMA, _SOURCE)
        found = [(_SOURCE, config)]
        if config["quant_algo"].upper() == _MIXED:
            layers = config.get("quantized_layers") or {}
            found = [(f"{_SOURCE}: {excerpt(name)}", layer) for name, layer in layers.items()]
        served, kinds = False, dict[str, None]()
        for source, own in found:
            check(own, {"quant_algo": str, "group_size?": int}, source)
            kinds[excerpt(own["quant_algo"])] = None
            if own["quant_algo"].upper() in _SERVED:
                served = True
                if own.get("group_size") not in (None, NV_BLOCK_SIZE):
                    raise ValueError(
                        f"{source}: expected group_size {NV_BLOCK_SIZE}, got {own['group_size']}, not supported"
                    )
        if not served:
            got = ", ".join(kinds) or excerpt(config["quant_algo"])
            raise ValueError(f"{_SOURCE}: expected NVFP4 weights, got {got}, which is not supported")
        return Settings(NV_BLOCK_SIZE)
