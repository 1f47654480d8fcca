"""Reads and writes the packed weights of checkpoints in safetensors files, one weight at a time and without loss.

``formats_of`` finds the formats that a checkpoint's configuration names, and their settings. A format turns the tensors
of a weight into a ``Weight4bit``, and back into the same bytes. Nothing here opens a file or imports transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..untrusted import check, excerpt
from . import auto_round, awq, compressed_tensors, fp8, gptq, mlx, modelopt, mxfp4
from .format import LOAD_ORIGINAL as LOAD_ORIGINAL
from .format import Format as Format
from .format import Settings as Settings
from .format import retained_of as retained_of
from .mlx import MLX as MLX
from .rows import alternating_rows as alternating_rows
from .rows import grouped_rows as grouped_rows
from .rows import select_rows as select_rows

_FORMATS: dict[str, Format] = {kind.name: kind for kind in (mxfp4.MXFP4(), awq.AWQ(), gptq.GPTQ(), mlx.MLX())}
_COMPRESSED_TENSORS = {kind.name: kind for kind in compressed_tensors.FORMATS}
_OTHERS = {"modelopt": modelopt.formats, "fp8": fp8.formats}
_NAMES = ("mxfp4", "modelopt", "awq", "gptq", "mlx", "fp8", *_COMPRESSED_TENSORS)
_AUTO_ROUND = ("auto-round", "auto_round", "intel/auto-round")
_SOURCE = "quantization_config"


def format_of(config: Mapping[str, Any]) -> tuple[Format, Settings]:
    """The first of ``formats_of``."""
    return formats_of(config)[0]


def formats_of(config: Mapping[str, Any]) -> list[tuple[Format, Settings]]:
    """The formats of a checkpoint's packed weights, and their settings, from its ``quantization_config``.

    A weight has the first of them whose tensors the files have.

    Raises:
        ValueError: the configuration is damaged, or describes weights that are not supported.
    """
    check(config, {"quant_method": str}, _SOURCE)
    name = config["quant_method"].lower()
    if name in _AUTO_ROUND:
        config = auto_round.packed_as(config)
        name = config["quant_method"]
    if name == "compressed-tensors":
        groups = {_served(_COMPRESSED_TENSORS, kind): own for kind, own in _compressed_tensors_groups(config).items()}
        return [(kind, kind.settings_of(groups[kind])) for kind in compressed_tensors.FORMATS if kind in groups]
    kinds = _OTHERS[name](config) if name in _OTHERS else (_served(_FORMATS, name),)
    return [(kind, kind.settings_of(config)) for kind in kinds]


def _served(formats: Mapping[str, Format], name: str) -> Format:
    if name not in formats:
        raise ValueError(
            f"{_SOURCE}: expected a format among {', '.join(_NAMES)}, got {excerpt(name)}, which is not supported; "
            f"{LOAD_ORIGINAL}"
        )
    return formats[name]


def _compressed_tensors_groups(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each format of compressed-tensors, the configuration with its groups alone."""
    check(config, {"config_groups": dict, "format?": str}, _SOURCE)
    found: dict[str, dict[str, Any]] = {}
    for name, group in config["config_groups"].items():
        check(group, {"weights?": dict, "format?": str}, f"{_SOURCE}: config_groups.{excerpt(name)}")
        if group.get("weights") is not None:
            kind = group.get("format") or config.get("format") or "dense"
            found.setdefault(kind, {**config, "config_groups": {}})["config_groups"][name] = group
    return found or {"no quantized weights": {}}
