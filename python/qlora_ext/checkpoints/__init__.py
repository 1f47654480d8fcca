"""Reads and writes the 4-bit weights of checkpoints in safetensors files, one weight at a time and without loss.

``format_of`` finds the format that a checkpoint's configuration names, and its settings. The format turns the tensors
of a weight into a ``Weight4bit``, and back into the same bytes. Nothing here opens a file or imports transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..untrusted import check, excerpt
from . import auto_round, awq, compressed_tensors, gptq, mlx, modelopt, mxfp4
from .format import LOAD_ORIGINAL as LOAD_ORIGINAL
from .format import Format as Format
from .format import Settings as Settings
from .format import retained_of as retained_of
from .mlx import MLX as MLX
from .rows import alternating_rows as alternating_rows
from .rows import grouped_rows as grouped_rows
from .rows import select_rows as select_rows

_COMPRESSED_TENSORS = (compressed_tensors.MXFP4(), compressed_tensors.NVFP4(), compressed_tensors.Packed())
_FORMATS: dict[str, Format] = {
    kind.name: kind
    for kind in (mxfp4.MXFP4(), modelopt.ModelOptNVFP4(), awq.AWQ(), gptq.GPTQ(), mlx.MLX(), *_COMPRESSED_TENSORS)
}
_AUTO_ROUND = ("auto-round", "auto_round", "intel/auto-round")
_SOURCE = "quantization_config"


def format_of(config: Mapping[str, Any]) -> tuple[Format, Settings]:
    """The 4-bit format of a checkpoint, and its settings, from its ``quantization_config``.

    Raises:
        ValueError: the configuration is damaged, or describes weights that are not supported.
    """
    check(config, {"quant_method": str}, _SOURCE)
    name = config["quant_method"].lower()
    if name in _AUTO_ROUND:
        config = auto_round.packed_as(config)
        name = config["quant_method"]
    if name == "compressed-tensors":
        name = _compressed_tensors_name(config)
    if name == "fp8":
        raise ValueError(
            f"{_SOURCE}: fp8 is not supported, because its weights have a scale per tile of 128 x 128 elements, also "
            "where the experts beside them are 4-bit, as in DeepSeek-V4; load a checkpoint of the model in 16 bits, or "
            f"in a 4-bit format among {', '.join(_FORMATS)}"
        )
    if name not in _FORMATS:
        raise ValueError(
            f"{_SOURCE}: expected a 4-bit format among {', '.join(_FORMATS)}, got {excerpt(name)}, which is not "
            f"supported; {LOAD_ORIGINAL}"
        )
    return _FORMATS[name], _FORMATS[name].settings_of(config)


def _compressed_tensors_name(config: Mapping[str, Any]) -> str:
    """The format of compressed-tensors: of the configuration, or of its groups if they have the same one."""
    check(config, {"config_groups": dict, "format?": str}, _SOURCE)
    names = set()
    for name, group in config["config_groups"].items():
        check(group, {"weights?": dict, "format?": str}, f"{_SOURCE}: config_groups.{excerpt(name)}")
        if group.get("weights") is not None:
            names.add(group.get("format") or config.get("format") or "dense")
    return " and ".join(sorted(names)) or "no quantized weights"
