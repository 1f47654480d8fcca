"""AutoRound's checkpoints, whose weights are packed as GPTQ's or AWQ's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..untrusted import check, excerpt
from .format import LOAD_ORIGINAL

_SOURCE = "quantization_config of auto-round"
_PACKINGS = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}
_DENSE_BITS = 16
_SAME = ("bits", "group_size", "sym", "data_type")


def packed_as(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a GPTQ or AWQ checkpoint with the same weights.

    Raises:
        ValueError: ``config`` is damaged, or describes weights that are not supported.
    """
    check(config, {"bits": int, "packing_format": str, "data_type?": str, "extra_config?": dict}, _SOURCE)
    packing = config["packing_format"]
    if packing not in _PACKINGS:
        raise ValueError(
            f"{_SOURCE}: expected the packing_format {' or '.join(_PACKINGS)}, got {excerpt(packing)}, which is not "
            f"supported; {LOAD_ORIGINAL}"
        )
    if (config.get("data_type") or "int") != "int":
        raise ValueError(
            f"{_SOURCE}: expected the data_type int, got {excerpt(config['data_type'])}, which is not supported; "
            f"{LOAD_ORIGINAL}"
        )
    for name, own in (config.get("extra_config") or {}).items():
        source = f"{_SOURCE}: extra_config.{excerpt(name, 200)}"
        check(own, {"bits?": int}, source)
        if (own.get("bits") or config["bits"]) >= _DENSE_BITS:
            continue
        if changed := [key for key in _SAME if key in own and own[key] != config.get(key)]:
            raise ValueError(
                f"{source}: expected the same settings for all modules, got {changed[0]} "
                f"{excerpt(own[changed[0]])}, which is not supported; {LOAD_ORIGINAL}"
            )
    return {**config, "quant_method": _PACKINGS[packing]}
